"""What a step keeps in memory between its passes: nothing that pass 2 can do without."""

import weakref

import pytest
import torch
from tiny import VOCABULARY, assert_equal, bert, llama, t5
from torch import nn

from hf_lsam import LSAMConfig
from hf_lsam.step import LSAMStep

MICRO_BATCHES = [
    {"input_ids": torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))}
    for seed in range(3)
]


class ReadsAll(nn.Module):
    """A model whose loss reads what every block returned."""

    def __init__(self):
        super().__init__()
        self.bert = bert(dropout=0.1)

    def forward(self, input_ids, labels):
        output = self.bert(input_ids=input_ids, labels=labels, output_hidden_states=True)
        return {"loss": output["loss"] + sum(state.square().mean() for state in output["hidden_states"])}


MODELS = {"bert": bert, "llama": llama, "t5": t5, "reads all": ReadsAll}


def take(name, settings, replays=True, steps=2):
    """Steps of 3 micro-batches, each with the same weights; returns the step, and the gradients of each."""
    torch.manual_seed(0)
    model = MODELS[name]().train() if name == "reads all" else MODELS[name](dropout=0.1).train()
    step = LSAMStep(model, LSAMConfig(rho=0.1, **settings), max_steps=steps)
    step.second_pass.replays &= replays
    gradients = []
    torch.manual_seed(7)
    for number in range(steps):
        model.zero_grad()
        for place, batch in enumerate(MICRO_BATCHES):
            labels = torch.tensor([0, 1]) if name in ("bert", "reads all") else batch["input_ids"]

            def run(batch=batch, labels=labels):
                loss = model(**batch, labels=labels)["loss"]
                loss.backward()
                return loss.detach()

            step(run, run, number, place == len(MICRO_BATCHES) - 1)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return step, gradients


RULES = {
    "top": dict(num_perturbed_blocks=2),
    "last": dict(block_selection="last", num_perturbed_blocks=1),
    "budget": dict(block_selection="budget", max_overhead=0.6, num_perturbed_blocks=None),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_a_replay_with_dropped_records_equals_a_full_pass_2(name, rule):
    """Where the model reads what was dropped, that is found out, and all is kept from then on."""
    step, gradients = take(name, RULES[rule])
    _, full = take(name, RULES[rule], replays=False)
    for one, other in zip(gradients, full, strict=True):
        assert_equal(one, other)
    assert step.second_pass.replays
    assert step.second_pass.checked
    # Everything is kept at the first pass of all.
    assert step.second_pass.drops or name in ("t5", "reads all")


@pytest.mark.parametrize(
    "rule, alone, kept",
    [("last", True, {2}), ("last", False, {2}), ("top", True, {0, 1, 2}), ("top", False, {1})],
)
def test_outputs_that_no_replay_begins_with_take_no_memory(rule, alone, kept):
    """Of the last block only that of the one before it; of any, every second one in a window of several."""
    step, _ = take("bert", RULES[rule], steps=1)
    recording = step.second_pass.record(lambda: step.model(**MICRO_BATCHES[0]).logits.sum(), None, alone).recording
    for call in recording.calls:
        assert call.kept == (call.block in kept)
        # A tuple before transformers 5.0.
        output = call.output[0] if isinstance(call.output, tuple) else call.output
        with torch._C.DisableTorchFunctionSubclass():
            assert output.untyped_storage().nbytes() == (4 * output.numel() if call.kept else 4)


@pytest.mark.parametrize("settings", [dict(block_selection="all"), dict(num_perturbed_blocks=2), dict(alpha=0.5)])
def test_the_gradient_of_pass_1_is_freed_before_pass_2_where_it_is_that_of_all_weights(settings):
    """That of a few is kept: it takes the place of pass 2's where this is not finite, for which no host waits."""
    model = bert().train()
    selected, alive = [], []

    class Noting(LSAMStep):
        def _find_ascent(self):
            ascent = super()._find_ascent()
            selected.extend(weakref.ref(gradient) for gradient in ascent.gradients)
            return ascent

    def run():
        alive.append(sum(gradient() is not None for gradient in selected))
        loss = model(**MICRO_BATCHES[0], labels=torch.tensor([0, 1])).loss
        loss.backward()
        return loss.detach()

    Noting(model, LSAMConfig(rho=0.1, **settings), max_steps=1)(run, run, 0, True)
    assert alive[-1] == (0 if settings == dict(block_selection="all") else len(selected)) and selected


def test_a_pass_2_that_is_not_finite_leaves_the_freed_gradient_of_pass_1():
    model = bert(dropout=0.1).train()

    def run(factor=1.0):
        loss = model(**MICRO_BATCHES[0], labels=torch.tensor([0, 1])).loss
        (loss * factor).backward()
        return loss.detach()

    torch.manual_seed(7)
    run()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    runs = []

    def again():
        runs.append(True)
        return run(torch.nan if len(runs) == 2 else 1.0)

    torch.manual_seed(7)
    step = LSAMStep(model, LSAMConfig(rho=0.1, block_selection="all"), max_steps=1)
    step(run, again, 0, True)
    # At the weights, where pass 2 is compared with pass 1; at moved weights; and again at the weights.
    assert len(runs) == 3
    assert_equal({name: parameter.grad for name, parameter in model.named_parameters()}, plain)
