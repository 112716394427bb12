"""Promise 3 in whole steps: what a step leaves with replay is what it leaves without, also where replay fails."""

import random

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, TOKENS, batch_for, model_of
from tiny import assert_equal, bert, passes, random_states, without_replay

from hf_lsam import LSAMConfig
from hf_lsam.step import LSAMStep


def step_gradients(model, batch, replays, steps=1, **settings):
    """Loss and gradients of the last of some steps, with replay as it is or switched off."""
    run, take_gradients = passes(model, batch)
    step = LSAMStep(model, LSAMConfig(rho=0.1, **{"block_selection": "last", **settings}), max_steps=steps)
    if not replays:
        without_replay(step)
    torch.manual_seed(7)
    for number in range(steps):
        loss = step(run, run, step=number, is_last=True)
        gradients = take_gradients()
    return step, loss, gradients


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "deberta-v2"])
def test_a_step_with_replay_equals_one_without(name):
    model, batch = model_of(name), batch_for(name)
    step, loss, gradients = step_gradients(model, batch, replays=True)
    _, full_loss, full_gradients = step_gradients(model, batch, replays=False)
    assert step.second_pass.replays and (step.second_pass.checked is not None) == step.second_pass.drops
    assert torch.equal(loss, full_loss)
    assert_equal(gradients, full_gradients)


def test_a_pass_2_that_rounds_otherwise_is_right():
    """As where a weight without a gradient makes `torch.matmul` choose another kernel."""
    model, batch = bert(dropout=0.1).train(), {"input_ids": TOKENS, "labels": torch.tensor([0, 1])}
    run, _ = passes(model, batch)
    step = LSAMStep(model, LSAMConfig(rho=0.1, block_selection="last"), max_steps=3)
    for number in range(3):
        step(run, lambda: run() * (1 + 2**-22), step=number, is_last=True)
    assert step.second_pass.replays and step.second_pass.narrow and step.second_pass.checked


def test_mixture_of_experts_falls_back_to_a_full_pass(caplog):
    model_class, config, *_ = ARCHITECTURES["mixtral"]
    config.output_router_logits = True
    model, batch = model_class(config).train(), batch_for("mixtral")
    # Without the outputs that nothing should read in the first step, and with all of them in the second.
    step, loss, gradients = step_gradients(model, batch, replays=True, steps=2)
    _, full_loss, full_gradients = step_gradients(model, batch, replays=False, steps=2)
    assert not step.second_pass.replays
    assert "Pass 2 of MixtralForCausalLM cannot be run by replay of block outputs" in caplog.text
    assert torch.equal(loss, full_loss)
    assert_equal(gradients, full_gradients)


def test_a_replay_that_fails_in_the_middle_is_run_in_full(caplog):
    model, batch = bert(dropout=0.1).train(), {"input_ids": TOKENS, "labels": torch.tensor([0, 1])}
    _, _, full = step_gradients(model, batch, replays=False)
    run, take_gradients = passes(model, batch)
    step = LSAMStep(model, LSAMConfig(rho=0.1, block_selection="last"), max_steps=1)
    step.second_pass.is_due = lambda *args: False
    torch.manual_seed(7)

    def changed_records():
        for micro_batch in step.window or window:
            output = next(call for call in micro_batch.recording.calls if call.kept).output
            # A tuple before transformers 5.0.
            (output[0] if isinstance(output, tuple) else output).add_(0.0)
        return run()

    window = []
    record = step.second_pass.record
    step.second_pass.record = lambda *args, **alone: window.append(record(*args, **alone)) or window[-1]
    step(run, changed_records, step=0, is_last=True)
    assert "changed in place" in caplog.text and not step.second_pass.checked
    assert_equal(take_gradients(), full)


def test_the_random_state_afterwards_is_that_of_pass_1():
    """Also where pass 2 draws more than pass 1 did, as a model may whose draws depend on its weights."""
    model, batch = bert(dropout=0.1).train(), {"input_ids": TOKENS, "labels": torch.tensor([0, 1])}
    run, _ = passes(model, batch)

    def draws_more():
        loss = run()
        torch.rand(1), random.random(), np.random.rand()
        return loss

    torch.manual_seed(7)
    run()
    after = random_states()
    model.zero_grad()
    torch.manual_seed(7)
    LSAMStep(model, LSAMConfig(rho=0.1), max_steps=1)(run, draws_more, step=0, is_last=True)
    assert random_states() == after
