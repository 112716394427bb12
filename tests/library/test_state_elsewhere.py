"""State that is not reached from attributes: global variables, closures, classes, callbacks, and settings."""

import weakref
from functools import partial
from typing import ClassVar

import pytest
import torch
from situations import LAST, Net, Situation, follow, hearing, make
from torch import nn
from transformers import PretrainedConfig, TrainerCallback

from hf_lsam import LSAM, LSAMConfig
from hf_lsam.pass_state import PassState

TALLY = 0
TEACHER: nn.Module | None = None


def count_in_a_global() -> None:
    global TALLY
    TALLY += 1


class Register:
    total = 0
    names: ClassVar[list[str]] = []

    def count(self):
        type(self).total += 1
        self.names.append("pass")


class Counts(TrainerCallback):
    calls = 0


class InAGlobal(Situation):
    def loss(self, model, batch, items):
        count_in_a_global()
        return model(**batch).loss

    def counted(self):
        return TALLY


class InAClass(Situation):
    def begin(self, model):
        self.register = Register()

    def loss(self, model, batch, items):
        self.register.count()
        return model(**batch).loss

    def counted(self):
        assert Register.total == len(Register.names)
        return Register.total


class InItsOwnClass(Situation):
    calls = 0

    def loss(self, model, batch, items):
        type(self).calls += 1
        return model(**batch).loss

    def counted(self):
        return type(self).calls


class InACallback(Situation):
    def loss(self, model, batch, items):
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Counts):
                callback.calls += 1
        return model(**batch).loss

    def counted(self):
        return next(each.calls for each in self.callback_handler.callbacks if isinstance(each, Counts))


class InArguments(Situation):
    def loss(self, model, batch, items):
        self.args.tally = getattr(self.args, "tally", 0) + 1
        return model(**batch).loss

    def counted(self):
        return self.args.tally


class InTheModelsSettings(Situation):
    def attach(self, model):
        model.config = PretrainedConfig(tally=0)

    def loss(self, model, batch, items):
        model.config.tally += 1
        return model(**batch).loss

    def counted(self):
        return self.model.config.tally


class InOurSettings(Situation):
    """A radius that shrinks at each micro-batch; the plain trainer has none."""

    def loss(self, model, batch, items):
        self.shrunk = getattr(self, "shrunk", 0) + 1
        if hasattr(self, "lsam_config"):
            self.lsam_config.rho *= 0.5
        return model(**batch).loss

    def counted(self):
        if hasattr(self, "lsam_config"):
            assert self.lsam_config.rho == LAST["rho"] * 0.5**self.shrunk
        return self.shrunk


class InGroups(Situation):
    def loss(self, model, batch, items):
        group = self.optimizer.param_groups[0]
        group["tally"] = group.get("tally", 0) + 1
        return model(**batch).loss

    def counted(self):
        return self.optimizer.param_groups[0]["tally"]


class InAHook(Situation):
    def attach(self, model):
        self.seen = seen = []
        model.head.register_forward_hook(lambda *call: seen.append(1))

    def counted(self):
        return len(self.seen)


class Collector:
    """Counts the calls of a hook; nothing else refers to it."""

    def __init__(self):
        self.calls = 0

    def see(self, *call):
        self.calls += 1

    __call__ = see


class InAHooksObject(Situation):
    hook_of = staticmethod(lambda collector: collector.see)

    def attach(self, model):
        collector = Collector()
        model.head.register_forward_hook(self.hook_of(collector))
        self.collector = weakref.ref(collector)

    def counted(self):
        return self.collector().calls


class InAHookThatIsAnObject(InAHooksObject):
    hook_of = staticmethod(lambda collector: collector)


class InAHooksArgument(InAHooksObject):
    hook_of = staticmethod(lambda collector: partial(Collector.see, collector))


class InAHookOfAWeight(InAHooksObject):
    def attach(self, model):
        collector = Collector()
        model.blocks[-1].up.weight.register_hook(collector.see)
        self.collector = weakref.ref(collector)


class InAHookOfTheTrainer(Situation):
    def begin(self, model):
        self.kept, self.calls = [0], 0
        model.head.register_forward_hook(self.see)

    def see(self, *call):
        self.kept[0] += 1
        self.calls += 1

    def counted(self):
        assert self.calls == self.kept[0]
        return self.calls


