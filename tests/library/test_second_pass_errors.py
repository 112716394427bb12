"""An error of pass 2 alone does not end a run: the gradient is the literal or the plain one, and a warning says so."""

import pytest
import torch
from literal_step import assert_literal
from situations import ALL, BUDGET, LAST, TOP, Net, Situation, follow, make
from tiny import out_of_reach
from transformers import TrainerCallback


class Fails(Situation):
    """Counts its calls, weighs its loss by them, and raises where it should; `notes.struck` holds where it did."""

    keeps = ("calls",)
    error = RuntimeError
    fault = staticmethod(lambda self, model: False)
    where = "before"

    def begin(self, model):
        self.calls = 0

    def attach(self, model):
        self.ran = set()
        for index, block in enumerate(model.blocks):
            block.up.register_forward_hook(lambda *args, index=index: self.ran.add(index))

    def strike(self, model, where):
        if where == self.where and self.fault(self, model):
            self.notes.struck.append(self.state.global_step)
            raise self.error("a test's own")

    def loss(self, model, batch, items):
        self.calls += 1
        self.ran.clear()
        self.strike(model, "before")
        output = model(**batch)
        self.strike(model, "after")
        loss = output.loss + self.calls % 3 * output.logits.square().mean()
        if self.where == "backward" and loss.requires_grad:
            loss.register_hook(lambda gradient: self.strike(model, "backward"))
        return loss

    def step(self, model, batch, once):
        loss = once(batch)
        self.strike(model, "at last")
        return loss


def second(trainer) -> bool:
    return getattr(trainer, "in_second_pass", False)


def once(step):
    notes = out_of_reach(done=0)

    def fault(trainer, model):
        if notes.done or not second(trainer) or trainer.state.global_step < step:
            return False
        notes.done += 1
        return True

    return fault


def twice(step):
    notes = out_of_reach(done=0)

    def fault(trainer, model):
        if notes.done > 1 or not second(trainer) or trainer.state.global_step < step:
            return False
        notes.done += 1
        return True

    return fault


def always(step):
    return lambda trainer, model: second(trainer) and trainer.state.global_step >= step


def in_one_step(step):
    return lambda trainer, model: second(trainer) and trainer.state.global_step == step


def replayed(step):
    """After a forward pass in which the first block did not run."""
    return lambda trainer, model: 0 not in trainer.ran and trainer.state.global_step >= step


def narrowed(step):
    """Where the embedding takes no gradient."""
    return lambda trainer, model: not model.embedding.weight.requires_grad and trainer.state.global_step >= step


def either(step):
    return lambda trainer, model: replayed(step)(trainer, model) or narrowed(step)(trainer, model)


CONFIGS = {
    "last": (LAST, 1),
    "last, two": (LAST, 2),
    "top_k, two": (TOP, 2),
    "budget": (BUDGET, 1),
    "all, two": (ALL, 2),
    "own, two": ({**LAST, "sharpness_scope": "micro_batch"}, 2),
}


def failing(fault, where="before", error=RuntimeError, base=Fails) -> type[Situation]:
    own = {"fault": staticmethod(fault), "where": where, "error": error, "notes": out_of_reach(struck=[])}
    return type("Failing", (base,), own)


