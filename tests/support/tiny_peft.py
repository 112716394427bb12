"""Tiny models with adapters of PEFT, and how they are trained: by a Trainer, and by the literal method."""

import functools

import pytest
import torch
from tiny import Examples, arguments, bert, blocks_of, llama, qwen2
from transformers import set_seed

from hf_lsam import LSAMConfig, LSAMTrainer, reference

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

# And one for a task, of what lies in no block.
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


def examples_for(model):
    return Examples(STEPS * BATCH, language_model=type(model.get_base_model()).__name__.endswith("ForCausalLM"))


def trainer_for(model, folder, settings, trainer_class=LSAMTrainer, **options):
    own = {"lsam_config": LSAMConfig(**settings)} if issubclass(trainer_class, LSAMTrainer) else {}
    options = {"max_steps": STEPS, "max_grad_norm": 0.0, **options}
    return trainer_class(
        model=model,
        args=arguments(folder, **options),
        train_dataset=examples_for(model),
        optimizers=(sgd(model), None),
        **own,
    )


def train_literally(model, literal, after_step=lambda step: None):
    """The training of `trainer_for`, by a literal step."""
    step_of, optimizer, examples = literal(model), sgd(model), examples_for(model)
    model.train()
    for step in range(STEPS):
        step_of(model, [examples.batch(step * BATCH, BATCH)], optimizer)
        after_step(step)


def frozen(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
