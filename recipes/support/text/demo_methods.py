"""The methods and settings of the demo, the expected duration of its runs, and its table of results."""

from statistics import fmean
from typing import Any

from hf_lsam_recipes.support.text.demo_assets import Splits

SPLITS = Splits(train=400, validation=1000, test=2000, flipped=0.3)
TRAINING: dict[str, Any] = {
    "max_seq_length": 32,
    "max_eval_samples": 300,
    "num_train_epochs": 5,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 50,
    "learning_rate": 5e-5,
    "warmup_steps": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 0.25,
    "logging_steps": 10,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
STEPS = SPLITS.train // TRAINING["per_device_train_batch_size"] * TRAINING["num_train_epochs"]
# SAM at every 4th step is as recommended, and not tuned. Of the others, learning rate and rho are the best of four for
# each method, on the validation part with the seeds 10 and 11: see studies/evidence/demo.yaml and
# results/demo_tuning.csv. The same learning rate was best for all of them. The new head has hardly learned anything in
# the first third of the training, so they perturb after that. `last` with 2 blocks has an overhead of 0.34 in a
# perturbed step, and so of 0.24 over the training.
METHODS: dict[str, dict[str, Any]] = {
    "AdamW": {"block_selection": "none"},
    "SAM at every 4th step": {"block_selection": "all", "perturb_interval": 4, "rho": 0.1, "perturb_start": 0.1},
    "LSAM, last 2 blocks": {
        "block_selection": "last",
        "num_perturbed_blocks": 2,
        "rho": 0.15,
        "perturb_start": 0.3,
    },
    "SAM": {"block_selection": "all", "rho": 0.02, "perturb_start": 0.3},
    "LSAM, the paper's rule": {
        "block_selection": "top_k",
        "num_perturbed_blocks": 2,
        "rho": 0.15,
        "perturb_start": 0.3,
    },
}
# Seconds of a run on one CPU core: the mean training time of studies/results/demo.json, plus 20 for start and test.
# For SAM at every 4th step, the former is AdamW's, times the ratio of demo_every_4th.json.
SECONDS = {
    "AdamW": 75,
    "SAM at every 4th step": 90,
    "LSAM, last 2 blocks": 85,
    "SAM": 115,
    "LSAM, the paper's rule": 95,
}
# Columns of the table that is printed.
ON_CONSOLE = ("method", "test accuracy, %", "training time", "median step")


def table(runs: list[dict[str, Any]]) -> str:
    """
    The results as a Markdown table: mean and range over the seeds, times as ratios to the first method.

    Args:
        runs (`list[dict]`): The results of `demo.read_run`. Ratios are between runs with the same seed.
    """
    methods = list(dict.fromkeys(run["method"] for run in runs))
    plain = {run["seed"]: run for run in runs if run["method"] == methods[0]}
    titles = [
        "method",
        "settings",
        "test accuracy, %",
        "test loss",
        "training time",
        "median step",
        "peak memory, MiB",
    ]
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for method in methods:
        own = [run for run in runs if run["method"] == method]
        cells = [
            method,
            _settings(METHODS.get(method, {})),
            _mean_and_range([100 * run["test_accuracy"] for run in own], "{:.1f}"),
            _mean_and_range([run["test_loss"] for run in own], "{:.3f}"),
            *(
                _mean_and_range([run[time] / plain[run["seed"]][time] for run in own], "{:.2f}x")
                for time in ("training_seconds", "step_seconds")
            ),
            _mean_and_range([run["peak_memory_mib"] for run in own], "{:.0f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def on_console(markdown: str) -> str:
    """Align the columns of a table made by `table`, and leave out settings, loss and memory."""
    titles, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines()]
    shown = [[row[titles.index(name)] for name in ON_CONSOLE] for row in (titles, *rows)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    return "\n".join(lines) + "\n"


def _settings(of_method: dict[str, Any]) -> str:
    short = {
        "block_selection": "",
        "num_perturbed_blocks": "k=",
        "perturb_start": "start=",
        "perturb_interval": "every=",
    }
    return ", ".join(f"{short.get(name, f'{name}=')}{value}" for name, value in of_method.items())


def _mean_and_range(values: list[float], form: str) -> str:
    mean = form.format(fmean(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"
