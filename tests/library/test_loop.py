"""`LSAM`: a loop without a Trainer does what the Trainer does."""

from contextlib import nullcontext

import pytest
import torch
from test_right import METHODS, STEPS, optimizer_for
from tiny import MODELS, Examples, arguments, assert_equal, bert, largest_difference, weights
from tiny_loop import SETTINGS, Noting, loop
from torch import nn

from hf_lsam import LSAM, LSAMConfig


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name, optimizer", [("bert", "adamw"), ("llama", "sgd")])
@pytest.mark.parametrize("method", list(SETTINGS))
def test_is_the_trainer_bit_for_bit(method, name, optimizer, accumulation, tmp_path):
    steps, size, config = 6, 2, LSAMConfig(**SETTINGS[method])
    examples = Examples(steps * size * accumulation, language_model=name == "llama")
    theirs, ours = MODELS[name](dropout=0.1), MODELS[name](dropout=0.1)
    start = weights(ours)
    options = dict(max_steps=steps, max_grad_norm=0.0, logging_steps=steps, per_device_train_batch_size=size)
    trainer = Noting(
        model=theirs,
        args=arguments(tmp_path, gradient_accumulation_steps=accumulation, **options),
        train_dataset=examples,
        lsam_config=config,
        optimizers=(optimizer_for(optimizer, theirs), None),
    )
    # A mean over each micro-batch, as the loop has it.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()

    torch.set_rng_state(trainer.random)
    our_optimizer = optimizer_for(optimizer, ours)
    lsam = LSAM(ours, our_optimizer, config, max_steps=steps)
    loop(ours, our_optimizer, lsam, examples, steps, size, accumulation)
    assert_equal(weights(ours), weights(theirs))
    assert largest_difference(weights(ours), start) > 1e-4
    [line] = [line for line in trainer.state.log_history if "loss" in line]
    assert lsam.step == steps
    assert not config.enabled or lsam.log() == {key: value for key, value in line.items() if key.startswith("lsam/")}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["sam", "top 1, mixed", "looksam", "one pass, top 2", "budget"])
def test_equals_the_reference(method):
    settings, literal = METHODS[method]
    examples = Examples(STEPS * 4)
    fast, slow = bert(), bert()
    fast_optimizer, slow_optimizer = optimizer_for("adamw", fast), optimizer_for("adamw", slow)
    loop(fast, fast_optimizer, LSAM(fast, fast_optimizer, LSAMConfig(**settings), STEPS), examples, STEPS)
    literal_step = literal(slow, "bert")
    slow.train()
    for step in range(STEPS):
        literal_step(slow, [examples.batch(step * 4, 4)], slow_optimizer)
    assert largest_difference(weights(fast), weights(slow)) < 1e-12


# Gradient scaler


class Overflowing(nn.Module):
    """A model whose loss is infinite in pass 1 or pass 2 of one step."""

    def __init__(self, model, step, second_pass):
        super().__init__()
        self.model, self.step, self.second_pass = model, step, second_pass
        self.lsam: LSAM | None = None

    def forward(self, **batch):
        outputs = self.model(**batch)
        if self.lsam.step == self.step and self.lsam.in_second_pass == self.second_pass:
            outputs["loss"] = outputs["loss"] * torch.inf
        return outputs


@pytest.mark.parametrize("config", [LSAMConfig(rho=0.1), LSAMConfig(rho=0.1, sharpness_scope="micro_batch")])
def test_a_scaler_of_a_power_of_two_changes_nothing(config):
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12)):
        model = bert()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        lsam = LSAM(model, optimizer, config, max_steps=5, scaler=scaler)
        losses = loop(model, optimizer, lsam, Examples(60), 5, accumulation=3, scaler=scaler)
        results.append(weights(model) | {"losses": torch.stack(losses)})
    assert_equal(*results)


@pytest.mark.parametrize("second_pass", [False, True])
def test_a_scaler_skips_a_step_of_either_pass_that_overflows(second_pass):
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    wrapped = Overflowing(model, 2, second_pass)
    lsam = wrapped.lsam = LSAM(wrapped, optimizer, LSAMConfig(rho=0.1), max_steps=4, scaler=scaler)
    examples = Examples(16)
    loop(wrapped, optimizer, lsam, examples, 2, scaler=scaler)
    before = weights(model)
    loop(wrapped, optimizer, lsam, examples, 3, begin=2, scaler=scaler)
    assert_equal(weights(model), before)
    assert scaler.get_scale() == 2.0**11 and lsam.log()["lsam/skipped"] == 1
    loop(wrapped, optimizer, lsam, examples, 4, begin=3, scaler=scaler)
    assert largest_difference(weights(model), before) > 1e-4 and lsam.log()["lsam/active"] == 1


