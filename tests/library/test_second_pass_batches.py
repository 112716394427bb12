"""Pass 2 begins with all that pass 1 began with: batches, their number of items, the accelerator, other optimizers."""

from collections import UserDict

import numpy as np
import pytest
import torch
from kept import Weighs
from literal_step import (
    LIMIT,
    WAYS,
    Literal,
    apart,
    assert_as_plain,
    assert_literal,
    assert_right,
    batches_of,
    members,
)
from situations import ALL, LAST, VOCABULARY, Net, Recorder, Situation, follow, trainer_class
from tiny import arguments, block_rows
from torch import nn
from torch.utils.data import IterableDataset, default_collate

from hf_lsam import LSAMConfig


class Synchronised(Weighs):
    """Weighs the last micro-batch of a step otherwise, and counts on the accelerator."""

    def weight(self, output, batch):
        self.accelerator.step += 1
        return 1 + 2 * self.accelerator.sync_gradients + self.accelerator.step % 2


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("config", [None, LAST], ids=["plain", "last"])
def test_the_accelerator(config, accumulation, tmp_path):
    assert_literal(follow(Synchronised, tmp_path, config, accumulation))


class ChangesItems(Situation):
    """Doubles the number of items that the loss is divided by, in place."""

    scaled = True

    def loss(self, model, batch, items):
        items.mul_(2)
        return nn.functional.cross_entropy(model(**batch).logits, batch["labels"], reduction="sum") / items


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("config", [None, LAST], ids=["plain", "last"])
def test_the_number_of_items(config, accumulation, tmp_path):
    assert_literal(follow(ChangesItems, tmp_path, config, accumulation))


class Mask:
    def __init__(self, values):
        self.values = values


def tokens_in_place(batch):
    batch["input_ids"].add_(1).remainder_(VOCABULARY)
    return 1.0


def in_a_nested_dictionary(batch):
    batch["extra"]["deep"]["rows"].mul_(2)
    return batch["extra"]["deep"]["rows"].sum()


def a_list(batch):
    batch["extra"].append(1.0)
    return sum(batch["extra"])


def tensors_in_a_list(batch):
    batch["extra"][0].add_(1)
    return batch["extra"][0].sum()


def two_names_of_a_tensor(batch):
    batch["extra"][0].mul_(2)
    return batch["extra"][1].sum()


def a_leaf(batch):
    """Noise that takes a gradient, as of an attack on the inputs."""
    batch["extra"].square().sum().backward()
    return batch["extra"].grad.sum()


def an_array(batch):
    batch["extra"] *= 2
    return float(batch["extra"].sum())


def an_object(batch):
    batch["extra"].values.add_(1)
    return batch["extra"].values.sum()


def labels_taken_out(batch):
    return batch["extra"]["weights"].pop("now", 0.0)


def a_dictionary_of_its_own(batch):
    batch.data["input_ids"].add_(1).remainder_(VOCABULARY)
    batch.data["labels"] = (batch.data["labels"] + 1) % 3
    return 1.0


# What a batch holds beside tokens and labels, and what the loss does with it: a weight.
EXTRAS = {
    tokens_in_place: lambda: None,
    in_a_nested_dictionary: lambda: {"deep": {"rows": torch.ones(4)}},
    a_list: lambda: [0.5],
    tensors_in_a_list: lambda: [torch.ones(4), torch.zeros(2)],
    two_names_of_a_tensor: lambda: [torch.ones(4)] * 2,
    a_leaf: lambda: torch.ones(4, requires_grad=True),
    an_array: lambda: np.ones(4),
    an_object: lambda: Mask(torch.ones(4)),
    labels_taken_out: lambda: {"weights": {"now": 2.0}},
    a_dictionary_of_its_own: lambda: None,
}


def changing(change) -> type[Situation]:
    def collate(rows):
        batch = {**default_collate(rows), "extra": EXTRAS[change]()}
        return UserDict(batch) if change is a_dictionary_of_its_own else batch

    def loss(self, model, batch, items):
        weight = change(batch)
        output = model(batch["input_ids"], labels=batch["labels"])
        return output.loss + weight * output.logits.square().mean()

    return type("Changing", (Situation,), {"collate": staticmethod(collate), "loss": loss})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", EXTRAS, ids=lambda change: change.__name__)
def test_batches_changed_in_place(change, way, tmp_path):
    assert_right(changing(change), tmp_path, way)


class HoldsAView(Situation):
    """A batch with an object that cannot be copied."""

    collate = staticmethod(lambda rows: {**default_collate(rows), "extra": {"a": 1}.keys()})

    def loss(self, model, batch, items):
        assert list(batch.pop("extra")) == ["a"]
        return model(**batch).loss


