"""The step by itself, without a Trainer."""

import math

import pytest
import torch
from tiny import Examples, bert

from hf_lsam import LSAMConfig
from hf_lsam.step import LSAMStep


def run_step(step, model, factors, number=0):
    """One optimizer step's passes over one batch; `factors` scale the loss of each pass in turn."""
    batch, left = Examples(4).batch(0, 4), iter(factors)

    def run():
        loss = model(**batch).loss * next(left)
        loss.backward()
        return loss.detach()

    model.zero_grad()
    return step(run, run, step=number, is_last=True)


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_a_loss_scale_of_two_to_the_sixteen_changes_nothing():
    """As a gradient scaler has it: the direction is free of scale, so unscaled gradients are bitwise the same."""
    for config in (LSAMConfig(rho=0.3, alpha=0.5), LSAMConfig(rho=0.3, block_selection="all")):
        results = []
        for scale in (1.0, 2.0**16):
            model = bert().train()
            run_step(LSAMStep(model, config, 1, scaler=torch.amp.GradScaler("cpu")), model, [scale] * 3)
            results.append([gradient / scale for gradient in gradients(model)])
        assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


def test_a_scaler_sees_an_overflow_of_pass_2_and_nothing_of_it_is_reused():
    config = LSAMConfig(rho=0.3, block_selection="all", perturb_interval=2, reuse_correction=0.7)
    model = bert().train()
    step = LSAMStep(model, config, 2, scaler=torch.amp.GradScaler("cpu"))
    run_step(step, model, [1.0, math.inf])
    assert not all(bool(gradient.isfinite().all()) for gradient in gradients(model))
    assert step.log.line()["lsam/skipped"] == 1
    run_step(step, model, [1.0], number=1)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(model))


def test_an_overflow_of_pass_1_runs_no_pass_2():
    model = bert().train()
    step = LSAMStep(model, LSAMConfig(rho=0.3), 1, scaler=torch.amp.GradScaler("cpu"))
    run_step(step, model, [math.inf])
    assert not all(bool(gradient.isfinite().all()) for gradient in gradients(model))
    assert step.log.line()["lsam/skipped"] == 1


def test_micro_batches_left_over_from_a_step_whose_last_pass_failed_are_forgotten():
    model = bert().train()
    step = LSAMStep(model, LSAMConfig(rho=0.3), 2)

    def fail():
        raise torch.OutOfMemoryError

    run_step_done = []
    batch = Examples(4).batch(0, 4)

    def run():
        loss = model(**batch).loss
        loss.backward()
        run_step_done.append(1)
        return loss.detach()

    step(run, run, step=0, is_last=False)
    with pytest.raises(torch.OutOfMemoryError):
        step(fail, fail, step=0, is_last=True)
    model.zero_grad()
    run_step_done.clear()
    step(run, run, step=1, is_last=True)
    # Pass 1, the self-check and one pass 2.
    assert len(run_step_done) == 3
