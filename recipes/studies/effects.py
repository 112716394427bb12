"""The effects of the methods of a comparison on several figures, by the rule of docs/evidence/flatness.md."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from hf_lsam_recipes.support.comparison.statistics import COSTS, Interval, mean_interval, t_test

# The figures by name, and their titles. Lower is better for losses and calibration errors.
FIGURES = {
    "predict_nll_scaled": "scaled loss on test data",
    "shift_nll_scaled": "scaled loss under shift",
    "predict_nll": "loss on test data",
    "shift_nll": "loss under shift",
    "predict_ece": "calibration error on test data",
    "predict_accuracy": "accuracy on test data",
    "shift_accuracy": "accuracy under shift",
    "predict_matthews_correlation": "Matthews correlation on test data",
    # Of `run_clm.py`
    "eval_loss": "loss on test data",
    "eval_neutral_loss": "loss on other text",
    "eval_int4_loss": "loss on test data with 4-bit weights",
    "eval_neutral_int4_loss": "loss on other text with 4-bit weights",
}
PRIMARY = ("predict_nll_scaled", "shift_nll_scaled", "eval_loss", "eval_neutral_loss")
BASELINE, FULL = "AdamW", "SAM"  # other baselines are called "AdamW, ..."
# The goal: at this training time or less, this share of SAM's effect, and no more than this loss of accuracy (of 1).
MAX_TIME, MIN_SHARE, MAX_LOSS = 1.25, 0.8, 0.005

Runs = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Effect:
    """
    The effect of a method on a figure of a task.

    Args:
        chosen (`str`): The settings that it chose.
        mean (`float`): Of the figure itself, over the seeds.
        differences (`list[float]`): To the baseline with the same seed.
        p (`float`): That their mean is zero, by Student's t and after Holm's correction for the number of methods.
        share (`float` or `None`): Of SAM's mean difference; `None` if the 95 % interval of that includes zero.
        time (`float`): Median of the ratios of the training time to that of the baseline with the same seed.
        flops (`float`): Mean of the same ratios of FLOPs.
    """

    chosen: str
    mean: float
    differences: list[float]
    p: float
    share: float | None
    time: float
    flops: float

    @property
    def interval(self) -> Interval:
        """The mean difference with its 95 % interval, not corrected."""
        return mean_interval(self.differences)

    @property
    def is_lower(self) -> bool:
        """Whether the figure is lower than the baseline's by the rule."""
        return self.p < 0.05 and fmean(self.differences) < 0


def read_runs(path: Path) -> list[dict[str, Any]]:
    """
    One row for each finished run: in the folder of a comparison, or in a CSV file with such rows.

    Raises:
        ValueError: if there is none, or a column is missing.
    """
    if path.is_dir():
        rows = [_row(json.loads(file.read_text(encoding="utf-8"))) for file in path.rglob("result.json")]
        if not rows:
            raise ValueError(f"{path} holds no finished run: there is no result.json in it.")
        return sorted(rows, key=lambda row: [row[name] for name in ("task", "method", "stage", "chosen", "seed")])
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    needed = ("task", "method", "chosen", "stage", "seed", "training_seconds", "flops")
    missing = [name for name in needed if name not in (rows[0] if rows else {})]
    if missing:
        raise ValueError(f"{path} holds no runs that `flatness.py --csv` wrote: it lacks {', '.join(missing)}.")
    return [dict.fromkeys(FIGURES, "") | row for row in rows]


def _row(result: dict[str, Any]) -> dict[str, Any]:
    row = {
        "task": result["task"],
        "method": result["method"],
        "chosen": " ".join(f"{name}={value}" for name, value in result["chosen"].items()),
        "stage": "tuning" if result["tuning"] else "compared",
        "seed": str(result["seed"]),
    }
    metrics = result["metrics"]
    of_language_model = "eval_perplexity" in metrics  # a classifier's `eval_loss` is that of held-out training data
    # As in the runs.csv of a comparison.
    metric = "eval_loss" if of_language_model else "eval_nll_scaled" if result["tuning"] else "predict_nll_scaled"
    row |= {"metric": metric, "value": metrics[metric]}
    figures = [name for name in FIGURES if name.startswith("eval_") == of_language_model]
    row |= dict.fromkeys(FIGURES, "") | {name: metrics.get(name, "") for name in (*figures, "train_loss")}
    row |= {name: result[name] for name in (*COSTS, "commit", "machine")}
    versions = " ".join(f"{name}={version}" for name, version in result["versions"].items())
    return row | {"versions": versions}