class InAClosure(Situation):
    def begin(self, model):
        seen = []
        self.count, self.get = (lambda: seen.append(1)), (lambda: len(seen))

    def loss(self, model, batch, items):
        self.count()
        return model(**batch).loss

    def counted(self):
        return self.get()


PLACES = [InAGlobal, InAClass, InItsOwnClass, InACallback, InArguments, InGroups, InAHook, InAClosure]
PLACES += [InTheModelsSettings, InOurSettings, InAHooksObject, InAHookThatIsAnObject, InAHooksArgument]
PLACES += [InAHookOfAWeight, InAHookOfTheTrainer]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("config", [None, LAST], ids=["plain", "last"])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_counted_counts_once(place, config, accumulation, tmp_path):
    global TALLY
    TALLY, Register.total, Register.names, InItsOwnClass.calls = 0, 0, [], 0
    run = follow(place, tmp_path, config, accumulation, callbacks=[Counts()], max_steps=6)
    assert run.trainer.counted() == 6 * accumulation
    assert not run.messages


def test_in_a_loop(tmp_path):
    global TALLY
    TALLY, Register.total, Register.names = 0, 0, []
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lsam = LSAM(model, optimizer, LSAMConfig(**LAST), max_steps=6)
    batch, register = Situation.collate([Situation.data[row] for row in range(4)]), Register()

    def compute_loss():
        count_in_a_global()
        register.count()
        return model(**batch).loss

    for _ in range(6):
        lsam.backward(compute_loss)
        optimizer.step()
        optimizer.zero_grad()
    assert TALLY == Register.total == len(Register.names) == 6


class TeacherInAGlobal(Situation):
    """A mean teacher that is a global variable, as in a notebook."""

    def begin(self, model):
        global TEACHER
        TEACHER = Net()

    def loss(self, model, batch, items):
        with torch.no_grad():
            taught = TEACHER(**batch).logits
            for mean, weight in zip(TEACHER.parameters(), model.parameters(), strict=True):
                mean.lerp_(weight, 0.1)
        output = model(**batch)
        return output.loss + (output.logits - taught).square().mean()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_global_teacher_sees_no_perturbed_weights(accumulation, tmp_path):
    ends = []
    for name, config in (("plain", None), ("ours", {**LAST, "rho": 1e-9})):
        run = follow(TeacherInAGlobal, tmp_path / name, config, accumulation)
        ends.append([*TEACHER.parameters(), *run.trainer.model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


class Stops(Situation):
    """Ends the training at a loss that no pass 1 reaches."""

    def loss(self, model, batch, items):
        loss = model(**batch).loss
        self.control.should_training_stop |= float(loss) > 2
        return loss


def test_a_loss_of_pass_2_does_not_end_the_training(tmp_path):
    with hearing():
        trainer = make(Stops, tmp_path, {**LAST, "rho": 20.0}, max_steps=4)
        trainer.train()
    assert trainer.state.global_step == 4
    assert max(line["loss"] for line in trainer.state.log_history if "loss" in line) < 2


class Answers:
    """Settings in which every name has a value, as some libraries have them."""

    def __getattr__(self, name):
        return None


class Stream(Answers):
    """An iterator that answers everything, too."""

    def __next__(self):
        return None


@pytest.mark.parametrize("kind", [Answers, Stream])
def test_an_object_that_has_every_attribute(kind, tmp_path):
    class Holds(Situation):
        def begin(self, model):
            self.answers = kind()

    run = follow(Holds, tmp_path, LAST)
    assert [line["lsam/active"] for line in run.lines] == [1] * 4 and not run.messages


def test_a_hook_of_the_trainer_does_not_lead_to_the_optimizer(tmp_path, monkeypatch):
    """Its state is as large as the weights, and no pass changes it."""
    names, keep_changes = set(), PassState.keep_changes

    def noted(self, before):
        names.update(entry.name for entry in before.entries)
        return keep_changes(self, before)

    monkeypatch.setattr(PassState, "keep_changes", noted)
    follow(InAHookOfTheTrainer, tmp_path, LAST)
    assert "trainer.kept" in names
    assert not any(".optimizer" in name or "._lsam" in name for name in names)
    assert not any(name.startswith("model.head hook 0.") for name in names)
