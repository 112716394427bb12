"""Settings and calls at any time: `lsam_config` set anew, steps taken by hand, logs in a loss, and what is refused."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from literal_step import Literal, apart, assert_literal, batches_of, members
from situations import ALL, LAST, TOP, Net, Situation, follow, hearing, make, told
from tiny import Examples, arguments, bert, largest_difference, training_lines, weights
from transformers import Trainer, TrainerCallback

from hf_lsam import LSAMConfig, LSAMMixin, LSAMTrainer
from hf_lsam.given import Optimized

NONE = dict(block_selection="none")


class Sets(TrainerCallback):
    """Sets the trainer's settings as a step begins, or as one ends."""

    def __init__(self, step, config, at_end=False):
        self.step, self.config, self.at_end = step, config, at_end

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.at_end and state.global_step == self.step:
            self.trainer.lsam_config = LSAMConfig(**self.config)

    def on_step_end(self, args, state, control, **kwargs):
        if self.at_end and state.global_step == self.step:
            self.trainer.lsam_config = LSAMConfig(**self.config)


def followed(folder, before, sets, accumulation=1, situation=Situation):
    class Set(situation):
        def begin(self, model):
            super().begin(model)
            sets.trainer = self

    return follow(Set, folder, before, accumulation, callbacks=[sets])


