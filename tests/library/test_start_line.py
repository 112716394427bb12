"""The line at the start of a training says what is then perturbed, at which steps, and at what cost."""

import logging
import re
import subprocess
import sys

import pytest
import torch
from tiny import Examples, arguments, bert, training_lines

from hf_lsam import LSAM, LSAMConfig, LSAMTrainer

LINE = re.compile(
    r"LSAM perturbs (?P<what>.+) with rho=(?P<rho>\S+), alpha=(?P<alpha>[\d.]+)(?P<adaptive>, adaptive)?, at "
    r"(?P<scope>each micro-batch of )?steps (?P<first>\d+) to (?P<last>\d+) of (?P<max_steps>\d+)"
    r"(?: \(1 in (?P<interval>\d+)\))?(?:, of which max_overhead=(?P<price>[\d.]+) pays for (?P<counts>[\d to]+))?\. "
    r"(?P<cost>.+)\."
)
STEPS = 10
TOP_2 = "the 2 of 4 blocks with the largest gradient norm"

# Settings, what is perturbed, at which steps (counted from 1), and the form of the predicted cost.
METHODS = {
    "SAM": (dict(rho=0.1, block_selection="all"), "all trainable parameters", range(1, 11), "{}"),
    "generalized SAM": (dict(alpha=0.8, block_selection="all"), "all trainable parameters", range(1, 11), "{}"),
    "ASAM": (dict(rho=0.5, adaptive=True), TOP_2, range(1, 11), "{} (last 2) to {} (first 2)"),
    "LookSAM": (
        dict(rho=0.1, block_selection="all", perturb_interval=4, reuse_correction=0.7),
        "all trainable parameters",
        range(1, 10, 4),
        "{}",
    ),
    "top 2": (dict(), TOP_2, range(1, 11), "{} (last 2) to {} (first 2)"),
    "every block": (dict(num_perturbed_blocks=None), "all 4 blocks", range(1, 11), "{}"),
    "late last 2": (dict(block_selection="last", perturb_start=0.25), "the last 2 of 4 blocks", range(4, 11), "{}"),
    "last half of a module": (
        dict(block_selection="last", num_perturbed_blocks=1, block_pattern=r".*\.attention", perturb_end=0.55),
        "the last 1 of 4 modules of block_pattern",
        range(1, 7),
        "{}",
    ),
    "SAM at every 3rd step": (
        dict(block_selection="all", perturb_interval=3, perturb_start=0.1),
        "all trainable parameters",
        range(2, 11, 3),
        "{}",
    ),
    "budget": (
        dict(block_selection="budget", num_perturbed_blocks=3, max_overhead=0.5),
        "up to 3 of 4 blocks",
        range(1, 11),
        "at most {}",
    ),
    "budget for all": (
        dict(block_selection="budget", num_perturbed_blocks=None, max_overhead=2),
        "up to 4 of 4 blocks",
        range(1, 11),
        "at most {}",
    ),
    "one pass": (dict(ascent_gradient="previous"), TOP_2, range(2, 11), None),
    "one pass, late": (dict(ascent_gradient="previous", perturb_start=0.4), TOP_2, range(5, 11), None),
    "micro-batch": (dict(sharpness_scope="micro_batch"), TOP_2, range(1, 11), "{} (last 2) to {} (first 2)"),
}


def start_lines(caplog) -> list[re.Match]:
    """The start lines among the records, which are complete and of level info."""
    records = [record for record in caplog.records if record.getMessage().startswith("LSAM perturbs")]
    assert {record.levelno for record in records} <= {logging.INFO}
    return [LINE.fullmatch(record.getMessage()) for record in records]


def run(folder, config, **options):
    options = dict(max_steps=STEPS, logging_steps=1) | options
    trainer = LSAMTrainer(
        model=bert(), args=arguments(folder, **options), train_dataset=Examples(80), lsam_config=config
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", list(METHODS))
def test_it_says_what_the_training_then_does(method, tmp_path, caplog):
    settings, what, steps, cost = METHODS[method]
    config = LSAMConfig(**settings)
    trainer = run(tmp_path, config, gradient_accumulation_steps=2)
    [line] = start_lines(caplog)
    assert line["what"] == what
    assert (float(line["rho"]), float(line["alpha"])) == (config.rho, config.alpha)
    assert bool(line["adaptive"]) == config.adaptive
    assert bool(line["scope"]) == (config.sharpness_scope == "micro_batch")

    perturbed = [logged for logged in training_lines(trainer) if logged["lsam/active"] == 1]
    assert [logged["step"] for logged in perturbed] == list(steps)
    assert (int(line["first"]), int(line["last"]), int(line["max_steps"])) == (steps[0], steps[-1], STEPS)
    assert int(line["interval"] or 1) == steps.step

    overheads = [logged["lsam/overhead"] for logged in perturbed]
    predicted = [float(number) for number in re.findall(r"\d\.\d\d", line["cost"])]
    if cost is None:
        assert line["cost"] == "There is no second pass" and not any(overheads)
        return
    form = cost.format(*(f"{number:.2f}" for number in predicted))
    each, _, average = line["cost"].partition(", and ")
    assert each == f"Predicted cost of pass 2: {form} of a plain step"
    assert bool(average) == (len(steps) < STEPS)
    if average:
        share = len(steps) / STEPS
        assert average == f"{predicted[-1]:.2f} on average"
        assert sum(overheads) / STEPS == pytest.approx(predicted.pop(), abs=0.005)
        assert predicted[0] * share == pytest.approx(sum(overheads) / STEPS, abs=0.01)
    if "to" in cost:
        assert predicted[0] < predicted[1]
        assert predicted[0] - 0.005 <= min(overheads) and max(overheads) <= predicted[1] + 0.005
    elif "at most" in cost:
        assert max(overheads) <= predicted[0] + 0.005 and predicted[0] <= min(config.max_overhead, 1)
    else:
        assert overheads == pytest.approx([predicted[0]] * len(steps), abs=0.005)


def test_the_range_of_equal_blocks_is_the_formula(caplog):
    """(2 (N - s) + k) / (3 N) for k of N blocks from block s on, without a head: 2 of 4 cost from 6/12 to 10/12."""
    model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(4)])
    LSAM(model, torch.optim.SGD(model.parameters()), LSAMConfig(), max_steps=8)
    [line] = start_lines(caplog)
    assert line["cost"] == "Predicted cost of pass 2: 0.50 (last 2) to 0.83 (first 2) of a plain step"


