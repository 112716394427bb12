"""Curves from the results of a comparison: gradient norms, losses and perturbations over the steps of each run."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_lsam_recipes.support.comparison.plan import is_greater_better

Run = dict[str, Any]
Curve = dict[float, float]

MEASURED = "sharpness/gradient_norm/"


class ResultsError(Exception):
    """Results that are missing or not from `compare.py`; the message names the problem and the way out."""


@dataclass(frozen=True)
class TaskResults:
    """
    The compared runs of a task.

    Args:
        task (`str`): Its name.
        baseline (`str`): The method that the others are compared with.
        metric (`str`): Name of the compared metric.
        greater_is_better (`bool`): Whether higher is better.
        tuning_metric (`str` or `None`): Name of the metric that settings were chosen by; `None` without tuning.
        runs (`dict[str, list[dict]]`): Results by method, the baseline first, each sorted by seed. A method without a
            run of this task has an empty list.
    """

    task: str
    baseline: str
    metric: str
    greater_is_better: bool
    tuning_metric: str | None
    runs: dict[str, list[Run]]

    @property
    def seeds(self) -> list[int]:
        """The seeds of all methods together."""
        return sorted({run["seed"] for runs in self.runs.values() for run in runs})

    def measured(self) -> bool:
        """Whether gradient norms of all runs were measured on the same rows (`gradient_norm_steps`)."""
        return all(curve_of(run, f"{MEASURED}all") for runs in self.runs.values() for run in runs)


@dataclass(frozen=True)
class Band:
    """Mean and range over the seeds, at the places that all of them have."""

    places: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def read_results(folder: Path) -> list[TaskResults]:
    """
    Read the results in the output directory of `compare.py`.

    Raises:
        ResultsError: if it is not such a folder, or holds no compared run yet.
    """
    path = folder / "results.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        with (folder / "runs.csv").open(encoding="utf-8", newline="") as file:
            metrics = {(row["task"], row["stage"]): row["metric"] for row in csv.DictReader(file)}
        baseline = content["baseline"]
    except OSError as error:
        raise ResultsError(
            f"{folder} holds no report of compare.py ({error.filename} is missing): name its output_dir, or "
            "call it with --report_only to report the runs that have finished so far."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} and runs.csv were not written by compare.py: {error!r}.") from error
    if not content["runs"]:
        raise ResultsError(f"{path} holds no compared run yet.")
    found = []
    for task in dict.fromkeys(run["task"] for run in content["runs"]):
        own = sorted((run for run in content["runs"] if run["task"] == task), key=lambda run: run["seed"])
        methods = dict.fromkeys([baseline, *(run["method"] for run in content["runs"])])
        by_method = {method: [run for run in own if run["method"] == method] for method in methods}
        tuning_metric = metrics.get((task, "tuning"))
        metric = metrics[task, "compared"]
        # Older reports do not hold it.
        better = content.get("greater_is_better", {}).get(task, is_greater_better(metric))
        found.append(TaskResults(task, baseline, metric, better, tuning_metric, by_method))
    return found


def over_seeds(curves: Sequence[Mapping[float, float]]) -> Band:
    """Mean and range of curves, one per seed; empty without curves or without a place that all of them have."""
    places = sorted(set.intersection(*map(set, curves))) if curves else []
    if not places:
        return Band(*(np.array([]) for _ in range(4)))
    values = np.array([[curve[place] for place in places] for curve in curves])
    return Band(np.array(places), values.mean(0), values.min(0), values.max(0))


def curve_of(run: Run, name: str) -> Curve:
    """A logged value, such as `loss` or `eval_accuracy`, by step."""
    return {line["step"]: line[name] for line in run["curve"] if name in line}


def whole_norms(run: Run, measured: bool) -> Curve:
    """
    The gradient norm of the whole model, by step.

    Args:
        run (`dict`): The result of a run.
        measured (`bool`): Whether to use the gradient of the plain loss, measured on the same rows in every run. If
            not, it is the norm that the Trainer logs: of the gradient that the optimizer received, which SAM computes
            at perturbed weights.
    """
    return curve_of(run, f"{MEASURED}all" if measured else "grad_norm")


def block_norms(run: Run, measured: bool) -> dict[str, Curve]:
    """
    The gradient norm of each block, by step, in the order of the blocks.

    Args:
        run (`dict`): The result of a run.
        measured (`bool`): As in [`whole_norms`]. If not, they are means over the perturbed steps between two log
            lines, which only layer-wise methods have.
    """
    if measured:
        prefixed = {name for line in run["curve"] for name in line if name.startswith(MEASURED)}
        names = sorted((name.removeprefix(MEASURED) for name in prefixed), key=_natural_order)
        return {name: curve_of(run, MEASURED + name) for name in names if name != "all"}
    norms: dict[str, Curve] = {}
    for row in run["blocks"]:
        for name, norm in row.get("norms", {}).items():
            norms.setdefault(name, {})[row["step"]] = norm
    return {name: curve for name, curve in norms.items() if name != "all"}


def block_names(runs: Sequence[Run]) -> list[str]:
    """The blocks that layer-wise methods selected from."""
    return list(
        dict.fromkeys(name for run in runs for row in run["blocks"] for name in row["counts"] if name != "all")
    )


def perturbation_counts(run: Run, blocks: Sequence[str]) -> list[int]:
    """How often each of `blocks` was perturbed in a run. Full SAM perturbs all of them in each perturbed step."""
    return [sum(row["counts"].get(name, row["counts"].get("all", 0)) for row in run["blocks"]) for name in blocks]


def _natural_order(name: str) -> list:
    """Sort key that puts `layer.2` before `layer.10`. The keys of the Trainer's log are sorted alphabetically."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
