"""What changes while a run goes on: weights within a pass, which of them are trained, and the settings."""

import pytest
import torch
from tiny import Examples, arguments, bert, block_rows, largest_difference, training_lines, weights
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.blocks import find_blocks

ONE_PASS = dict(ascent_gradient="previous", block_selection="last", num_perturbed_blocks=2)


class ScheduleFree(torch.optim.Optimizer):
    """SGD that evaluates at an average of the weights (Defazio et al., 2024): `train` and `eval` move them there."""

    def __init__(self, parameters, lr=0.05, beta=0.9):
        super().__init__(parameters, dict(lr=lr, beta=beta))
        self.training, self.steps = True, 0

    @torch.no_grad()
    def _go(self, training, weight):
        if self.training != training:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        parameter.lerp_(self.state[parameter]["z"], weight(group["beta"]))
            self.training = training

    def train(self):
        self._go(True, lambda beta: 1 - beta)

    def eval(self):
        self._go(False, lambda beta: 1 - 1 / beta)

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        share = 1 / self.steps
        for group in self.param_groups:
            for parameter in group["params"]:
                z = self.state[parameter].setdefault("z", parameter.clone())
                parameter.lerp_(z, share)
                parameter.add_(parameter.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                z.sub_(parameter.grad, alpha=group["lr"])


@pytest.mark.parametrize("settings", [{}, ONE_PASS], ids=["two passes", "one pass"])
def test_an_optimizer_that_moves_the_weights_for_evaluation(settings, tmp_path):
    """That a run is evaluated between its steps changes nothing."""
    ends = []
    for evaluates in ("no", "steps"):
        model = bert().double()
        optimizer = ScheduleFree(model.parameters())
        trainer = LSAMTrainer(
            model,
            arguments(tmp_path, max_steps=6, eval_strategy=evaluates, eval_steps=2, max_grad_norm=0.0),
            train_dataset=Examples(32),
            eval_dataset=Examples(8, seed=5),
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
            lsam_config=LSAMConfig(rho=0.1, **settings),
        )
        trainer.train()
        optimizer.train()
        ends.append(weights(model))
    assert largest_difference(*ends) < 1e-12


@pytest.mark.parametrize("settings, refused", [({}, False), (ONE_PASS | {"block_selection": "all"}, True)])
def test_a_forward_pass_that_changes_moved_weights(settings, refused, tmp_path):
    """In one pass that would be lost with the perturbation; of two passes the first one keeps it."""
    model = bert()
    own = model.get_input_embeddings()
    model.set_input_embeddings(nn.Embedding(own.num_embeddings, own.embedding_dim, max_norm=0.5))
    trainer = LSAMTrainer(model, arguments(tmp_path), train_dataset=Examples(16), lsam_config=LSAMConfig(**settings))
    if refused:
        with pytest.raises(RuntimeError, match="changed perturbed weights.*ascent_gradient='current'"):
            trainer.train()
    else:
        trainer.train()


class At(TrainerCallback):
    """Calls a function with the model as a step begins."""

    def __init__(self, step, change):
        self.step, self.change = step, change

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.change(model)


def unfrozen_at(step, model, folder, config):
    for block in list(find_blocks(model).values())[:2]:
        block.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = LSAMTrainer(
        model,
        arguments(folder, max_steps=4, logging_steps=1, max_grad_norm=0.0),
        train_dataset=Examples(32),
        callbacks=[At(step, lambda model: model.requires_grad_(True))],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        lsam_config=config,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "config, before, after",
    [
        (LSAMConfig(block_selection="all"), 1, 1),
        (LSAMConfig(num_perturbed_blocks=None), 2, 4),
        (LSAMConfig(num_perturbed_blocks=None, ascent_gradient="previous"), 2, 4),
    ],
    ids=["all", "two passes", "one pass"],
)
def test_weights_that_are_trained_later_are_perturbed_then(config, before, after, tmp_path):
    """Gradual unfreezing: what is perturbed equals what is trained, and the log counts every step."""
    model = bert()
    trainer = unfrozen_at(2, model, tmp_path, config)
    counts = [len([norm for norm in row["norms"].values() if norm > 0]) for row in block_rows(tmp_path)]
    current = config.ascent_gradient == "current"
    assert counts == ([before] * 2 + [after] * 2 if current else [0] + [before] * 2 + [after])
    active = [line["lsam/active"] for line in training_lines(trainer)]
    # The first step of one pass has nothing to climb; the first after the change climbs what the last before it found.
    assert active == [current, 1, 1, 1]


def test_a_log_line_counts_the_steps_before_and_after_such_a_change(tmp_path):
    trainer = LSAMTrainer(
        bert(),
        arguments(tmp_path, logging_steps=4),
        train_dataset=Examples(32),
        callbacks=[At(2, lambda model: model.bert.encoder.layer[3].requires_grad_(False))],
        lsam_config=LSAMConfig(block_selection="last", num_perturbed_blocks=1),
    )
    trainer.train()
    assert training_lines(trainer)[0]["lsam/active"] == 1
    (row,) = block_rows(tmp_path)
    assert list(row["counts"].values()) == [0, 0, 2, 2] and row["steps"] == row["perturbed"] == 4


def test_a_parameter_that_the_optimizer_gets_later_has_its_plain_gradient(tmp_path):
    """With a tiny rho it ends where the plain Trainer does."""
    ends = []
    for base in (Trainer, LSAMTrainer):
        model = bert().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

        def add(model, optimizer=optimizer, scheduler=scheduler):
            model.classifier.register_parameter("scale", nn.Parameter(torch.ones(3, dtype=torch.float64)))
            model.classifier.register_forward_hook(lambda module, inputs, output: output * module.scale)
            optimizer.add_param_group({"params": [model.classifier.scale]})
            scheduler.base_lrs.append(0.05)
            scheduler.lr_lambdas.append(scheduler.lr_lambdas[0])

        own = {"lsam_config": LSAMConfig(rho=1e-9)} if base is LSAMTrainer else {}
        trainer = base(
            model,
            arguments(tmp_path, max_grad_norm=0.0),
            train_dataset=Examples(16),
            callbacks=[At(1, add)],
            optimizers=(optimizer, scheduler),
            **own,
        )
        trainer.train()
        ends.append(weights(model))
    assert ends[0]["classifier.scale"].sub(1).abs().max() > 1e-3
    assert largest_difference(*ends) < 1e-6


def _in_blocks(model):
    return [parameter for block in find_blocks(model).values() for parameter in block.parameters()]


def test_settings_may_change_between_steps(tmp_path):
    config = LSAMConfig(block_selection="last", num_perturbed_blocks=1)
    changes = [At(1, lambda model: setattr(config, "alpha", 0.5)), At(2, lambda model: setattr(config, "alpha", 1.0))]
    trainer = LSAMTrainer(
        bert(), arguments(tmp_path, logging_steps=1), train_dataset=Examples(16), callbacks=changes, lsam_config=config
    )
    trainer.train()
    assert [line["lsam/active"] for line in training_lines(trainer)] == [1, 1, 1, 1]
