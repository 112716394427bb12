"""Adapters of PEFT: every promise holds for what they train, and the base never moves."""

import pytest
import torch
from older import IS_5
from tiny import (
    Examples,
    Unreplayed,
    assert_equal,
    bert,
    block_rows,
    checkpointed,
    largest_difference,
    qwen2,
    training_lines,
    weights,
)
from tiny_peft import (
    ADAPTERS,
    ATTENTION,
    METHODS,
    OUTSIDE_BLOCKS,
    STEPS,
    adapted,
    frozen,
    train_literally,
    trainer_for,
)
from transformers import Trainer, TrainerCallback

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.blocks import find_blocks
from hf_lsam.step import LSAMStep

peft = pytest.importorskip("peft")


class Full(Unreplayed, LSAMTrainer):
    pass


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
    train_literally(slow, literal)
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
    train_literally(slow, METHODS["top 2"][1], lambda step: slow.base_model.update_and_allocate(step + 1))
    assert largest_difference(weights(fast), weights(slow)) < 1e-12
    values = torch.cat([p.flatten() for n, p in fast.named_parameters() if "lora_E" in n])
    assert int((values == 0).sum()) == 3 * len(values) // 4
    assert_equal(frozen(fast), base)


@pytest.mark.parametrize(
    "name, checkpointing", [("bert", None), ("bert", {"use_reentrant": True}), ("llama", {"use_reentrant": False})]
)
def test_replay_is_exact_and_used(name, checkpointing, tmp_path):
    """With dropout in the adapter, and under activation checkpointing; the base's embeddings are frozen."""
    if checkpointing == {"use_reentrant": True} and not IS_5:
        pytest.skip("before transformers 5.0 there is no gradient under reentrant checkpointing, with any Trainer")
    config = peft.LoraConfig(r=2, target_modules=ATTENTION[name], lora_dropout=0.3)
    results, ran = [], []
    options = {"logging_steps": 1} | ({} if checkpointing is None else checkpointed(**checkpointing))
    for trainer_class in (LSAMTrainer, Full):
        model = adapted(name, config, dropout=0.1)
        trainer = trainer_for(model, tmp_path, dict(rho=0.5, block_selection="last"), trainer_class, **options)
        first_layer = next(m for n, m in model.named_modules() if n.endswith(f"{ATTENTION[name][0]}.lora_A.default"))
        calls = []
        first_layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        assert trainer._lsam.second_pass.replays == (trainer_class is LSAMTrainer)
        results.append(weights(model))
        ran.append(len(calls))
        assert len(training_lines(trainer)) == STEPS
    assert_equal(*results)
    assert ran[1] > ran[0]
    # Replayed, the first block runs in pass 1, and in the two full passes of the first step's comparisons. (Before
    # transformers 5.23, a reentrant checkpoint ran it again for the gradients of the frozen embeddings.)
    if checkpointing != {"use_reentrant": True}:
        assert ran[0] == (STEPS + 2) * (1 if checkpointing is None else 2)


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
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # in peft
@pytest.mark.parametrize(
    "name, task, kind",
    [*(("bert", "SEQ_CLS", kind) for kind in OUTSIDE_BLOCKS), ("llama", "CAUSAL_LM", "prefix tuning")],
)
def test_the_way_out_of_that_refusal_equals_the_reference(name, task, kind, tmp_path):
    fast, slow = (adapted(name, OUTSIDE_BLOCKS[kind](task)) for _ in range(2))
    base = frozen(fast)
    if (name, kind) == ("bert", "prefix tuning"):
        try:
            slow(**Examples(1).batch(0, 1))
        except ValueError as error:
            pytest.skip(f"peft runs no prefix tuning of a BERT here: {error}")
    settings, literal = METHODS["sam"]
    trainer_for(fast, tmp_path, settings).train()
    train_literally(slow, literal)
    assert largest_difference(weights(fast), weights(slow)) < 1e-12
    assert_equal(frozen(fast), base)


# Names, several adapters


def test_names_are_those_of_the_model_that_the_trainer_was_given(tmp_path):
    model = adapted("bert", ADAPTERS["lora"]("bert"))
    trainer_for(model, tmp_path, dict(rho=0.1), logging_steps=1).train()
    counts = block_rows(tmp_path)[0]["counts"]
    assert list(counts) == [f"base_model.model.bert.encoder.layer.{index}" for index in range(4)]
    assert set(counts) < {name for name, _ in model.named_modules()}
    pattern = r"base_model\.model\.bert\.encoder\.layer\.\d\.attention\.self\.query"
    step = LSAMStep(model, LSAMConfig(block_pattern=pattern), max_steps=1)
    assert [sum(p.requires_grad for p in candidate.parameters) for candidate in step.candidates] == [2] * 4
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
