"""What a pass changes beside the weights, its batch and the model's buffers: pass 2 begins with what pass 1 did."""

import pytest
import torch
from tiny import VOCABULARY, Examples, arguments, bert, largest_difference, training_lines, weights
from tiny_runs import LAST, distance_to_plain, run
from torch import nn
from transformers import Trainer

from hf_lsam import LSAMConfig, LSAMTrainer


class ChangesItsInput:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["input_ids"].add_(1).remainder_(VOCABULARY)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def test_a_batch_that_a_pass_changes_in_place(tmp_path):
    """All blocks are perturbed, so that pass 2 begins at the tokens."""
    config = dict(block_selection="last", num_perturbed_blocks=None)
    distance, perturbed = distance_to_plain(ChangesItsInput, tmp_path, config=config, optim="sgd")
    assert distance < 1e-9
    assert perturbed._lsam.second_pass.replays


class Rows:
    """A batch of a collator's own kind, from which a loss takes the labels out."""

    def __init__(self, examples):
        self.tokens = torch.stack([example["input_ids"] for example in examples])
        self.labels = torch.stack([example["labels"] for example in examples])

    def __len__(self):
        return len(self.tokens)

    def __contains__(self, name):
        return hasattr(self, name)


class TakesLabelsOut:
    def floating_point_ops(self, inputs):
        return 0

    def _track_num_input_tokens(self, inputs):
        pass

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, inputs.labels = inputs.labels, None
        return model(input_ids=inputs.tokens, labels=labels).loss


def test_a_batch_that_is_no_dictionary(tmp_path):
    kind = type("Taking", (TakesLabelsOut, LSAMTrainer), {})
    trainer = kind(
        bert(),
        arguments(tmp_path, logging_steps=1, remove_unused_columns=False),
        train_dataset=Examples(16),
        data_collator=Rows,
        lsam_config=LSAMConfig(rho=0.1),
    )
    trainer.train()
    assert training_lines(trainer)[0]["lsam/active"] == 1


class Plainly:
    """The model's own loss."""


def spectral():
    model = bert(blocks=6).double()
    torch.manual_seed(0)
    nn.utils.parametrizations.spectral_norm(model.classifier)
    return model


class Averaging(nn.Module):
    """A head with a running mean that it takes off, as codebooks and centring layers keep one."""

    def __init__(self, head):
        super().__init__()
        self.head = head
        self.register_buffer("mean", torch.zeros(head.in_features, dtype=torch.float64))

    def forward(self, pooled):
        if self.training:
            self.mean.lerp_(pooled.detach().mean(0), 0.1)
        return self.head(pooled - self.mean)


def centring():
    model = bert(blocks=6).double()
    model.classifier = Averaging(model.classifier)
    return model


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("model", [spectral, centring])
def test_buffers_that_a_forward_pass_updates(model, accumulation, tmp_path):
    """Pass 2 reads what pass 1 read, and leaves what pass 1 left; replay goes on."""
    options = dict(gradient_accumulation_steps=accumulation)
    distance, perturbed = distance_to_plain(Plainly, tmp_path, model, **options)
    assert distance < 1e-6
    assert perturbed._lsam.second_pass.replays and perturbed._lsam.second_pass.drops


def test_buffers_are_left_as_pass_1_left_them(tmp_path):
    """However far pass 2 is moved; the weights are those that training begins with."""
    ends = [
        run(kind, tmp_path, centring(), {**LAST, "rho": 5.0, "num_perturbed_blocks": 4}, learning_rate=0.0)
        for kind in (Trainer, LSAMTrainer)
    ]
    assert largest_difference(*(weights(end.model) for end in ends)) == 0
    assert ends[0].model.classifier.mean.abs().max() > 0.01
