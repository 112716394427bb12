"""
Promise 5 at random: whatever model, settings and failure are drawn, a step leaves what it should, bitwise.

After every micro-batch, whether it failed or not: each weight is where it was, in its own memory, no forward of a
block is replaced, `requires_grad` is as it was, and the random state is that of a plain pass. `.grad` holds after a
failure what a plain Trainer would have; else what a step has that replays nothing and, in float64, the reference.
"""

import copy
import functools
import random
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from faulty import STEPS, Case, Injected, Net, cases, places, tokens
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tiny import without_replay
from torch import nn

from hf_lsam import LSAMConfig, reference
from hf_lsam.blocks import find_blocks
from hf_lsam.step import LSAMStep
from hf_lsam_recipes.studies.soak_twin import Seeded


class Run:
    """A model with its steps; copies of it continue from its current state."""

    def __init__(self, case: Case):
        torch.manual_seed(case.seed)
        self.case = case
        fault = replace(case.fault, fired=case.fault.kind == "none")
        self.model = Net(case.blocks, case.dropout, case.tied, fault).to(case.dtype).train()
        for name in case.frozen:
            self.model.get_parameter(name).requires_grad_(False)
        self.step = LSAMStep(self.model, LSAMConfig(**case.config), STEPS)
        if case.checked:
            self.step.second_pass.is_due = lambda *args: False

    def pass_over(self, number: int, micro_batch: int, in_pass: int = 1) -> torch.Tensor:
        """A pass as the Trainer makes it."""
        self.model.fault.now = (number, micro_batch, in_pass)
        loss = self.model(tokens(self.case, number, micro_batch)).loss / self.case.accumulation
        loss.backward()
        return loss.detach()

    def micro_batch(self, number: int, micro_batch: int) -> None:
        """Both passes of a micro-batch, as far as the settings ask for them."""
        pass_1, pass_2 = (functools.partial(self.pass_over, number, micro_batch, in_pass) for in_pass in (1, 2))
        self.step(pass_1, pass_2, number, micro_batch == self.case.accumulation - 1)

    def gradients(self) -> list[torch.Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]


def copy_of(run: Run) -> Run:
    """A copy with the same modules and global variables."""
    shared = [
        part for module in [*sys.modules.values()] if module for part in (module, getattr(module, "__dict__", 0))
    ]
    return copy.deepcopy(run, {id(part): part for part in shared})


