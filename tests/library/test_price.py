"""`max_overhead`: an account that steps pay into, and perturbations are paid from."""

import random
from dataclasses import replace

import pytest
import ranks_price
import torch
from launching import launch
from situations import Net, Situation, make
from tiny import Examples, assert_equal, bert, training_lines, weights
from torch.utils.flop_counter import FlopCounterMode

from hf_lsam import LSAM, LSAMConfig, LSAMTrainer, reference
from hf_lsam.account import Account

SELECTIONS = {
    "all": dict(block_selection="all"),
    "top_k": dict(block_selection="top_k", num_perturbed_blocks=2),
    "last": dict(block_selection="last", num_perturbed_blocks=8),
}
PRICES = [0.1, 0.2, 0.5]


class Large(Situation):
    """A net of twelve blocks, in which next to all operations are those of its weights."""

    new = staticmethod(lambda: Net(12, width=16))
    data = Examples(64)


def perturbed(trainer) -> list[int]:
    return [line["step"] - 1 for line in training_lines(trainer) if line.get("lsam/active")]


def costs(trainer) -> list[float]:
    return [line["lsam/overhead"] for line in training_lines(trainer)]


@pytest.mark.parametrize("seed", range(200))
def test_the_account_perturbs_the_steps_of_the_reference(seed):
    draw = random.Random(seed)
    steps, price = draw.randint(1, 60), draw.choice([0.05, 0.1, 1 / 3, 0.5, draw.random() + 1e-3, 1.5])
    start, interval = draw.choice([0.0, 0.1, 0.5, 0.8]), draw.choice([1, 1, 2, 4])
    config = LSAMConfig(
        max_overhead=price,
        perturb_start=start,
        perturb_end=draw.choice([1.0, start + 0.2]),
        perturb_interval=interval,
    )
    known, expected = [draw.uniform(0.2, 1) for _ in range(steps)], draw.uniform(0.2, 1)
    account, chosen = Account(Account.terms_of(config), 0, expected), []
    for step in config.perturbed_steps(steps):
        if account.affords(step, config, steps):
            chosen.append(step)
            account = account.after(known[step])
    assert chosen == reference.priced_steps(price, steps, config.perturbed_steps(steps), expected, known)
    assert account.spent == pytest.approx(sum(known[step] for step in chosen))
    assert account.spent <= price * steps + 1


def test_sam_at_a_fifth_of_its_cost_is_every_fifth_step(tmp_path):
    trainer = make(Large, tmp_path, dict(block_selection="all", max_overhead=0.2), max_steps=20)
    trainer.train()
    assert perturbed(trainer) == [4, 9, 14, 19]
    assert sum(costs(trainer)) == pytest.approx(4)


class Half(Large):
    new = staticmethod(lambda: Net(6, width=16))


def flops(folder, config, steps) -> int:
    """All operations of a run; what compares passes 2 with passes 1 at its beginning is a part of them."""
    trainer = make(Half, folder, config, max_steps=steps, logging_steps=steps)
    with FlopCounterMode(display=False) as counter:
        trainer.train()
    return counter.get_total_flops()


STEPS = 150


@pytest.fixture(scope="module")
def plain_flops(tmp_path_factory):
    return flops(tmp_path_factory.mktemp("plain"), None, STEPS)