def test_what_cannot_be_copied_is_shared(tmp_path):
    run = follow(HoldsAView, tmp_path, LAST)
    assert [line["lsam/active"] for line in run.lines] == [1] * 4 and not run.messages


class Stream(IterableDataset):
    """Five micro-batches of 4 an epoch: with an accumulation of 2 one is left over for the next epoch's first step."""

    def __iter__(self):
        return (Situation.data[index] for index in range(20))


# Micro-batches of each step, with the scale that the Trainer gives them.
PARTS = [[(0, 1 / 2), (1, 1 / 2)], [(2, 1 / 2), (3, 1 / 2)], [(4, 1), (0, 1 / 2), (1, 1 / 2)]]


@pytest.mark.parametrize("config", [None, LAST, {**LAST, "alpha": 0.5}], ids=["plain", "last", "alpha 0.5"])
def test_a_left_over_micro_batch(config, tmp_path):
    """Pass 2 has the scale of pass 1."""
    streamed = type("Streamed", (Situation,), {"train_data": Stream()})
    run = follow(streamed, tmp_path, config, 2, max_steps=3)
    for step, parts in enumerate(PARTS):
        batches = [Situation.collate([Situation.data[4 * index + row] for row in range(4)]) for index, _ in parts]
        literal = Literal(Situation, run.starts[step], batches, step, [scale for _, scale in parts])
        blocks = [] if config is None else ["blocks.2", "blocks.3"]
        chosen = members(literal.model, blocks, run.starts[step]["optimized"])
        right = literal.gradients(LSAMConfig(**(config or {})), set().union(*chosen.values()))
        assert apart(run.gradients[step], right) < LIMIT


class Adversary(Situation):
    """Trains a critic of the features with an optimizer of its own, then against it."""

    keeps = ("critic", "optimizer_of_critic")
    kind = torch.optim.SGD

    def begin(self, model):
        torch.manual_seed(5)
        self.critic = nn.Linear(8, 2).double()
        self.optimizer_of_critic = self.kind(self.critic.parameters(), lr=0.1)

    def critic_loss(self, model, batch):
        features = model.run(model.embedding(batch["input_ids"])).mean(1)
        return nn.functional.cross_entropy(self.critic(features), torch.arange(len(features)) % 2)

    def step(self, model, batch, once):
        self.optimizer_of_critic.zero_grad()
        weights = list(self.critic.parameters())
        for weight, gradient in zip(
            weights, torch.autograd.grad(self.critic_loss(model, batch), weights), strict=True
        ):
            weight.grad = gradient
        self.optimizer_of_critic.step()
        return once(batch)

    def loss(self, model, batch, items):
        return model(**batch).loss - 0.3 * self.critic_loss(model, batch)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam], ids=lambda kind: kind.__name__)
def test_a_second_optimizer(kind, way, tmp_path):
    assert_right(type("Adversarial", (Adversary,), {"kind": kind}), tmp_path, way)


def test_a_second_optimizer_with_next_to_no_rho(tmp_path):
    assert_as_plain(type("Adversarial", (Adversary,), {"kind": torch.optim.Adam}), tmp_path)


class LeavesOut:
    """Leaves out the last micro-batch of the second step, before the trainer sees it."""

    seen = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen += 1
        return torch.zeros(()) if self.seen == 4 else super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.parametrize("config", [LAST, ALL, {**LAST, "max_overhead": 0.3}], ids=["last", "all", "price"])
def test_the_micro_batches_of_a_step_that_does_not_end_are_forgotten(config, tmp_path):
    """The step that lacks its last micro-batch is plain, and the next one begins anew."""
    model, recorder = Net(), Recorder()
    options = dict(optim="sgd", learning_rate=0.1, max_grad_norm=0.0, remove_unused_columns=False, logging_steps=1)
    trainer = recorder.trainer = type("Leaves", (LeavesOut, trainer_class(Situation, True)), {})(
        model,
        arguments(tmp_path, max_steps=4, gradient_accumulation_steps=2, **options),
        train_dataset=Situation.data,
        lsam_config=LSAMConfig(**config),
        callbacks=[recorder],
    )
    trainer.train()
    perturbed = [row["perturbed"] for row in block_rows(tmp_path)]
    assert perturbed == ([0, 0, 1, 1] if "max_overhead" in config else [1, 0, 1, 1])
    for step in (0, 2, 3):
        literal = Literal(Situation, recorder.starts[step], batches_of(Situation, 2 * step, 2), step)
        names = {"last": ["blocks.2", "blocks.3"], "all": ["all"]}[config["block_selection"]]
        chosen = members(literal.model, names * perturbed[step], recorder.starts[step]["optimized"])
        right = literal.gradients(LSAMConfig(**config), set().union(*chosen.values()))
        assert apart(recorder.gradients[step], right) < LIMIT
