"""Adapters of PEFT: every promise holds for what they train, and the base never moves."""

import functools
import json

import pytest
import torch
from tiny import (
    Examples,
    arguments,
    assert_equal,
    bert,
    checkpointed,
    largest_difference,
    llama,
    qwen2,
    weights,
    without_replay,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, set_seed

from hf_lsam import LSAMConfig, LSAMTrainer, reference
from hf_lsam.blocks import find_blocks
from hf_lsam.step import LSAMStep

peft = pytest.importorskip("peft")

STEPS, BATCH = 4, 4
MODELS = {"bert": bert, "llama": llama, "qwen2": qwen2}
ATTENTION = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "qwen2": ["q_proj", "v_proj"]}
EMBEDDINGS = {"bert": "word_embeddings", "llama": "embed_tokens", "qwen2": "embed_tokens"}
FEEDFORWARD = {"bert": "intermediate.dense", "llama": "down_proj", "qwen2": "down_proj"}
HEAD = {"bert": "classifier", "llama": "lm_head", "qwen2": "lm_head"}

# An adapter's configuration for a model's name.
ADAPTERS = {
    "lora": lambda name: peft.LoraConfig(r=2, target_modules=ATTENTION[name]),
    "lora and head": lambda name: peft.LoraConfig(r=2, target_modules=ATTENTION[name], modules_to_save=[HEAD[name]]),
    "lora, embeddings too": lambda name: peft.LoraConfig(r=2, target_modules=[*ATTENTION[name], EMBEDDINGS[name]]),
    "dora": lambda name: peft.LoraConfig(r=2, target_modules=ATTENTION[name], use_dora=True),
    "ia3": lambda name: peft.IA3Config(
        target_modules=[*ATTENTION[name], FEEDFORWARD[name]], feedforward_modules=[FEEDFORWARD[name]]
    ),
}
OUTSIDE_BLOCKS = {
    "prompt tuning": lambda task: peft.PromptTuningConfig(num_virtual_tokens=3, task_type=task),
    "prefix tuning": lambda task: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type=task),
    "p-tuning": lambda task: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type=task),
}


def top_2(model):
    return functools.partial(reference.lsam_step, blocks=blocks_of(model), rho=0.1, alpha=0.8, rule=reference.top_k(2))


def one_pass(model):
    return functools.partial(
        reference.one_pass_lsam_step, blocks=blocks_of(model), rho=0.1, rule=reference.top_k(2), state={}
    )


# name: (settings, the literal step for a model)
METHODS = {
    "top 2": (dict(rho=0.1, alpha=0.8), top_2),
    "sam": (dict(rho=0.1, block_selection="all"), lambda model: functools.partial(reference.sam_step, rho=0.1)),
    "one pass": (dict(rho=0.1, ascent_gradient="previous"), one_pass),
}


def blocks_of(model):
    return [[p for p in block.parameters() if p.requires_grad] for block in find_blocks(model).values()]


def adapted(name, adapter, **options):
    """A tiny model with an adapter whose weights are not at their starting point, where half of them have no use."""
    model = MODELS[name](**options)
    model = peft.get_peft_model(model, adapter, autocast_adapter_dtype=False)
    set_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)


def trainer_for(model, folder, settings, trainer_class=LSAMTrainer, **options):
    own = {"lsam_config": LSAMConfig(**settings)} if trainer_class is LSAMTrainer else {}
    options = {"max_steps": STEPS, "max_grad_norm": 0.0, **options}
    return trainer_class(
        model=model,
        args=arguments(folder, **options),
        train_dataset=Examples(
            STEPS * BATCH, language_model="CausalLM" in type(model.get_base_model()).__name__[-10:]
        ),
        optimizers=(sgd(model), None),
        **own,
    )


