"""The step by itself, without a Trainer."""

import math

import pytest
import torch
from tiny import Examples, assert_equal, bert, largest_difference, weights

from hf_lsam import LSAMConfig
from hf_lsam.ascent import Ascent, find_ascent
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
    # Pass 1; two full passes that pass 2 is compared with, at the weights and at the moved ones; and pass 2.
    assert len(run_step_done) == 4


def one_pass_step(model, micro_batches, fail_at=None):
    """Climbs in step 1 what step 0 left; returns that, where it was, the weights expected, and those of each pass."""
    step, batch = LSAMStep(model, LSAMConfig(rho=0.3, ascent_gradient="previous"), 3), Examples(4).batch(0, 4)
    climbed, seen, fails = [], [], []

    def run():
        if fails:
            raise fails.pop()
        loss = model(**batch).loss
        loss.backward()
        seen.append([(weight.data_ptr(), weight.detach().clone()) for weight in climbed])
        return loss.detach()

    step(run, run, step=0, is_last=True)
    kept = step.previous
    climbed.extend(kept.weights)
    seen.clear()
    expected = [torch.add(w, part, alpha=0.3 / kept.norm) for w, part in zip(climbed, kept.direction, strict=True)]
    memory = [part.data_ptr() for part in kept.direction]
    for number in range(micro_batches):
        if number == fail_at:
            fails.append(torch.OutOfMemoryError)
            with pytest.raises(torch.OutOfMemoryError):
                step(run, run, step=1, is_last=number == micro_batches - 1)
        step(run, run, step=1, is_last=number == micro_batches - 1)
    return kept, memory, expected, seen


@pytest.mark.parametrize("fail_at", [None, 0, 2])
def test_one_pass_moves_once_a_step_into_the_memory_of_what_it_climbs(fail_at):
    """To write the moved weights elsewhere takes twice as long; a pass that failed may be repeated."""
    kept, memory, expected, seen = one_pass_step(bert().train(), 3, fail_at)
    assert kept.moved_in_place and len(seen) == 3 and len(expected) > 10
    for places in seen:
        assert [address for address, _ in places] == memory
        assert all(torch.equal(w, e) for (_, w), e in zip(places, expected, strict=True))
        assert all(torch.equal(w, first) for (_, w), (_, first) in zip(places, seen[0], strict=True))


def test_what_cannot_be_overwritten_is_moved_elsewhere():
    """Weights of 16 bits are compared with their direction, and a gradient of 16 bits cannot hold wider weights."""
    kept, memory, _, seen = one_pass_step(bert().train().bfloat16(), 2)
    assert not kept.moved_in_place and [address for address, _ in seen[0]] != memory
    weight, part = torch.ones(3), torch.ones(3, dtype=torch.float16)
    ascent = Ascent([0], torch.tensor([3.0]), [1], torch.tensor(1.0), [weight], [], [part])
    ascent.move_in_place(0.5)
    assert not ascent.moved_in_place and torch.equal(part, torch.ones(3, dtype=torch.float16))


def test_an_interrupted_move_leaves_nothing_to_climb(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    model, done = bert().train(), []
    step, batch = LSAMStep(model, LSAMConfig(rho=0.3, ascent_gradient="previous"), 3), Examples(4).batch(0, 4)

    def run():
        model.zero_grad()
        model(**batch).loss.backward()
        done.append(weights(model))
        return torch.tensor(0.0)

    step(run, run, step=0, is_last=True)
    with monkeypatch.context() as patched:
        patched.setattr("hf_lsam.ascent.add_into", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(run, run, step=1, is_last=False)
    step(run, run, step=1, is_last=True)
    assert_equal(done[0], done[1])
    step(run, run, step=2, is_last=True)
    assert largest_difference(done[0], done[2]) > 0


def test_a_process_without_a_gradient_does_not_leave_the_others_waiting(monkeypatch):
    """With a perturbation for each micro-batch, a process may have none of the selected blocks in its own."""
    met = []
    monkeypatch.setattr("hf_lsam.ascent.is_distributed", lambda: True)
    monkeypatch.setattr("hf_lsam.ascent.average_over_ranks", lambda tensors: met.append(tensors) or tensors)
    model = bert()
    step = LSAMStep(model, LSAMConfig(sharpness_scope="micro_batch"), 1)
    assert isinstance(find_ascent(step.trained.now().candidates, step.costs, step.config, torch.device("cpu")), str)
    assert [tensor.tolist() for (tensor,) in met] == [[0.0] * 4]
