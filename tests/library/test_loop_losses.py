"""`LSAM`: what a `compute_loss` may do, in either pass."""

import functools
from types import SimpleNamespace

import pytest
import torch
from tiny import Examples, assert_equal, bert, largest_difference, weights
from tiny_loop import loop
from torch import nn
from transformers import BatchEncoding

from hf_lsam import LSAM, LSAMConfig


def after(make_loss, batch_of=dict, steps=6):
    """Weights after some steps whose losses `make_loss(model, batch, lsam)` computes, three micro-batches each."""
    examples, model = Examples(steps * 12), bert(dropout=0.1).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    lsam = LSAM(model, optimizer, LSAMConfig(rho=0.1), max_steps=steps)
    torch.manual_seed(0)
    for number in range(steps * 3):
        compute_loss = make_loss(model, batch_of(examples.batch(number * 4, 4)), lsam)
        lsam.backward(compute_loss, is_last=number % 3 == 2)
        if number % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    return weights(model), lsam


def plainly(model, batch, lsam):
    return lambda: model(**batch).loss


def popping(model, batch, lsam):
    def compute_loss():
        labels = batch.pop("labels")
        batch["input_ids"].sub_(1)
        return nn.functional.cross_entropy(model(**batch).logits, labels)

    return compute_loss


def popping_a_default(model, batch, lsam):
    """What linters ask for in a loop."""
    return lambda batch=batch: nn.functional.cross_entropy(model(batch["input_ids"]).logits, batch.pop("labels"))


def without_attention_mask(model, batch, lsam):
    return lambda: model(batch["input_ids"], labels=batch["labels"]).loss


def without_popping(model, batch, lsam):
    batch["input_ids"].sub_(1)
    return plainly(model, batch, lsam)


@pytest.mark.parametrize("batch_of", [dict, BatchEncoding])
def test_labels_may_be_popped_and_batches_changed(batch_of):
    (popped, lsam), (plain, _) = after(popping, batch_of), after(without_popping)
    assert_equal(popped, plain)
    assert lsam.log()["lsam/skipped"] == 0


def test_a_batch_may_be_a_default():
    (popped, lsam), (plain, _) = after(popping_a_default), after(without_attention_mask)
    assert_equal(popped, plain)
    assert lsam.log()["lsam/skipped"] == 0


def test_what_a_loss_counts_counts_once():
    counts, meter = [], SimpleNamespace(seen=0)

    def counting(model, batch, lsam):
        def compute_loss(extra):
            counts.append(lsam.in_second_pass)
            meter.seen += extra
            return model(**batch).loss * (1 + meter.seen / 100)

        return functools.partial(compute_loss, 2)

    after(counting)
    assert counts == [False] * 18 and meter.seen == 36


SCRIPT = """
scale = 0.0

def forward():
    global scale
    scale += 0.01
    return model(labels=batch.pop('labels'), **batch).loss * (1 + scale)

lsam = LSAM(model, optimizer, LSAMConfig(rho=0.1), max_steps=4)
for number in range(12):
    batch = examples.batch(number * 4, 4)
    lsam.backward(lambda: forward(), is_last=number % 3 == 2)
    if number % 3 == 2:
        optimizer.step()
        optimizer.zero_grad()
"""


def test_variables_of_a_script_are_those_of_pass_1():
    """Pass 2 of the first micro-batch runs when `batch` is the third one; a function's variables are as a script's."""
    results = []
    for script in (
        SCRIPT,
        "def main():\n" + SCRIPT.replace("\n", "\n    ").replace("global", "nonlocal") + "\nmain()",
    ):
        model = bert().train()
        names = dict(LSAM=LSAM, LSAMConfig=LSAMConfig, model=model, examples=Examples(48))
        names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.05)
        exec(script, names)
        results.append(weights(model))
        assert script is not SCRIPT or names["scale"] == pytest.approx(0.12)
    assert_equal(*results)
    plain, scales = bert().train(), iter(range(1, 13))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    lsam = LSAM(plain, optimizer, LSAMConfig(rho=0.1), max_steps=4)
    for number in range(12):
        batch, scale = Examples(48).batch(number * 4, 4), next(scales)
        loss = functools.partial(lambda batch, scale: plain(**batch).loss * (1 + 0.01 * scale), batch, scale)
        lsam.backward(loss, is_last=number % 3 == 2)
        if number % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert largest_difference(results[0], weights(plain)) < 1e-6


def test_an_error_in_pass_2_leaves_the_plain_gradient():
    def failing(model, batch, lsam):
        def compute_loss():
            if lsam.in_second_pass:
                raise ValueError("a test's own")
            return model(**batch).loss

        return compute_loss

    failed, lsam = after(failing)
    assert lsam.log()["lsam/skipped"] == 6 and not lsam.in_second_pass

    def plain_loop(model, batch, lsam):
        vars(lsam)["_lsam"].config = LSAMConfig(rho=0)
        return plainly(model, batch, lsam)

    plain, _ = after(plain_loop)
    assert_equal(failed, plain)


def test_an_error_in_pass_1_is_the_callers_and_the_step_can_be_taken_again():
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    lsam = LSAM(model, optimizer, LSAMConfig(rho=0.1), max_steps=2)
    before = weights(model)
    with pytest.raises(ZeroDivisionError):
        lsam.backward(lambda: torch.tensor(1 / 0))
    assert lsam.step == 0
    assert_equal(weights(model), before)
    loop(model, optimizer, lsam, Examples(8), 2)
    assert lsam.step == 2 and lsam.log()["lsam/perturbation_norm"] == pytest.approx(0.1)


def test_a_file_that_both_passes_write_is_warned_about(tmp_path, caplog):
    """By what the loop has, and not once it is guarded."""
    with open(tmp_path / "log.txt", "w") as file:

        def writing(model, batch, lsam, always=True):
            def compute_loss():
                if always or not lsam.in_second_pass:
                    file.write("a line\n")
                return model(**batch).loss

            return compute_loss

        after(functools.partial(writing, always=False), steps=1)
        assert "in_second_pass" not in caplog.text
        after(writing, steps=1)
    assert "Change it in pass 1 only: if not lsam.in_second_pass." in caplog.text
    assert "trainer" not in caplog.text