CHANGES = {
    "rho": (LAST, {**LAST, "rho": 0.1}),
    "alpha": (LAST, {**LAST, "alpha": 0.3}),
    "k": (LAST, {**LAST, "num_perturbed_blocks": 1}),
    "last to top_k": (LAST, TOP),
    "top_k to all": (TOP, ALL),
    "all to last": (ALL, LAST),
    "to a pattern": (LAST, {**TOP, "block_pattern": r"blocks\.\d\.up", "num_perturbed_blocks": 3}),
    "to adaptive": (LAST, {**LAST, "adaptive": True}),
    "to none": (LAST, NONE),
    "from none": (NONE, LAST),
    "to rho 0": (LAST, {**LAST, "rho": 0.0}),
    "from rho 0": ({**LAST, "rho": 0.0}, LAST),
    "to more blocks than there are": (LAST, {**LAST, "num_perturbed_blocks": 9}),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("at_end", [False, True], ids=["as a step begins", "as one ends"])
@pytest.mark.parametrize("change", CHANGES)
def test_settings_set_anew(change, at_end, accumulation, tmp_path):
    """Each step is the literal one of the settings that it begins with."""
    before, after = CHANGES[change]
    run = followed(tmp_path, before, Sets(2, after, at_end), accumulation)
    assert [start["config"] for start in run.starts[:4]] == [
        LSAMConfig(**config) for config in (before,) * 2 + (after,) * 2
    ]
    assert_literal(run)


BAD = {
    "a pattern": {**LAST, "block_pattern": "nothing"},
    "a budget": dict(block_selection="budget", max_overhead=0.001, rho=0.5),
}


@pytest.mark.parametrize("bad", BAD)
def test_settings_that_do_not_fit_leave_the_former_ones(bad, tmp_path):
    """There is a warning, and no error in the middle of a run."""
    run = followed(tmp_path, LAST, Sets(2, BAD[bad]))
    name = "block_pattern" if bad == "a pattern" else "max_overhead"
    assert told(run.messages, name)
    if bad == "a pattern":
        for start in run.starts:
            start["config"] = LSAMConfig(**LAST)
    assert_literal(run, may_skip="" if bad == "a pattern" else name)


def test_a_pattern_that_matches_nothing_is_warned_about_once(tmp_path):
    run = followed(tmp_path, LAST, Sets(1, BAD["a pattern"]))
    (message,) = told(run.messages, "block_pattern")
    assert "'nothing'" in message


@pytest.mark.parametrize("to", [dict(ascent_gradient="previous"), {"sharpness_scope": "micro_batch"}], ids=str)
@pytest.mark.parametrize("back", [False, True])
def test_another_way_of_perturbing_is_set(to, back, tmp_path):
    """From two passes to one, to a perturbation for each micro-batch, and back."""
    one, other = LAST, {**LAST, **to}
    run = followed(tmp_path, other if back else one, Sets(2, one if back else other), 2)
    assert run.trainer.state.global_step == 4
    assert [line["lsam/active"] for line in run.lines][1 if back else 0] == 1
    assert sum(line["lsam/skipped"] for line in run.lines) == 0


@pytest.mark.parametrize("config", [LAST, TOP, ALL, NONE], ids=["last", "top_k", "all", "none"])
@pytest.mark.parametrize("with_optimizer", [False, True])
def test_a_training_step_before_training(with_optimizer, config, tmp_path):
    """It runs as the Trainer's does: the loss, and the plain gradient or the literal one; `train` then begins anew."""
    trainer = make(Situation, tmp_path, config)
    if with_optimizer:
        trainer.create_optimizer_and_scheduler(4)
    trainer.current_gradient_accumulation_steps = 1
    (batch,) = batches_of(Situation, 0, 1)
    start = {"model": weights(trainer.model), "kept": {"accelerator": SimpleNamespace()}, "frozen": []}
    loss = trainer.training_step(trainer.model, dict(batch))
    assert float(loss) == pytest.approx(float(Net()(**batch).loss.detach()), abs=1e-12)
    assert largest_difference(start["model"], weights(trainer.model)) == 0
    got = {name: weight.grad for name, weight in trainer.model.named_parameters()}
    names, right = list(got), []
    pairs = combinations([f"blocks.{index}" for index in range(4)], 2)
    for blocks in ([], ["all"], *pairs):
        chosen = set().union(*members(trainer.model, blocks, names).values())
        right.append(Literal(Situation, start, [batch], 0).gradients(trainer.lsam_config, chosen))
    near = [apart(got, each) < 1e-12 for each in right]
    assert near[0] if config is NONE else any(near)
    trainer.model.zero_grad()
    trainer.train()
    fresh = follow(Situation, tmp_path / "fresh", config)
    assert largest_difference(weights(trainer.model), weights(fresh.trainer.model)) < 1e-12


class Parts(Situation):
    """Logs parts of its loss, with a key that the Trainer's lines have, at every second step."""

    logs = True

    def loss(self, model, batch, items):
        loss = model(**batch).loss
        if self.logs and self.state.global_step % 2 == 0:
            self.log({"loss": float(loss.detach()), "ce_loss": float(loss.detach())})
        return loss


@pytest.mark.parametrize("each", [1, 2, 4])
def test_logs_of_a_loss_do_not_begin_the_sums_anew(each, tmp_path):
    lines = []
    for logs in (True, False):
        situation = type("Logging", (Parts,), {"logs": logs})
        run = follow(situation, tmp_path / str(logs), LAST, max_steps=8, logging_steps=each)
        lines.append([line for line in run.lines if "learning_rate" in line])
        assert all(line.get("lsam/active", 0) <= 1 for line in run.lines)
        assert len(run.rows) == 8 // each
    ours = [{key: value for key, value in line.items() if key.startswith("lsam/")} for line in lines[0]]
    assert ours == [{key: line[key] for key in own} for line, own in zip(lines[1], ours, strict=True)]
    assert len(ours) == 8 // each and all(own["lsam/active"] == 1 for own in ours)


class NoSuper(LSAMTrainer):
    """As it is often copied out of the Trainer."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


class PastOurs(LSAMTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return Trainer.training_step(self, model, inputs, num_items_in_batch)


class WithSuper(LSAMTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, inputs, num_items_in_batch)


class Own(Trainer):
    """Below the mixin, it is both passes."""

    training_step = NoSuper.training_step


class Below(LSAMMixin, Own):
    pass


@pytest.mark.parametrize(
    "kind, config, warns",
    [
        *((NoSuper, LAST, True), (PastOurs, LAST, True), (NoSuper, ALL, True)),
        *((NoSuper, NONE, False), (WithSuper, LAST, False), (Below, LAST, False), (LSAMTrainer, LAST, False)),
    ],
)
def test_a_training_step_that_never_reaches_ours_is_warned_about(kind, config, warns, tmp_path):
    with hearing() as messages:
        args = arguments(tmp_path, logging_steps=1)
        trainer = kind(bert(), args, train_dataset=Examples(16), lsam_config=LSAMConfig(**config))
        trainer.train()
    found = told(messages, "training_step")
    assert len(found) == warns
    assert not warns or (kind.__name__ in found[0] and "super()" in found[0])
    if kind in (WithSuper, Below):
        assert [line["lsam/active"] for line in training_lines(trainer)] == [1, 1, 1, 1]


class InHooks(torch.optim.Optimizer):
    """Takes gradients as they come, as one that offloads to the host."""

    def __init__(self, model):
        super().__init__(list(model.parameters()), dict(lr=0.1))
        self.host = {}
        for parameter in self.param_groups[0]["params"]:
            parameter.register_post_accumulate_grad_hook(lambda p: self.host.update({p: p.grad.clone()}))

    @torch.no_grad()
    def step(self, closure=None):
        for parameter, gradient in self.host.items():
            parameter.add_(gradient, alpha=-0.1)
        self.host.clear()


@pytest.mark.parametrize("config", [None, LAST, TOP, ALL, NONE], ids=["plain", "last", "top_k", "all", "none"])
def test_an_optimizer_that_acts_in_hooks_is_refused(config, tmp_path):
    calls = []

    class Hooked(Situation):
        optimizer_of = InHooks

        def loss(self, model, batch, items):
            calls.append(batch)
            return model(**batch).loss

    if config in (None, NONE):
        follow(Hooked, tmp_path, config)
        assert len(calls) == 4
    else:
        with pytest.raises(NotImplementedError, match="hook.*block_selection='none'"):
            follow(Hooked, tmp_path, config)
        assert not calls


def test_another_optimizer_is_seen_though_it_may_lie_where_the_former_lay():
    owner = SimpleNamespace(optimizer=None)
    optimized = Optimized(owner)
    assert optimized() is None
    for _ in range(20):
        owner.optimizer = None
        weight = torch.nn.Parameter(torch.zeros(2))
        owner.optimizer = torch.optim.SGD([weight], lr=0.1)
        assert weight in optimized() and optimized() is optimized()