FAULTS = [
    *((once, 0, "before"), (once, 1, "backward"), (once, 2, "at last"), (twice, 0, "after"), (twice, 1, "before")),
    *((always, 0, "backward"), (always, 1, "at last"), (always, 2, "before")),
    *((in_one_step, 0, "at last"), (in_one_step, 1, "before"), (in_one_step, 2, "backward")),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("fault, step, where", FAULTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_what_pass_2_raises_ends_no_run(fault, step, where, config, tmp_path):
    settings, accumulation = CONFIGS[config]
    situation = failing(fault(step), where)
    run = follow(situation, tmp_path, settings, accumulation)
    assert run.trainer.state.global_step == 4 and situation.notes.struck and run.messages
    assert_plain_steps(run, fault, step)


def assert_plain_steps(run, fault, step):
    """Each step is the literal one, or the plain one, which is counted and comes where the fault is."""
    if run.trainer.lsam_config.sharpness_scope == "batch":
        assert_literal(run, may_skip=".")
    plain = [line["lsam/skipped"] > 0 for line in run.lines]
    if fault is always:
        assert plain == [own >= step for own in range(4)]
    elif fault is in_one_step:
        assert plain == [own == step for own in range(4)]


class Catches(Fails):
    """Skips the micro-batches that fail, as some Trainers do when memory runs out."""

    def step(self, model, batch, once):
        try:
            return once(batch)
        except Exception:
            model.zero_grad(set_to_none=True)
            return torch.zeros(())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("fault", [once, twice, always, in_one_step])
@pytest.mark.parametrize("step, where", [(0, "after"), (1, "backward"), (2, "before"), (2, "backward")])
def test_what_training_step_catches_in_pass_2_is_noticed(fault, step, where, config, tmp_path):
    settings, accumulation = CONFIGS[config]
    situation = failing(fault(step), where, base=Catches)
    run = follow(situation, tmp_path, settings, accumulation)
    assert situation.notes.struck and run.messages
    assert_plain_steps(run, fault, step)


class ReadsFirst(Net):
    """Adds the output of the first block to that of the last one, if it can."""

    def run(self, x):
        first = self.blocks[0](x)
        x = self.blocks[3](self.blocks[2](self.blocks[1](first)))
        try:
            return x + first.square()
        except Exception as error:
            if self.raises is None:
                return x
            raise self.raises("not that of the library") from error


@pytest.mark.parametrize("raises", [ValueError, None])
@pytest.mark.parametrize("config", ["last", "last, two", "own, two"])
def test_a_read_of_what_was_dropped_is_noticed_if_its_error_is_caught(config, raises, tmp_path):
    settings, accumulation = CONFIGS[config]
    situation = failing(always(9), base=Catches)
    situation.new = type("Net", (ReadsFirst,), {"raises": raises})
    run = follow(situation, tmp_path, settings, accumulation)
    assert_literal(run)
    assert not run.trainer._lsam.second_pass.drops and run.trainer._lsam.second_pass.replays and not run.messages


class Hooks(Situation):
    """Reads what a block, another one in each step, gets and returns, by hooks that an error leaves there."""

    def loss(self, model, batch, items):
        block, weight = model.blocks[self.state.global_step % 3 + 1], model.blocks[3].down.weight
        handles = [
            weight.register_hook(lambda gradient: 0.8 * gradient),
            block.register_forward_pre_hook(lambda module, args: (1.1 * args[0],)),
            block.register_forward_hook(lambda module, args, kwargs, output: 0.9 * output, with_kwargs=True),
        ]
        output = model(**batch)
        for handle in handles[1:]:
            handle.remove()
        self.handle = handles[0]
        return output.loss

    def step(self, model, batch, once):
        loss = once(batch)
        self.handle.remove()
        return loss


@pytest.mark.parametrize("config", CONFIGS)
def test_hooks_that_an_error_of_pass_2_has_left_are_removed(config, tmp_path):
    settings, accumulation = CONFIGS[config]
    run = follow(Hooks, tmp_path, settings, accumulation)
    assert_literal(run)
    model = run.trainer.model
    left = [table for block in model.blocks for table in (block._forward_pre_hooks, block._forward_hooks)]
    assert not any(left) and not model.blocks[3].down.weight._backward_hooks


SHORTENED = [
    *((replayed, 0, "after"), (replayed, 1, "at last"), (replayed, 2, "after")),
    *((narrowed, 0, "at last"), (narrowed, 1, "before"), (narrowed, 2, "backward")),
    *((either, 0, "after"), (either, 1, "after"), (either, 2, "at last")),
]


@pytest.mark.parametrize("config", ["last", "last, two", "top_k, two", "own, two"])
@pytest.mark.parametrize("fault, step, where", SHORTENED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_what_only_a_shortened_pass_2_raises_makes_it_a_whole_one(fault, step, where, config, tmp_path):
    settings, accumulation = CONFIGS[config]
    situation = failing(fault(step), where)
    run = follow(situation, tmp_path, settings, accumulation)
    assert run.messages or not situation.notes.struck
    assert_literal(run)


@pytest.mark.parametrize(
    "error", [ValueError, IndexError, KeyError, AssertionError, StopIteration, NotImplementedError]
)
@pytest.mark.parametrize("config", ["last", "all, two"])
def test_errors_of_any_kind(error, config, tmp_path):
    settings, accumulation = CONFIGS[config]
    run = follow(failing(always(1), error=error), tmp_path, settings, accumulation)
    assert_literal(run, may_skip=".")
    assert [line["lsam/skipped"] for line in run.lines] == [0, 1, 1, 1]


class Begins(TrainerCallback):
    """The weights and the random state that each step began with."""

    def __init__(self):
        self.weights = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights = {name: weight.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "error, step, where",
    [
        *((KeyboardInterrupt, 0, "before"), (KeyboardInterrupt, 0, "at last"), (KeyboardInterrupt, 2, "after")),
        *((KeyboardInterrupt, 2, "backward"), (SystemExit, 1, "after")),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_an_interrupt_in_pass_2_ends_the_run_with_its_weights(error, step, where, config, tmp_path):
    settings, accumulation = CONFIGS[config]
    begins = Begins()
    situation = failing(always(step), where, error)
    trainer = make(situation, tmp_path, settings, callbacks=[begins], gradient_accumulation_steps=accumulation)
    with pytest.raises(error):
        trainer.train()
    assert trainer.state.global_step == step and not trainer.in_second_pass
    assert all(torch.equal(weight, begins.weights[name]) for name, weight in trainer.model.named_parameters())
    assert all(weight.requires_grad for weight in trainer.model.parameters())


@pytest.mark.parametrize("config", [None, *CONFIGS])
@pytest.mark.parametrize("where", ["before", "backward"])
def test_what_pass_1_raises_is_raised(where, config, tmp_path):
    """As by the plain Trainer: an error of the user's is no matter of the second pass."""

    def fault(trainer, model):
        return trainer.state.global_step == 1 and not second(trainer)

    settings, accumulation = CONFIGS[config] if config else (None, 1)
    trainer = make(failing(fault, where), tmp_path, settings, gradient_accumulation_steps=accumulation)
    with pytest.raises(RuntimeError, match="a test's own"):
        trainer.train()
    assert trainer.state.global_step == 1