@pytest.mark.parametrize("price", PRICES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_price_is_kept_in_measured_operations(selection, price, plain_flops, tmp_path):
    # Three of six blocks cost at least half of a step, whichever these are.
    count = 4 if selection == "last" else 3
    config = SELECTIONS[selection] | dict(max_overhead=price, rho=0.05, num_perturbed_blocks=count)
    assert flops(tmp_path, config, STEPS) / plain_flops - 1 == pytest.approx(price, abs=0.02)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("window", [{}, dict(perturb_start=0.3, perturb_end=0.9), dict(perturb_interval=3)])
def test_steps_are_those_of_the_reference_at_the_costs_that_ran(selection, window, tmp_path):
    config = SELECTIONS[selection] | window | dict(max_overhead=0.3, rho=0.05)
    trainer = make(Large, tmp_path, config, max_steps=40)
    trainer.train()
    may, ran = LSAMConfig(**config).perturbed_steps(40), costs(trainer)
    # Of equal blocks of N = 12, k from block s on: (2 (N - s) + k) / (3 N), the dearest for `top_k`.
    expected = {"all": 1.0, "top_k": 0.72, "last": 0.67}[selection]
    literal = reference.priced_steps(0.3, 40, may, expected, ran)
    assert perturbed(trainer) == literal and len(literal) >= 8
    assert sum(ran) <= 0.3 * 40 + 0.2


def test_a_step_of_micro_batches_costs_their_mean(tmp_path):
    config = dict(block_selection="all", max_overhead=0.25, sharpness_scope="micro_batch", rho=0.05)
    trainer = make(Large, tmp_path, config, max_steps=12, gradient_accumulation_steps=2)
    trainer.train()
    assert perturbed(trainer) == [3, 7, 11]


def test_with_accumulation_a_step_is_decided_as_one(tmp_path):
    config = dict(block_selection="all", max_overhead=0.25, rho=0.05)
    trainer = make(Large, tmp_path, config, max_steps=12, gradient_accumulation_steps=3)
    trainer.train()
    assert perturbed(trainer) == [3, 7, 11]


class Zero(Large):
    """At steps 3 and 4 the gradient is zero."""

    def loss(self, model, batch, items):
        loss = model(**batch).loss
        return 0 * loss if self.state.global_step in (3, 4) else loss


def test_what_is_skipped_costs_nothing_and_is_made_up_for(tmp_path):
    config = dict(block_selection="all", max_overhead=0.25, rho=0.05)
    trainer = make(Zero, tmp_path, config, max_steps=12)
    trainer.train()
    assert perturbed(trainer) == [5, 7, 11]


def test_an_unlimited_price_is_none(tmp_path):
    runs = []
    for name, price in (("none", None), ("high", 2.0)):
        trainer = make(Large, tmp_path / name, dict(rho=0.1, max_overhead=price), max_steps=6)
        trainer.train()
        runs.append(weights(trainer.model))
    assert_equal(*runs)


def test_new_settings_in_a_run_open_a_new_account(tmp_path):
    """What was saved before is not spent at once."""
    trainer = make(Large, tmp_path, dict(block_selection="all", max_overhead=0.01), max_steps=30)
    step = trainer.training_step

    def training_step(*args, **kwargs):
        if trainer.state.global_step == 20:
            trainer.lsam_config = LSAMConfig(block_selection="all", max_overhead=0.5)
        return step(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    assert perturbed(trainer) == [21, 23, 25, 27, 29]


@pytest.mark.parametrize("in_place", [True, False])
def test_other_settings_may_change_at_each_step(in_place, tmp_path):
    """A schedule of rho leaves the account as it is."""
    trainer = make(Large, tmp_path, dict(block_selection="all", max_overhead=0.25), max_steps=12)
    step = trainer.training_step

    def training_step(*args, **kwargs):
        rho = 0.01 * (trainer.state.global_step + 1)
        if in_place:
            trainer.lsam_config.rho = rho
        else:
            trainer.lsam_config = replace(trainer.lsam_config, rho=rho)
        return step(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    assert perturbed(trainer) == [3, 7, 11]


def test_a_price_that_is_changed_in_place_opens_a_new_account(tmp_path):
    trainer = make(Large, tmp_path, dict(block_selection="all", max_overhead=0.01), max_steps=30)
    step = trainer.training_step

    def training_step(*args, **kwargs):
        if trainer.state.global_step == 20:
            trainer.lsam_config.max_overhead = 0.5
        return step(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    assert perturbed(trainer) == [21, 23, 25, 27, 29]


def test_a_run_that_resumes_without_a_state_begins_with_nothing_saved(tmp_path):
    options = dict(max_steps=20, save_strategy="steps", save_steps=10)
    make(Large, tmp_path, None, **options).train()
    trainer = make(Large, tmp_path, dict(block_selection="all", max_overhead=0.2), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert perturbed(trainer) == [14, 19]


@pytest.mark.parametrize("stop", [1, 2, 5, 8, 11])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_resumed_run_perturbs_the_same_steps(selection, stop, tmp_path):
    config = SELECTIONS[selection] | dict(max_overhead=0.3, rho=0.05)
    options = dict(max_steps=12, save_strategy="steps", save_steps=stop, save_only_model=False)
    whole = make(Large, tmp_path, config, **options)
    whole.train()
    resumed = make(Large, tmp_path, config, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert_equal(weights(whole.model), weights(resumed.model))
    assert perturbed(resumed) == perturbed(whole) and perturbed(whole)


def test_a_loop_has_the_same_account(tmp_path):
    def run(stop=None, folder=None):
        model = bert()
        lsam = LSAM(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            LSAMConfig(block_selection="all", max_overhead=0.25, rho=0.1),
            max_steps=12,
        )
        if folder:
            lsam.load(folder)
        steps = []
        for number in range(lsam.step, stop or 12):
            lsam.backward(lambda: model(**Examples(4).batch(0, 4)).loss)
            if lsam.log()["lsam/active"]:
                steps.append(number)
            if number + 1 == stop:
                lsam.save(tmp_path)
        return steps

    assert run() == [3, 7, 11]
    assert run(stop=6) == [3]
    assert run(folder=tmp_path) == [7, 11]


def test_looksam_fills_the_steps_between(tmp_path):
    config = dict(block_selection="all", max_overhead=0.25, reuse_correction=0.7, rho=0.1)
    with_it, without = (
        make(Large, tmp_path / name, config | dict(reuse_correction=scale), max_steps=6)
        for name, scale in (("with", 0.7), ("without", 0.0))
    )
    for trainer in (with_it, without):
        trainer.train()
        assert perturbed(trainer) == [3]
    assert not torch.equal(with_it.model.head.weight, without.model.head.weight)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch(ranks_price.__file__, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", ranks_price.CASES)
def test_processes_whose_passes_cost_differently_perturb_the_same_steps(case, launched):
    """The account pays the mean of what it costs them."""
    one, two = (each[case] for each in launched)
    assert one["costs"] != two["costs"]
    assert one["steps"] == two["steps"]
    expected, mean = one["expected"], [(a + b) / 2 for a, b in zip(one["costs"], two["costs"], strict=True)]
    literal = reference.priced_steps(ranks_price.PRICE, len(mean), range(len(mean)), expected, mean)
    assert one["steps"] == literal and 2 <= len(literal) < len(mean)
    assert_equal(one["weights"], two["weights"])


def test_a_price_for_nothing_is_refused():
    with pytest.raises(ValueError, match="has no second pass, so max_overhead has nothing to limit"):
        LSAMConfig(ascent_gradient="previous", max_overhead=0.2)


def test_a_run_too_short_for_its_price_is_told(tmp_path, caplog):
    trainer = LSAMTrainer(
        bert(),
        make(Large, tmp_path, None, max_steps=4).args,
        train_dataset=Examples(16),
        lsam_config=LSAMConfig(block_selection="all", max_overhead=0.1),
    )
    trainer.train()
    assert "No step of the 4 of this run is perturbed" in caplog.text and "max_overhead=0.1" in caplog.text
