"""Walks through the modules: once, unless a module or a weight is added, removed or replaced."""

import sys
import types

import pytest
import torch
from tiny import Examples, arguments, bert, out_of_reach
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.structure import Structure


def model():
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))


CHANGES = {
    "added": lambda model: model.append(nn.ReLU()),
    "added to an empty one": lambda model: model[1][0].add_module("inner", nn.ReLU()),
    "replaced": lambda model: model[1].__setitem__(0, nn.ReLU()),
    "removed": lambda model: model[1].__delitem__(1),
    "weight added": lambda model: model[1][0].register_parameter("scale", nn.Parameter(torch.ones(2))),
    "weight replaced": lambda model: setattr(model[1][1], "weight", nn.Parameter(torch.ones(2, 2))),
    "weight removed": lambda model: setattr(model[1][1], "bias", None),
    "last weight added": lambda model: model[1][1].register_parameter("last", nn.Parameter(torch.ones(2))),
    "last weight deleted": lambda model: delattr(model[1][1], "bias"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_found_once(change):
    changed = model()
    structure = Structure(changed)
    assert structure.look() == structure.look() == 0
    CHANGES[change](changed)
    assert structure.look() == structure.look() == 1
    assert structure.modules == [*changed.modules()]


def test_modules_of_a_wrapper_are_among_them():
    inner = model()
    wrapper = nn.Sequential(inner)
    assert Structure(inner, wrapper).modules == [*wrapper.modules()]


# --- what it saves


class Counting:
    """Counts the calls of a method that walks through all modules."""

    def __init__(self, monkeypatch, owner, name):
        self.calls, inner = [], getattr(owner, name)

        def method(*args, **kwargs):
            self.calls.append(args[0])
            return inner(*args, **kwargs)

        method.__module__ = inner.__module__
        monkeypatch.setattr(owner, name, method)


def run(kind, folder, lsam=None, net=None, callbacks=(), **options):
    own = {} if kind is Trainer else {"lsam_config": LSAMConfig(rho=0.1, **(lsam or {}))}
    args = arguments(folder, **{"max_steps": 6, **options})
    trainer = kind(net or bert(), args, train_dataset=Examples(32), callbacks=[*callbacks], **own)
    trainer.train()
    return trainer


@pytest.mark.parametrize("lsam", [dict(), dict(perturb_interval=3), dict(ascent_gradient="previous")])
def test_no_step_walks_to_count_weights_or_to_set_modes(lsam, tmp_path, monkeypatch):
    counts = Counting(monkeypatch, type(bert()), "num_parameters")
    modes = Counting(monkeypatch, nn.Module, "train")
    run(LSAMTrainer, tmp_path, max_steps=3, lsam=lsam)
    first = len(counts.calls), len(modes.calls)
    run(LSAMTrainer, tmp_path, max_steps=9, lsam=lsam)
    assert (len(counts.calls), len(modes.calls)) == (2 * first[0], 2 * first[1])


class Head(nn.Linear):
    """A user's module with a method `train` that has an effect of its own."""

    def train(self, mode=True):
        sys.modules[__name__].notes.trained.append(mode)
        return super().train(mode)


class Observe(TrainerCallback):
    """Gives the model a method `train` of its own."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            inner = model.train

            def train(mode=True):
                sys.modules[__name__].notes.trained.append(mode)
                return inner(mode)

            model.train = train


@pytest.mark.parametrize("place", ["in a module", "set in training"])
def test_a_users_method_train_is_called_in_every_pass(place, tmp_path, monkeypatch):
    notes = out_of_reach(trained=[])
    monkeypatch.setattr(sys.modules[__name__], "notes", notes, raising=False)
    calls = []
    for kind in (Trainer, LSAMTrainer):
        net, notes.trained = bert(), []
        if place == "in a module":
            net.classifier = Head(16, 3)
        lsam = dict(perturb_interval=6, block_selection="all")
        run(kind, tmp_path, lsam, net, [Observe()] if place == "set in training" else [])
        calls.append(len(notes.trained))
    # The first step is perturbed: beside pass 2, a full one is compared with pass 1.
    assert calls[1] == calls[0] + 2 * (place == "in a module") and calls[0] >= 3


class Widen(TrainerCallback):
    """Adds a module to the model."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            model.classifier = nn.Sequential(model.classifier, nn.Linear(3, 3))


def test_operations_are_counted_anew_where_the_model_has_changed(tmp_path):
    flos = []
    for kind in (Trainer, LSAMTrainer):
        lsam = dict(perturb_interval=6, ascent_gradient="previous")
        flos.append(run(kind, tmp_path, callbacks=[Widen()], lsam=lsam).state.total_flos)
    assert flos[0] == flos[1] != run(Trainer, tmp_path).state.total_flos


def test_a_users_count_of_weights_is_asked_for_every_batch(tmp_path):
    flos = []
    for kind in (Trainer, LSAMTrainer):
        net, seen = bert(), []

        def num_parameters(self, *args, seen=seen, **kwargs):
            seen.append(self)
            return len(seen)

        net.num_parameters = types.MethodType(num_parameters, net)
        flos.append(run(kind, tmp_path, net=net, lsam=dict(ascent_gradient="previous")).state.total_flos)
    assert flos[0] == flos[1]
