"""Promise 9: what a trainer counts on itself, in whatever kind of attribute, counts pass 1 only."""

import random
import weakref
from collections import deque

import numpy as np
import pytest
import torch
from tiny import Examples, arguments, bert, out_of_reach
from transformers import Trainer

from hf_lsam import LSAMConfig, LSAMTrainer, visitor
from hf_lsam.held import RandomState
from hf_lsam.pass_state import PassState
from hf_lsam.structure import Structure


class Counting:
    """Counts and keeps in `compute_loss`, in attributes of many kinds."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.number, self.numpy, self.array = 0, np.int64(0), np.zeros(2)
        self.tensor, self.mean = torch.zeros(2), None
        self.recent, self.window, self.metrics = deque(maxlen=3), [], {"losses": [], "rows": 0, "deep": {"calls": 0}}
        self.last, self.name = (), ""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            value, rows = float(loss.detach()), len(inputs["input_ids"])
            self.number += 1
            self.numpy += 1
            self.array += rows
            self.tensor += rows
            self.mean = value if self.mean is None else 0.9 * self.mean + 0.1 * value
            self.recent.append(value)
            self.window.append(value)
            if len(self.window) > 2:
                self.window.pop(0)
            self.metrics["losses"].append(value)
            self.metrics["rows"] += rows
            self.metrics["deep"]["calls"] += 1
            self.last, self.name = (value, rows), f"{self.number} calls"
        return (loss, output) if return_outputs else loss


def test_counters_of_every_kind_are_those_of_the_plain_trainer(tmp_path):
    counted = []
    for base in (Trainer, LSAMTrainer):
        # A rho that moves the weights by less than the last bit of a loss.
        own = {"lsam_config": LSAMConfig(rho=1e-12)} if base is LSAMTrainer else {}
        kind = type("Kind", (Counting, base), {})
        trainer = kind(bert().double(), arguments(tmp_path), train_dataset=Examples(32), **own)
        trainer.train()
        counted.append(trainer)
    plain, perturbed = counted
    for name in ("number", "numpy", "name"):
        assert getattr(plain, name) == getattr(perturbed, name)
    assert plain.number == 4 and perturbed.array.tolist() == plain.array.tolist() == [16, 16]
    assert perturbed.tensor.tolist() == plain.tensor.tolist()
    for name in ("mean", "recent", "window", "last"):
        assert getattr(perturbed, name) == pytest.approx(getattr(plain, name), abs=1e-6)
    assert perturbed.metrics["losses"] == pytest.approx(plain.metrics["losses"], abs=1e-6)
    assert (perturbed.metrics["rows"], perturbed.metrics["deep"]) == (16, {"calls": 4})


class NoWriting(dict):
    def __setitem__(self, key, value):
        raise TypeError("this dictionary is read-only")


class Holder:
    def __init__(self, **attributes):
        vars(self).update(attributes)


def state_of(owner):
    """A `PassState` that copies what `owner` refers to."""
    return PassState(Structure(torch.nn.Linear(2, 2)), lambda: {"owner": owner}, lambda tensor: tensor.requires_grad)


def test_what_cannot_be_written_is_left_alone(caplog):
    with torch.inference_mode():
        teacher = torch.ones(3)
    array = np.zeros(2)
    array.flags.writeable = False
    loop = {"count": 1}
    loop["self"] = loop
    owner = Holder(
        teacher=teacher,
        expanded=torch.ones(1).expand(3),
        settings=NoWriting(depth=2),
        array=array,
        loop=loop,
    )
    before = state_of(owner).before_pass_1()
    loop["count"] = 2
    dict.__setitem__(owner.settings, "depth", 3)
    before.put()
    assert owner.teacher is teacher and loop["count"] == 1
    assert (
        owner.settings["depth"] == 3
        and "owner.settings cannot be restored after pass 1, so both passes change it" in caplog.text
    )


def test_datasets_are_not_looked_at():
    """They may be lists of a million rows."""
    rows = [1, 2]
    before = state_of(Holder(train_dataset=rows)).before_pass_1()
    rows.append(3)
    before.put()
    assert rows == [1, 2, 3]


def test_what_never_changes_is_not_copied_again():
    owner = Holder(cache={number: torch.ones(2000) for number in range(200)}, mean=torch.zeros(2000))
    state = state_of(owner)
    held = []
    for state.steps in range(1, 8):
        before = state.before_pass_1()
        owner.mean += 1
        assert state.keep_changes(before) is None
        held.append([entry.name for entry in before.entries if isinstance(entry.thing, torch.Tensor)])
    assert held == [["owner.mean"]] * 7
    state.steps = 7
    assert not [entry.name for entry in state.before_pass_1().entries if entry.name.startswith("owner.cache[")]


def test_what_begins_to_change_is_told_once_and_held_from_then_on():
    owner = Holder(mean=torch.zeros(2000))
    state = state_of(owner)
    told = []
    for state.steps in range(1, 8):
        before = state.before_pass_1()
        if state.steps > 2:
            owner.mean += 1
        told.append(state.keep_changes(before))
        before.put()
    assert told == [None, None, "owner.mean", None, None, None, None]
    assert owner.mean[0] == 1


@pytest.mark.parametrize("most_bytes", [2**30, 0])
def test_a_large_buffer_that_begins_to_change_is_told_once(most_bytes, monkeypatch):
    monkeypatch.setattr(visitor, "_MOST_BYTES", most_bytes)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0].register_buffer("bank", torch.zeros(2000))
    state, told = PassState(Structure(model), dict, lambda tensor: tensor.requires_grad), []
    for step in range(1, 8):
        state.begin_step()
        before = state.before_pass_1()
        if step > 4:
            model[0].bank += 1
        told.append(state.keep_changes(before))
        before.put()
    assert told == [None] * 4 + ["model.0.bank", None, None] and model[0].bank[0] == 1


@pytest.mark.parametrize(
    "kind", [list, lambda: {"rows": []}, lambda: Holder(rows=[]), lambda: [[] for _ in range(100)]]
)
def test_what_is_dropped_between_steps_is_not_kept(kind):
    """Such as a list of features that a trainer empties before each step: they refer to the graph of their pass."""
    owner = Holder(model=torch.nn.Linear(2, 2))
    state, features = state_of(owner), []
    for state.steps in range(1, 14):
        owner.kept, owner.scratch = kind(), torch.zeros(2000)
        before = state.before_pass_1()
        owner.scratch += 1
        feature = torch.ones(3)
        rows = getattr(owner.kept, "rows", owner.kept["rows"] if isinstance(owner.kept, dict) else owner.kept)
        rows.append(feature)
        features += [weakref.ref(feature), weakref.ref(owner.scratch)]
        del feature, rows
        state.keep_changes(before)
        after = state.after_pass_1(RandomState.capture(state.device))
        before.put()
        after.put()
        state.begin_step()
        del before, after
    assert [feature() is not None for feature in features[:-4]] == [False] * 22


def test_what_lies_in_a_circle_is_gone_through_once():
    """As a callback of the trainer's that knows the trainer, and with it the optimizer, whose state is no pass's."""
    weight = torch.nn.Parameter(torch.ones(2000))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.ones(2000)
    optimizer.step()
    owner = Holder(optimizer=optimizer, friend=Holder())
    owner.friend.owner, owner.friend.scheduler = owner, torch.optim.lr_scheduler.ConstantLR(optimizer)
    entries = state_of(owner).before_pass_1().entries
    names = [entry.name for entry in entries if not isinstance(entry.thing, type)]
    assert "owner.friend" in names and len(names) == len(set(names))
    assert not any("optimizer.state" in name or "friend.owner." in name for name in names)


class Odd(dict):
    """Raises an error when it is read."""

    def __len__(self):
        raise RuntimeError("no length")


def test_an_object_that_cannot_be_read_does_not_end_the_run(caplog):
    owner = Holder(odd=Odd(a=1), calls=[], mixed=np.array([np.zeros(2), np.zeros(3)], dtype=object))
    state = state_of(owner)
    for state.steps in (1, 2, 3):
        before = state.before_pass_1()
        owner.calls.append(1)
        state.keep_changes(before)
        before.put()
    assert owner.calls == [] and "owner.odd cannot be read, so it is not restored after pass 2" in caplog.text


def test_a_weight_of_the_optimizer_is_not_held_though_it_is_frozen_for_now():
    """An adapter that a loss switches on is moved in pass 2, and what is held is put back there."""
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    state = PassState(Structure(model), dict, lambda tensor: tensor is model.weight)
    held = [entry.thing for entry in state.before_pass_1().entries]
    assert any(thing is model.bias for thing in held) and not any(thing is model.weight for thing in held)


@pytest.mark.parametrize(
    "draw",
    [np.random.rand, np.random.standard_normal, np.random.bytes, random.random, lambda *_: random.gauss(0, 1)],
    ids=["uniform", "normal", "bytes", "python", "gauss"],
)
def test_a_single_draw_on_the_host_is_seen(draw):
    """Also in the middle of the numbers that a generator makes at once, and one that takes what is left of a pair."""
    np.random.seed(0)
    random.seed(0)
    np.random.standard_normal(3)
    random.gauss(0, 1)
    for _ in range(4):
        before = RandomState.capture(torch.device("cpu"))
        assert RandomState.capture(torch.device("cpu")).same_host_state(before)
        draw(*([1] * (draw is np.random.bytes)))
        assert not RandomState.capture(torch.device("cpu")).same_host_state(before)


@pytest.mark.parametrize("selection", ["all", "last"])
def test_what_a_loss_logs_is_logged_once_where_pass_1_runs_again(selection, tmp_path):
    """SAM frees the gradient of pass 1, so if that of pass 2 is not finite, a third pass computes it again."""

    class Logging(LSAMTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self.log({"own": 1.0})
            notes.second.append(self.in_second_pass)
            return loss * (torch.nan if self.in_second_pass and self.state.global_step == 2 else 1)

    notes = out_of_reach(second=[])
    config = LSAMConfig(rho=0.1, block_selection=selection)
    trainer = Logging(bert(), arguments(tmp_path, max_steps=4), train_dataset=Examples(16), lsam_config=config)
    trainer.train()
    assert sum("own" in line for line in trainer.state.log_history) == 4
    # Pass 1 runs again in the third step, and is no second pass.
    assert notes.second.count(False) == 4 + (selection == "all")
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters())


def test_modes_that_a_pass_leaves_are_set_anew_for_pass_2(tmp_path):

    class Evaluating(LSAMTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            notes.modes.append([module.training for module in model.modules()])
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            model.bert.encoder.layer[1].eval()
            return loss

    notes = out_of_reach(modes=[])
    trainer = Evaluating(bert(dropout=0.1), arguments(tmp_path, max_steps=3), train_dataset=Examples(12))
    trainer.train()
    assert len(notes.modes) > 6 and all(map(all, notes.modes))