def frozen(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


# The steps


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize(
    "name, adapter", [*(("bert", adapter) for adapter in ADAPTERS), ("llama", "lora"), ("qwen2", "lora and head")]
)
def test_equals_the_reference_and_leaves_the_base_alone(name, adapter, method, tmp_path):
    settings, literal = METHODS[method]
    fast, slow = (adapted(name, ADAPTERS[adapter](name)) for _ in range(2))
    start, base = weights(fast), frozen(fast)
    trainer_for(fast, tmp_path, settings).train()

    literal_step, optimizer = literal(slow), sgd(slow)
    examples = Examples(STEPS * BATCH, language_model=name != "bert")
    slow.train()
    for step in range(STEPS):
        literal_step(slow, [examples.batch(step * BATCH, BATCH)], optimizer)

    assert largest_difference(weights(slow), start) > 1e-3
    assert largest_difference(weights(fast), weights(slow)) < 1e-12
    assert_equal(frozen(fast), base)


@pytest.mark.usefixtures("float64")
def test_adalora_with_its_reallocation_equals_the_reference(tmp_path):
    """Whoever trains AdaLoRA reallocates its ranks after each update, from the gradient that the optimizer got."""
    ranks = dict(init_r=4, target_r=1, tinit=0, tfinal=1, deltaT=1, total_step=STEPS)
    fast, slow = (adapted("bert", peft.AdaLoraConfig(target_modules=ATTENTION["bert"], **ranks)) for _ in range(2))

    class Reallocate(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            fast.base_model.update_and_allocate(state.global_step + 1)

    base = frozen(fast)
    trainer = trainer_for(fast, tmp_path, METHODS["top 2"][0])
    trainer.add_callback(Reallocate())
    trainer.train()

    literal_step, optimizer, examples = top_2(slow), sgd(slow), Examples(STEPS * BATCH)
    slow.train()
    for step in range(STEPS):
        literal_step(slow, [examples.batch(step * BATCH, BATCH)], optimizer)
        slow.base_model.update_and_allocate(step + 1)
    assert largest_difference(weights(fast), weights(slow)) < 1e-12
    values = torch.cat([p.flatten() for n, p in fast.named_parameters() if "lora_E" in n])
    assert int((values == 0).sum()) == 3 * len(values) // 4
    assert_equal(frozen(fast), base)


@pytest.mark.parametrize(
    "name, checkpointing", [("bert", None), ("bert", {"use_reentrant": True}), ("llama", {"use_reentrant": False})]
)
def test_replay_is_exact_and_used(name, checkpointing, tmp_path):
    """With dropout in the adapter, and under activation checkpointing; the base's embeddings are frozen."""
    config = peft.LoraConfig(r=2, target_modules=ATTENTION[name], lora_dropout=0.3)
    results, ran = [], []
    for replayed in (True, False):
        model = adapted(name, config, dropout=0.1)
        options = {} if checkpointing is None else checkpointed(**checkpointing)
        trainer = trainer_for(model, tmp_path, dict(rho=0.5, block_selection="last"), logging_steps=1, **options)
        first_layer = next(m for n, m in model.named_modules() if n.endswith(f"{ATTENTION[name][0]}.lora_A.default"))
        calls = []
        first_layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if not replayed:
            new_step = trainer._new_step
            trainer._new_step = lambda model, max_steps, new=new_step: without_replay(new(model, max_steps))
        trainer.train()
        assert trainer._lsam.second_pass.replays == replayed
        results.append(weights(model))
        ran.append(len(calls))
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert_equal(*results)
    assert len(losses) == STEPS
    assert ran[1] > ran[0]
    # Replayed, the first block runs in pass 1 only. (Before transformers 5.23, a reentrant checkpoint ran it again for
    # the gradients of the frozen embeddings.)
    if checkpointing != {"use_reentrant": True}:
        assert ran[0] == STEPS * (1 if checkpointing is None else 2)


def test_cost_is_the_share_of_the_blocks_that_pass_2_runs():
    """Next to no weight takes a gradient, so what remains of pass 2 is the part of the model that it runs."""
    model = peft.get_peft_model(qwen2(blocks=8), peft.LoraConfig(r=1, target_modules=["q_proj"]))
    blocks = find_blocks(model)
    step = LSAMStep(model, LSAMConfig(), max_steps=1)
    head = sum(p.numel() for p in model.base_model.model.lm_head.parameters())
    block = sum(p.numel() for p in next(iter(blocks.values())).parameters())
    for first in range(8):
        expected = ((8 - first) * block + head) / (8 * block + head)
        assert step.costs.overhead([step.candidates[first]]) == pytest.approx(expected, abs=0.02)


# What is in no block


@pytest.mark.parametrize("kind", list(OUTSIDE_BLOCKS))
def test_tuning_outside_the_blocks_is_refused_before_training(kind, tmp_path):
    model = peft.get_peft_model(bert(), OUTSIDE_BLOCKS[kind]("SEQ_CLS"))
    start = weights(model)
    trainer = trainer_for(model, tmp_path, {})
    with pytest.raises(ValueError, match="None of the 4 blocks .*prompt and prefix tuning.* block_selection='all'"):
        trainer.train()
    assert_equal(weights(model), start)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", list(OUTSIDE_BLOCKS))
def test_the_way_out_of_that_refusal_equals_the_reference(kind, tmp_path):
    fast, slow = (adapted("bert", OUTSIDE_BLOCKS[kind]("SEQ_CLS")) for _ in range(2))
    base = frozen(fast)
    settings, literal = METHODS["sam"]
    trainer_for(fast, tmp_path, settings).train()
    literal_step, optimizer, examples = literal(slow), sgd(slow), Examples(STEPS * BATCH)
    slow.train()
    for step in range(STEPS):
        literal_step(slow, [examples.batch(step * BATCH, BATCH)], optimizer)
    assert largest_difference(weights(fast), weights(slow)) < 1e-12
    assert_equal(frozen(fast), base)


# Names, several adapters


def test_names_are_those_of_the_model_that_the_trainer_was_given(tmp_path):
    model = adapted("bert", ADAPTERS["lora"]("bert"))
    trainer_for(model, tmp_path, dict(rho=0.1), logging_steps=1).train()
    counts = json.loads((tmp_path / "lsam_blocks.jsonl").read_text().splitlines()[0])["counts"]
    assert list(counts) == [f"base_model.model.bert.encoder.layer.{index}" for index in range(4)]
    assert set(counts) < {name for name, _ in model.named_modules()}
    pattern = r"base_model\.model\.bert\.encoder\.layer\.\d\.attention\.self\.query"
    step = LSAMStep(model, LSAMConfig(block_pattern=pattern), max_steps=1)
    assert [len(candidate.parameters) for candidate in step.candidates] == [2] * 4
    with pytest.raises(ValueError, match=r"for instance 'base_model\\\\.model"):
        LSAMStep(model, LSAMConfig(block_pattern=r"bert\.encoder\.layer\.\d"), max_steps=1)


def test_only_the_active_adapter_is_trained(tmp_path):
    model = adapted("bert", ADAPTERS["lora"]("bert"))
    model.add_adapter("other", ADAPTERS["lora"]("bert"))
    for active, idle in (("default", "other"), ("other", "default")):
        model.set_adapter(active)
        start = weights(model)
        trainer = trainer_for(model, tmp_path / active, dict(rho=0.5), logging_steps=STEPS)
        trainer.train()
        assert trainer.state.log_history[0]["lsam/active"] == 1
        changed = {name for name, value in weights(model).items() if not torch.equal(value, start[name])}
        assert changed and all(f".{active}." in name and f".{idle}." not in name for name in changed)


# Saving and resuming


@pytest.mark.parametrize("adapter", ["lora and head", "ia3"])
def test_a_checkpoint_is_that_of_the_trainer_and_gives_the_same_outputs(adapter, tmp_path):
    files = {}
    for trainer_class in (Trainer, LSAMTrainer):
        model = adapted("bert", ADAPTERS[adapter]("bert"))
        folder = tmp_path / trainer_class.__name__
        options = dict(save_strategy="steps", save_steps=STEPS)
        trainer_for(model, folder, dict(rho=0.5), trainer_class, **options).train()
        files[trainer_class] = {path.name for path in (folder / f"checkpoint-{STEPS}").iterdir()}
    assert files[LSAMTrainer] == files[Trainer] | {"lsam_state.safetensors"}
    assert "adapter_model.safetensors" in files[Trainer] and "model.safetensors" not in files[Trainer]

    batch = Examples(4).batch(0, 4)
    model.eval()
    outputs = model(**batch).logits
    loaded = peft.PeftModel.from_pretrained(bert(), folder / f"checkpoint-{STEPS}").eval()
    assert torch.equal(loaded(**batch).logits, outputs)
    merged = model.merge_and_unload()
    assert type(merged) is type(bert())
    assert torch.allclose(merged(**batch).logits, outputs, atol=1e-5)


@pytest.mark.parametrize("method", ["top 2", "one pass"])
def test_resume_equals_the_uninterrupted_run(method, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=ATTENTION["bert"], lora_dropout=0.3, modules_to_save=["classifier"])
    settings = METHODS[method][0]
    options = dict(save_strategy="steps", save_steps=2)
    whole = adapted("bert", config, dropout=0.1)
    trainer_for(whole, tmp_path, settings, **options).train()
    again = adapted("bert", config, dropout=0.1)
    start = weights(again)
    trainer_for(again, tmp_path, settings, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(again), weights(whole))
    assert largest_difference(weights(again), start) > 1e-3


# A quantised base


class Int8Linear(torch.nn.Linear):
    """A linear layer as quantisation leaves it: integers that take no gradient, made numbers when they are used."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.weight = torch.nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.weight.to(hidden.dtype) * self.scale, self.bias)


@pytest.mark.usefixtures("float64")
def test_a_base_of_integers_equals_the_reference(tmp_path):
    """Only adapters are perturbed and take gradients, so that it does not matter what the base is made of."""

    def build():
        model = llama()
        for layer in model.model.layers:
            for name, module in list(layer.named_modules()):
                if isinstance(module, torch.nn.Linear):
                    parent, _, child = name.rpartition(".")
                    setattr(layer.get_submodule(parent), child, Int8Linear(module))
        set_seed(1)
        return peft.get_peft_model(model, ADAPTERS["lora"]("llama"), autocast_adapter_dtype=False)

    settings, literal = METHODS["top 2"]
    fast, slow = build(), build()
    base = frozen(fast)
    assert sum(value.dtype == torch.int8 for value in base.values()) == 4 * 7
    trainer_for(fast, tmp_path, settings).train()
    literal_step, optimizer, examples = literal(slow), sgd(slow), Examples(STEPS * BATCH, language_model=True)
    slow.train()
    for step in range(STEPS):
        literal_step(slow, [examples.batch(step * BATCH, BATCH)], optimizer)
    assert largest_difference(weights(fast), weights(slow)) < 1e-12
    assert_equal(frozen(fast), base)


def test_a_base_of_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    set_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=64, pad_token_id=0, **sizes)).save_pretrained(tmp_path / "model")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=quantised, device_map="cpu")
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=ATTENTION["llama"], lora_dropout=0.1))
    base = frozen(model)
    assert torch.uint8 in {value.dtype for value in base.values()}
    trainer = trainer_for(model, tmp_path / "out", dict(rho=0.5, block_selection="last"), logging_steps=1)
    trainer.train()
    assert_equal(frozen(model), base)
    assert trainer._lsam.second_pass.replays
    assert trainer.state.log_history[0]["lsam/active"] == 1
    assert trainer.state.log_history[0]["lsam/first_block"] == 2