def without_replay_of(run: Run) -> Run:
    """A copy of a run that replays nothing from here on."""
    clean = copy_of(run)
    without_replay(clean.step)
    for parameter, gradient in zip(clean.model.parameters(), run.gradients(), strict=True):
        parameter.grad = gradient
    return clean


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a step must leave as it is."""
    return {
        "bits": [p.detach().clone() for p in model.parameters()],
        "places": places(model),
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "forwards": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "host": (random.getstate(), np.random.get_state()[1].tolist()),
    }


def assert_left_alone(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert same(after.pop("bits"), before["bits"])
    for name, value in after.items():
        assert value == before[name], name


def same(left: list, right: list) -> bool:
    """Bitwise, where a NaN is a NaN."""
    return all(
        one is other or (one is not None and other is not None and torch.equal(one.nan_to_num(7), other.nan_to_num(7)))
        for one, other in zip(left, right, strict=True)
    )


def near(left: list, right: list) -> bool:
    """But for the last bits of other kernels."""
    shares = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}
    return all(
        one is other or float((one - other).norm()) <= shares[one.dtype] * float(other.norm()) + 1e-30
        for one, other in zip(left, right, strict=True)
    )


def added(totals: list, gradients: list) -> list:
    pairs = zip(totals, gradients, strict=True)
    return [new if old is None else old if new is None else old + new for old, new in pairs]


def literal(run: Run, number: int, states: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """The gradient of a step of two passes by the reference."""
    config, model = run.step.config, run.model
    seeded = Seeded(model)
    batches = [{"inputs": {"tokens": tokens(run.case, number, i)}, "state": state} for i, state in enumerate(states)]
    blocks = [list(block.parameters()) for block in find_blocks(model).values()]
    rule = (reference.last if config.block_selection == "last" else reference.top_k)(
        config.num_perturbed_blocks or len(blocks)
    )
    if config.block_selection == "all":
        blocks, rule = [reference.trainable(model)], reference.top_k(1)
    if config.is_perturbed(number, STEPS):
        parts = [batches] if config.sharpness_scope == "batch" else [[batch] for batch in batches]
        options = (blocks, config.rho, config.alpha, rule, config.adaptive)
        climbed = [reference.lsam_gradient(seeded, part, *options) for part in parts]
        mixed = {p: torch.stack([part[p] for part in climbed]).mean(0) for p in climbed[0]}
    else:
        mixed = reference.gradient(seeded, batches)
    return [mixed.get(p) for p in model.parameters()]


def fail(*args) -> None:
    raise Injected


def raises(call, *args) -> bool:
    """Whether what was injected came through."""
    try:
        call(*args)
    except (Injected, KeyboardInterrupt):
        return True
    return False


@pytest.mark.parametrize("kind", ["error", "interrupt", "nan", "inf", "none"])
@settings(derandomize=True, deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_step_leaves_what_it_should_whatever_happens(kind, data):
    case = data.draw(cases(kind))
    run = Run(case)
    one_pass = run.step.config.ascent_gradient == "previous"
    has_literal = case.dtype == torch.float64 and not one_pass and case.config["block_selection"] != "budget"
    has_literal = has_literal and run.step.config.reuse_correction == 0
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    before = snapshot(run.model)
    for number in range(STEPS):
        start, clean = copy_of(run), without_replay_of(run)
        moves_at_once = one_pass and run.step.previous is not None
        states, faulty = [], False
        for micro_batch in range(case.accumulation):
            fault, totals, state = run.model.fault, run.gradients(), torch.get_rng_state()
            states.append(state)
            fault.places, had_fired = places(run.model), fault.fired
            raised = raises(run.micro_batch, number, micro_batch)
            after, fires = torch.get_rng_state(), fault.fired and not had_fired
            faulty |= fires
            assert_left_alone(run.model, before)
            if fires:
                event(f"{fault.kind}, {fault.where}, pass {fault.in_pass}, {'raises' * raised or 'goes on'}")

            # What a plain Trainer would have now.
            plain = copy_of(start)
            plain.model.fault.fired = not (fires and fault.in_pass == 1)
            torch.set_rng_state(state)
            plain_raised = raises(plain.pass_over, number, micro_batch)
            if not moves_at_once:
                assert torch.equal(torch.get_rng_state(), after)
            if raised:
                assert plain_raised == (fault.in_pass == 1)
                # The gradient of pass 1 may be gone where that of pass 2 was to be.
                gone = fault.in_pass == 2 and run.step.frees_gradients
                expected = added(totals, plain.gradients())
                for left, total, whole in zip(run.gradients(), totals, expected, strict=True):
                    assert moves_at_once or same([left], [whole]) or (gone and (left is None or same([left], [total])))
                return

            # What a step without replay has. Where pass 2 fails once, another one takes its place, in full and perhaps
            # for all weights, whose last bits may differ; or it is left out.
            in_second = fires and fault.in_pass == 2
            clean.model.fault.fired = not fires or in_second
            torch.set_rng_state(state)
            clean.micro_batch(number, micro_batch)
            assert torch.equal(torch.get_rng_state(), after)
            left_out = bool(run.step.log.pending) and not run.step.log.pending[-1].applied
            if fires and left_out:
                assert same(run.gradients(), added(totals, plain.gradients()))
            elif in_second:
                assert near(run.gradients(), clean.gradients())
            else:
                assert same(run.gradients(), clean.gradients())
            if in_second:
                clean = without_replay_of(run)
        torch.set_rng_state(after)
        if has_literal and not faulty:
            start.model.fault.fired = True
            for gradient, exact in zip(run.gradients(), literal(start, number, states), strict=True):
                assert (gradient is None) == (exact is None)
                assert gradient is None or torch.allclose(gradient, exact, rtol=1e-9, atol=1e-12)
            torch.set_rng_state(after)
        if not all(gradient is None or bool(gradient.isfinite().all()) for gradient in run.gradients()):
            return
        if case.optimizer_fails and number == STEPS - 1:
            optimizer.register_step_pre_hook(fail)
            assert raises(optimizer.step)
            assert_left_alone(run.model, before)
            return
        optimizer.step()
        optimizer.zero_grad()
        before = snapshot(run.model)
