"""The statistics of a comparison: differences to the baseline with the same seed, and the cost of each method."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from scipy import stats

from hf_lsam_recipes.support.comparison.plan import Comparison, Run, Task, metric_of

# Costs that are reported as ratios to the baseline with the same seed: names in the result of a run, and titles.
COSTS = {
    "training_seconds": "training time",
    "step_seconds": "median step",
    "flops": "FLOPs",
    "peak_memory_mib": "peak memory",
}
# The columns of the report that hold text; the others hold numbers.
TEXTS = ("method", "chosen")
# Maximum number of runs that a remark names.
_MAX_NAMED = 4


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95 % confidence interval, which is `None` for a single value."""

    mean: float
    ends: tuple[float, float] | None

    def __format__(self, form: str) -> str:
        """The mean and, in brackets, the ends, each number in `form`."""
        ends = "" if self.ends is None else f" [{self.ends[0]:{form}}, {self.ends[1]:{form}}]"
        return f"{self.mean:{form}}{ends}"


@dataclass(frozen=True)
class Row:
    """
    A method on a task.

    Args:
        chosen (`dict`): The values chosen from its grid.
        tried (`int`): The number of settings to choose from.
        values (`dict[int, float]`): The metric, by seed.
        differences (`dict[int, float]`): The metric minus that of the baseline, by seed.
        difference (`Interval` or `None`): Their mean; `None` for the baseline, and where no seed has both.
        wins, losses (`int`): Seeds for which the method is better, or worse, than the baseline.
        costs (`dict[str, float | None]`): Means of the ratios to the baseline, by the names of `COSTS`.
    """

    method: str
    chosen: dict[str, Any]
    tried: int
    values: dict[int, float]
    differences: dict[int, float]
    difference: Interval | None
    wins: int
    losses: int
    costs: dict[str, float | None]


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean with its 95 % interval (Student's t), which is `None` for one value and where one is not finite."""
    # fmean raises for inf and -inf.
    mean = fmean(values) if all(map(math.isfinite, values)) else sum(values) / len(values)
    if len(values) < 2 or not math.isfinite(mean):
        return Interval(mean, None)
    interval = t_test(values).confidence_interval()
    return Interval(mean, (float(interval.low), float(interval.high)))


def t_test(values: Sequence[float]) -> Any:
    """Student's t-test that the mean of two or more values is 0."""
    with warnings.catch_warnings():
        # Differences of seeds may be equal; the interval is then the mean alone.
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        return stats.ttest_1samp(values, 0.0)


def table(comparison: Comparison, task: Task, results: Sequence[dict[str, Any]]) -> list[Row]:
    """
    One row per method, in the order of the comparison.

    Args:
        comparison (`Comparison`): What was compared.
        task (`Task`): The task of the table.
        results (`list[dict]`): Results of the compared runs, of any task.
    """
    runs = {
        method.name: {r["seed"]: r for r in results if (r["task"], r["method"]) == (task.name, method.name)}
        for method in comparison.methods
    }
    baseline = runs[comparison.baseline]
    rows = []
    for method in comparison.methods:
        own = runs[method.name]
        values = {seed: metric_of(result, task.metric) for seed, result in own.items()}
        shared = [seed for seed in own if seed in baseline] if method.name != comparison.baseline else []
        differences = {seed: values[seed] - metric_of(baseline[seed], task.metric) for seed in shared}
        gains = [difference if task.greater_is_better else -difference for difference in differences.values()]
        rows.append(
            Row(
                method=method.name,
                chosen=next(iter(own.values()))["chosen"] if own else {},
                tried=len(method.candidates),
                values=values,
                differences=differences,
                difference=mean_interval(list(differences.values())) if differences else None,
                wins=sum(gain > 0 for gain in gains),
                losses=sum(gain < 0 for gain in gains),
                costs={name: _ratio(name, own, baseline) for name in COSTS},
            )
        )
    return rows


def remarks(comparison: Comparison, results: Sequence[dict[str, Any]], missing: Sequence[str]) -> list[str]:
    """Caveats for the reader of the tables."""
    found = []
    if missing:
        count = len(comparison.tasks) * len(comparison.methods) * len(comparison.seeds)
        found.append(f"Missing runs, of {count}: {_abbreviated(missing)}.")
    tried = {method.name: len(method.candidates) for method in comparison.methods}
    if len(set(tried.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in tried.items())
        found.append(f"Methods were not tuned with equal effort. Settings tried: {counts}.")
    if broken := not_finite(comparison, results):
        found.append(f"Metrics that are not finite, so that there is no interval: {_abbreviated(broken)}.")
    made_with = {str((result["commit"], result["versions"], result["machine"])) for result in results}
    if len(made_with) > 1:
        found.append(f"Runs were made with {len(made_with)} different states of code, versions or machines.")
    if any(result["processes"] > 1 for result in results):
        most = max(result["processes"] for result in results)
        found.append(f"Up to {most} runs shared the machine, which makes times less accurate.")
    if any(result["resumed"] for result in results):
        found.append("Training times do not include runs that were stopped and resumed.")
    return found


def missing_runs(comparison: Comparison, finished: Sequence[Run]) -> list[str]:
    """Names of the compared runs that have no result."""
    done = {(run.task, run.method, run.seed) for run in finished}
    return [
        f"{task.name}, {method.name}, seed {seed}"
        for task in comparison.tasks
        for method in comparison.methods
        for seed in comparison.seeds
        if (task.name, method.name, seed) not in done
    ]


def not_finite(comparison: Comparison, results: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the runs whose metric is not finite, with its value."""
    found = []
    tasks = {task.name: task for task in comparison.tasks}
    for result in results:
        task = tasks[result["task"]]
        metric = task.tuning_metric if result["tuning"] else task.metric
        value = metric_of(result, metric)
        if not math.isfinite(value):
            found.append(f"{metric} of {task.name}, {result['method']}, seed {result['seed']} is {value}")
    return found


def _abbreviated(names: Sequence[str]) -> str:
    rest = [f"and {len(names) - _MAX_NAMED} more"] if len(names) > _MAX_NAMED else []
    return "; ".join([*names[:_MAX_NAMED], *rest])


def _ratio(name: str, own: dict[int, dict], baseline: dict[int, dict]) -> float | None:
    pairs = [(own[seed][name], baseline[seed][name]) for seed in own if seed in baseline]
    ratios = [value / base for value, base in pairs if value is not None and base]
    return fmean(ratios) if ratios else None