@pytest.mark.parametrize("accumulation", [1, 3])
def test_autocast_around_the_call_is_autocast_within(accumulation):
    """Autocast keeps the rounded weights until its end: those of pass 1 are not those of pass 2."""
    within, around = torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", torch.bfloat16)
    results = []
    for inner, outer in ((within, nullcontext()), (nullcontext(), around)):
        model = bert().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        lsam = LSAM(model, optimizer, LSAMConfig(rho=1.0), max_steps=3)
        wrapped = Within(model, inner)
        with outer:
            loop(wrapped, optimizer, lsam, Examples(12 * accumulation), 3, accumulation=accumulation)
        results.append(weights(model))
    assert_equal(*results)


class Within(nn.Module):
    """A model that is called within a context."""

    def __init__(self, model, context):
        super().__init__()
        self.model, self.context = model, context

    def forward(self, **batch):
        with self.context:
            return self.model(**batch)


@pytest.mark.parametrize("method", ["top 2", "looksam", "one pass, top 2", "none"])
def test_a_resumed_loop_is_the_uninterrupted_one(method, tmp_path):
    config, examples = LSAMConfig(**SETTINGS[method]), Examples(64)

    def make():
        model = bert(dropout=0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return model, optimizer, LSAM(model, optimizer, config, max_steps=8)

    model, optimizer, lsam = make()
    torch.manual_seed(0)
    loop(model, optimizer, lsam, examples, 5, size=2, accumulation=4)
    lsam.save(str(tmp_path))
    kept = weights(model)
    kept_optimizer, random = optimizer.state_dict(), torch.get_rng_state()
    torch.save(kept_optimizer, tmp_path / "optimizer.pt")
    loop(model, optimizer, lsam, examples, 8, size=2, accumulation=4, begin=5)

    other, other_optimizer, resumed = make()
    other.load_state_dict(kept)
    other_optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    torch.set_rng_state(random)
    resumed.load(str(tmp_path))
    assert resumed.step == 5
    loop(other, other_optimizer, resumed, examples, 8, size=2, accumulation=4, begin=5)
    assert_equal(weights(other), weights(model))
    assert resumed.log() == lsam.log() and resumed.step == 8


def test_a_loop_that_goes_on_after_max_steps_is_told_so_once(caplog):
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    lsam = LSAM(model, optimizer, LSAMConfig(rho=0.1), max_steps=2)
    loop(model, optimizer, lsam, Examples(16), 2)
    assert "max_steps" not in caplog.text
    loop(model, optimizer, lsam, Examples(16), 4, begin=2)
    assert caplog.text.count("runs more than the max_steps=2 optimizer steps that LSAM was given") == 1
    assert lsam.log()["lsam/active"] == 0.5


def test_log_begins_anew():
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    lsam = LSAM(model, optimizer, LSAMConfig(rho=0.1, perturb_end=0.5), max_steps=4)
    loop(model, optimizer, lsam, Examples(16), 2)
    assert lsam.log()["lsam/active"] == 1
    loop(model, optimizer, lsam, Examples(16), 4, begin=2)
    assert lsam.log() == {"lsam/overhead": 0, "lsam/active": 0, "lsam/skipped": 0}


def test_what_is_off_is_plain_and_needs_no_blocks():
    results = []
    for config in (None, LSAMConfig(rho=0), LSAMConfig(block_selection="none"), LSAMConfig(alpha=0)):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lsam = LSAM(model, optimizer, config, max_steps=3) if config else None
        for _ in range(3):
            rows = torch.randn(4, 3)
            if lsam is None:
                model(rows).square().mean().backward()
            else:
                lsam.backward(lambda: model(rows).square().mean())  # noqa: B023
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(model))
    for result in results[1:]:
        assert_equal(result, results[0])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("config", [dict(block_selection="last"), dict(block_selection="all"), dict(alpha=0.7)])
def test_a_step_that_the_loop_gives_up(config):
    """`zero_grad` after a micro-batch that is not the last one: it is no part of the next step."""
    ends = []
    for gives_up in (True, False):
        model, examples = bert(), Examples(32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lsam = LSAM(model, optimizer, LSAMConfig(rho=0.3, **config), max_steps=4)
        for step in range(3):
            if gives_up and step == 1:
                lsam.backward(lambda: model(**examples.batch(28, 4)).loss / 2, is_last=False)  # noqa: B023
                optimizer.zero_grad()
            for part in range(2):
                batch = examples.batch(8 * step + 4 * part, 4)
                lsam.backward(lambda: model(**batch).loss / 2, is_last=part == 1)  # noqa: B023
            optimizer.step()
            optimizer.zero_grad()
        ends.append(weights(model))
    assert_equal(*ends)
