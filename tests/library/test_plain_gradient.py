"""
The step mixes gradients of the plain Trainer, whatever it divides its losses by, which differs between versions.

Before transformers 5.10 a causal language model's loss is divided by all labels, the first of each row included. From
5.0 on BERT's, which takes no notice of the number of items, is summed over micro-batches, unless the Trainer is told.
"""

import pytest
import torch
from tiny import Examples, arguments, bert, blocks_of, llama, weights
from transformers import Trainer, TrainerCallback

from hf_lsam import LSAMConfig, LSAMTrainer, reference

RHO, ALPHA = 0.5, 0.7


class Ragged(Examples):
    """A language-model set in which the number of labels differs from row to row, and every row has its first."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        labels = row["input_ids"].clone()
        labels[1 : 1 + index % 6] = -100
        return {**row, "labels": labels}


class Gradients(TrainerCallback):
    """What the optimizer gets."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients(trainer_class, model, folder, accumulation, **options):
    """Those of one step of a trainer, by the name of the weight."""
    examples = Ragged(12, language_model=True) if model.config.model_type == "llama" else Examples(12)
    callback, start = Gradients(), weights(model)
    args = arguments(
        folder,
        max_steps=1,
        per_device_train_batch_size=12 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
    )
    trainer_class(model, args, train_dataset=examples, callbacks=[callback], **options).train()
    model.load_state_dict(start)
    return callback.seen


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.parametrize("selection", ["top_k", "last", "all"])
def test_a_step_mixes_the_gradients_of_the_plain_trainer(selection, build, accumulation, tmp_path):
    model = build()
    plain = gradients(Trainer, model, tmp_path, accumulation)
    names = {parameter: name for name, parameter in model.named_parameters()}
    blocks = [[names[parameter] for parameter in block] for block in blocks_of(model)]
    norms = [reference.norm([plain[name] for name in block]) for block in blocks]
    chosen = {"top_k": reference.top_k(2)(norms), "last": reference.last(2)(norms)}.get(selection)
    selected = [*plain] if chosen is None else [name for index in chosen for name in blocks[index]]
    length, start = reference.norm([plain[name] for name in selected]), weights(model)
    with torch.no_grad():
        for name in selected:
            model.get_parameter(name).add_(plain[name], alpha=RHO / length)
    moved = gradients(Trainer, model, tmp_path, accumulation)
    model.load_state_dict(start)

    config = LSAMConfig(rho=RHO, alpha=ALPHA, block_selection=selection)
    mixed = gradients(LSAMTrainer, model, tmp_path, accumulation, lsam_config=config)
    expected = plain | {name: (1 - ALPHA) * plain[name] + ALPHA * moved[name] for name in selected}
    assert mixed.keys() == expected.keys()
    assert reference.norm([expected[name] - plain[name] for name in selected]) > 1e-3
    for name, gradient in mixed.items():
        assert torch.allclose(gradient, expected[name], rtol=0, atol=1e-12), name