def test_the_average_of_a_range_is_a_range(caplog):
    model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(4)])
    LSAM(model, torch.optim.SGD(model.parameters()), LSAMConfig(perturb_interval=2), max_steps=8)
    [line] = start_lines(caplog)
    costs = "0.50 (last 2) to 0.83 (first 2) of a plain step, and 0.25 to 0.42 on average"
    assert line["cost"] == f"Predicted cost of pass 2: {costs}"


@pytest.mark.parametrize(
    "settings, price, counts",
    [
        (dict(block_selection="all", max_overhead=0.2), "0.2", "2"),
        (dict(block_selection="all", max_overhead=0.2, perturb_start=0.8), "0.2", "2"),
        (dict(block_selection="last", max_overhead=3), "3", "10"),
        (dict(block_selection="top_k", max_overhead=0.3), "0.3", "3 to 5"),
    ],
)
def test_a_price_says_how_many_steps_it_pays_for(settings, price, counts, tmp_path, caplog):
    trainer = run(tmp_path, LSAMConfig(**settings))
    [line] = start_lines(caplog)
    assert (line["price"], line["counts"]) == (price, counts)
    assert "average" not in line["cost"]
    few, many = int(counts.split()[0]), int(counts.split()[-1])
    assert few <= sum(logged["lsam/active"] for logged in training_lines(trainer)) <= many


@pytest.mark.parametrize("off", [dict(rho=0), dict(alpha=0), dict(block_selection="none")])
def test_off_says_nothing(off, tmp_path, caplog):
    model = run(tmp_path, LSAMConfig(**off)).model
    LSAM(model, torch.optim.SGD(model.parameters()), LSAMConfig(**off), max_steps=STEPS)
    assert not start_lines(caplog)


def test_it_is_said_once_a_training_also_when_it_resumes(tmp_path, caplog):
    trainer = run(tmp_path, LSAMConfig(perturb_start=0.5), save_strategy="steps", save_steps=7)
    assert len(start_lines(caplog)) == 1
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    first, resumed = start_lines(caplog)
    assert resumed.group() == first.group() and resumed["first"] == "6"


def test_other_processes_than_the_main_one_say_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(LSAMTrainer, "is_world_process_zero", lambda self: False)
    run(tmp_path, LSAMConfig(), max_steps=1)
    assert not start_lines(caplog)


def test_a_loop_is_told_as_a_trainer_is(tmp_path, caplog):
    config = LSAMConfig(block_selection="last", perturb_start=0.25)
    model = run(tmp_path, config).model
    LSAM(model, torch.optim.SGD(model.parameters()), config, max_steps=STEPS)
    trainer, loop = start_lines(caplog)
    assert loop.group() == trainer.group()


SCRIPT = """
import logging, sys
{before}
from hf_lsam import LSAM, LSAMConfig
import torch
{after}
model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(3)])
LSAM(model, torch.optim.SGD(model.parameters()), LSAMConfig(), max_steps=8)
logging.getLogger("hf_lsam.loop").warning("a warning")
"""
QUIET = 'logging.getLogger("hf_lsam").setLevel(logging.WARNING)'


@pytest.mark.parametrize(
    "before, after, shows",
    [
        ("", "", True),
        ("logging.basicConfig(level=logging.INFO)", "", True),
        ("logging.warning('this configures logging')", "", True),
        ("", QUIET, False),
        (QUIET, "", False),
    ],
    ids=["plain", "configured", "configured by a warning", "quiet", "quiet before the import"],
)
def test_a_script_shows_it_once_unless_told_otherwise(before, after, shows):
    code = SCRIPT.format(before=before, after=after)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.count("LSAM perturbs the 2 of 3 blocks") == int(shows)
    assert result.stderr.count("a warning") == 1 and result.stdout == ""