def by_task(runs: Runs) -> dict[str, Runs]:
    """The compared runs of each task."""
    tasks: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if run["stage"] == "compared":
            tasks.setdefault(run["task"], []).append(run)
    return dict(tasks)


def has(runs: Runs, figure: str) -> bool:
    """Whether all of `runs` have a finite value of this figure."""
    return all(run[figure] != "" and math.isfinite(float(run[figure])) for run in runs)


def holm(p_values: Sequence[float]) -> list[float]:
    """
    P-values after the correction for their number (Holm, 1979).

    The k-th smallest of n, from k = 0 on, is multiplied by n - k. None is below that of a smaller one, or above 1.
    """
    order = np.argsort(p_values)
    corrected = np.maximum.accumulate(np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)).clip(max=1)
    return corrected[np.argsort(order)].tolist()


def p_value(differences: Sequence[float]) -> float:
    """Of Student's t that the mean is 0; 1 if all are 0, or there are fewer than two."""
    if len(differences) < 2 or not any(differences):
        return 1.0
    return float(t_test(differences).pvalue)


def baseline_values(runs: Runs, figure: str) -> list[float]:
    """The figure of each run of the baseline."""
    return [float(run[figure]) for run in runs if run["method"] == BASELINE]


def effects(runs: Runs, figure: str) -> dict[str, Effect]:
    """The effect of each method but the baseline on `figure`; `runs` are the compared ones of one task."""
    by_method: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        by_method.setdefault(run["method"], {})[run["seed"]] = run
    baseline = by_method.pop(BASELINE)

    def pairs(method: str, name: str) -> list[tuple[float, float]]:
        """The figures of a method and the baseline with the same seed."""
        own = by_method[method]
        return [(float(own[seed][name]), float(baseline[seed][name])) for seed in own if seed in baseline]

    apart = {method: [one - other for one, other in pairs(method, figure)] for method in by_method}
    corrected = dict(zip(apart, holm([p_value(differences) for differences in apart.values()]), strict=True))
    full = fmean(apart[FULL]) if FULL in apart and p_value(apart[FULL]) < 0.05 else 0.0
    return {
        method: Effect(
            chosen=next(iter(by_method[method].values()))["chosen"],
            mean=fmean(float(run[figure]) for run in by_method[method].values()),
            differences=differences,
            p=corrected[method],
            share=fmean(differences) / full if full else None,
            time=median(one / other for one, other in pairs(method, "training_seconds")),
            flops=fmean(one / other for one, other in pairs(method, "flops")),
        )
        for method, differences in apart.items()
    }


def bounded_metric(runs: Runs) -> str | None:
    """The metric that the goal bounds: the Matthews correlation of a task that has it, else accuracy; else `None`."""
    return next((name for name in ("predict_matthews_correlation", "predict_accuracy") if has(runs, name)), None)


def shortfall(method: str, runs: Runs, figure: str) -> str | None:
    """What `method` lacks on a task to count for the goal on `figure`; `None` if it counts."""
    of_figure, metric = effects(runs, figure), bounded_metric(runs)
    own = of_figure[method]
    if not of_figure[FULL].is_lower:
        return "SAM has no effect"
    if own.time > MAX_TIME:
        return "time"
    if own.share is None or own.share < MIN_SHARE:
        return "share"
    if any(own.mean >= other.mean for name, other in of_figure.items() if name.startswith(f"{BASELINE}, ")):
        return "a free remedy is better"
    if metric is not None and fmean(effects(runs, metric)[method].differences) < -MAX_LOSS:
        return "accuracy"
    return None
