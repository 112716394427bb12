"""Promise 7: what is not selected has bitwise the plain gradient, and what is frozen never moves."""

import pytest
import torch
from tiny import Examples, arguments, bert, llama, weights
from transformers import TrainerCallback

from hf_lsam import LSAMConfig, LSAMTrainer


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self, model):
        self.model, self.kept = model, None

    def on_pre_optimizer_step(self, *args, **kwargs):
        if self.kept is None:
            self.kept = {n: None if p.grad is None else p.grad.clone() for n, p in self.model.named_parameters()}


def first_gradients(model, config, folder, **options):
    trainer = LSAMTrainer(
        model=model,
        args=arguments(folder, max_steps=1, max_grad_norm=0.0, **options),
        train_dataset=Examples(8, language_model=hasattr(model, "lm_head")),
        lsam_config=config,
    )
    keep = Gradients(model)
    trainer.add_callback(keep)
    trainer.train()
    return keep.kept


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.parametrize("rule", ["top_k", "last"])
def test_unselected_gradients_are_the_plain_ones(rule, build, accumulation, tmp_path):
    """With dropout, and in the Llama model with a head that is tied to the embeddings."""
    options = dict(gradient_accumulation_steps=accumulation)
    plain = first_gradients(build(dropout=0.1), LSAMConfig(block_selection="none"), tmp_path, **options)
    config = LSAMConfig(rho=0.5, block_selection=rule, num_perturbed_blocks=1)
    lsam = first_gradients(build(dropout=0.1), config, tmp_path, **options)
    changed = {name for name in plain if not torch.equal(plain[name], lsam[name])}
    blocks = {name.split("layer")[1].split(".")[1] for name in changed}
    assert changed and len(blocks) == 1
    assert all(".layer" in name for name in changed)


@pytest.mark.parametrize("selection", ["all", "top_k"])
def test_frozen_weights_never_move(selection, tmp_path):
    model = bert()
    for layer in model.bert.encoder.layer[:2]:
        layer.requires_grad_(False)
    model.bert.embeddings.requires_grad_(False)
    start = weights(model)
    config = LSAMConfig(rho=0.5, block_selection=selection)
    trainer = LSAMTrainer(model=model, args=arguments(tmp_path), train_dataset=Examples(16), lsam_config=config)
    trainer.train()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert len(frozen) > 30
    assert all(torch.equal(start[name], value) == (name in frozen) for name, value in weights(model).items())


def test_base_weights_under_an_adapter_never_move(tmp_path):
    peft = pytest.importorskip("peft")
    model = bert()
    start = weights(model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS"))
    trainer = LSAMTrainer(
        model=model,
        args=arguments(tmp_path, logging_steps=1),
        train_dataset=Examples(16),
        lsam_config=LSAMConfig(rho=0.5),
    )
    trainer.train()
    base = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and "original_module" not in name
    }
    assert len(base) > 60
    for name, parameter in base.items():
        plain_name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(parameter, start[plain_name]), name
    assert trainer.state.log_history[0]["lsam/active"] == 1
    assert 0 < trainer.state.log_history[0]["lsam/captured"] < 1
