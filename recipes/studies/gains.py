"""The data of `plot_gains.py`: runs of comparisons by task, and gains over the baseline."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from hf_lsam_recipes.support.comparison.plan import is_greater_better
from hf_lsam_recipes.support.comparison.statistics import COSTS, Interval, mean_interval
from hf_lsam_recipes.support.figures.demo import read_demo

POINTS = "points"


@dataclass(frozen=True)
class TaskRuns:
    """
    The compared runs of a task.

    Args:
        metric (`str`): Name of the compared metric.
        greater_is_better (`bool`): Whether higher is better.
        baseline (`str`): The method that the others are compared with.
        runs (`dict[str, dict[int, dict]]`): By method and seed, the row of the file.
    """

    metric: str
    greater_is_better: bool
    baseline: str
    runs: dict[str, dict[int, dict[str, Any]]]

    @property
    def unit(self) -> str:
        """`"points"` (100 times the metric) or, for a loss or perplexity, the name of the metric, drawn unscaled."""
        return POINTS if is_greater_better(self.metric) else self.metric


# The tasks of a panel, by the names of their rows.
Panel = dict[str, TaskRuns]


@dataclass(frozen=True)
class Point:
    """
    A method on a task.

    Args:
        gain (`Interval`): Mean difference to the baseline with the same seed, in units of the metric.
        ratio (`float` or `None`): Mean ratio of the costs; `None` if no seed has the costs of both.
        seeds (`int`): Number of seeds of both.
    """

    gain: Interval
    ratio: float | None
    seeds: int


def read_runs(paths: Sequence[Path]) -> Panel:
    """
    The compared runs of several files, by task, in the files' order.

    Args:
        paths (`list[Path]`): A `runs.csv` of `compare.py` each, or a `results.json` of the demo, whose task is `demo`.

    Raises:
        ValueError: if a file is neither, a task is in two of them, or it has no run of its baseline.
    """
    tasks: Panel = {}
    for path in paths:
        for name, task in (_read_demo if path.suffix == ".json" else _read_csv)(path).items():
            if name in tasks:
                raise ValueError(f"{path} holds runs of {name}, as does an earlier file. Name only one of the two.")
            tasks[name] = task
    if not tasks:
        raise ValueError("The files hold no compared run, only those that settings were chosen by.")
    return tasks


def by_unit(tasks: Panel) -> dict[str, Panel]:
    """A panel for each unit, by its name."""
    units = dict.fromkeys(task.unit for task in tasks.values())
    return {unit: {name: task for name, task in tasks.items() if task.unit == unit} for unit in units}


def read_panels(path: Path) -> dict[str, Panel]:
    """
    Read the panels that a YAML describes, by title.

    The YAML has two entries. `methods` maps the displayed name of each method to a list of its names in the files.
    `panels` maps the title of a panel to its rows, and the name of each row to a `file`, relative to the YAML, and the
    `task` in it.

    Raises:
        ValueError: if an entry is missing or unknown, a file lacks the task, a method is in no task, or a panel has
            tasks of different units.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        methods = {alias: name for name, aliases in content["methods"].items() for alias in aliases}
        rows = [(title, row, entry) for title, entries in content["panels"].items() for row, entry in entries.items()]
        wanted = {(title, row): (path.parent / entry["file"], entry["task"]) for title, row, entry in rows}
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} does not describe a picture, with methods and panels ({error!r}).") from error
    files = {file: read_runs([file]) for file in dict.fromkeys(file for file, _ in wanted.values())}
    panels: dict[str, Panel] = {}
    for (title, row), (file, name) in wanted.items():
        if name not in files[file]:
            raise ValueError(f"{path}: {file} has no task {name}. It has: {', '.join(files[file])}.")
        task = files[file][name]
        runs = {methods[own]: task.runs[own] for own in methods if own in task.runs and own != task.baseline}
        panels.setdefault(title, {})[row] = replace(task, runs={task.baseline: task.runs[task.baseline]} | runs)
    drawn = {method for panel in panels.values() for task in panel.values() for method in task.runs}
    if missing := [method for method in content["methods"] if method not in drawn]:
        raise ValueError(f"{path}: no task has {', '.join(missing)}. Check the names that it has in the files.")
    for title, panel in panels.items():
        if len(by_unit(panel)) > 1:
            units = ", ".join(by_unit(panel))
            raise ValueError(
                f"{path}: the tasks of {title} are in different units ({units}). Put each unit in a separate panel."
            )
    return panels


def gains(task: TaskRuns, cost: str) -> dict[str, Point]:
    """The points of a task, of those methods that share a seed with the baseline."""
    base, points = task.runs[task.baseline], {}
    for method, runs in task.runs.items():
        if seeds := [seed for seed in runs if seed in base and method != task.baseline]:
            # The training time of a resumed run is unknown.
            pairs = [(runs[seed].get(cost), base[seed].get(cost)) for seed in seeds]
            ratios = [float(own) / float(other) for own, other in pairs if own and other and float(other)]
            differences = [float(runs[seed]["value"]) - float(base[seed]["value"]) for seed in seeds]
            ratio = mean_interval(ratios).mean if ratios else None
            points[method] = Point(mean_interval(differences), ratio, len(seeds))
    return points


def _read_demo(path: Path) -> Panel:
    """The runs of the demo as those of one task, of which the first method is the baseline."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for run in read_demo(path)["runs"]:
        if "test_accuracy" not in run:
            raise ValueError(f"{path} is not a results.json of the demo: a run lacks test_accuracy.")
        runs.setdefault(run["method"], {})[run["seed"]] = run | {"value": run["test_accuracy"]}
    return {"demo": TaskRuns("test_accuracy", True, next(iter(runs)), runs)}


def _read_csv(path: Path) -> Panel:
    """The compared runs of a `runs.csv`, by task."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        compared = [row for row in rows if row["stage"] == "compared"]
        by_task: dict[str, dict[str, dict[int, dict[str, str]]]] = {}
        for row in compared:
            float(row["value"]), *(float(row[cost] or 0) for cost in COSTS)
            by_task.setdefault(row["task"], {}).setdefault(row["method"], {})[int(row["seed"])] = row
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a runs.csv of compare.py ({error!r}).") from error
    if not rows:
        raise ValueError(f"{path} is not a runs.csv of compare.py, or holds no run.")
    tasks = {}
    for name, runs in by_task.items():
        row = next(iter(next(iter(runs.values())).values()))
        tasks[name] = TaskRuns(row["metric"], _direction(row), _baseline(path, name, row, compared, runs), runs)
    return tasks


def _direction(row: dict[str, str]) -> bool:
    """Whether higher is better. Older files lack the column; the name of the metric decides for them."""
    stated = row.get("greater_is_better")
    return stated == "True" if stated else is_greater_better(row["metric"])


def _baseline(path: Path, task: str, row: dict[str, str], compared: Sequence[dict], runs: dict[str, Any]) -> str:
    """
    The baseline of a task. Older files do not state it; for them, it is the first method of the file.

    Older files may also combine several comparisons. If a task has no run of that method, it is the task's first one.
    """
    if not (stated := row.get("baseline")):
        first = compared[0]["method"]
        return first if first in runs else row["method"]
    if stated not in runs:
        raise ValueError(
            f"{path} has no compared run of {stated} on {task}, which is the baseline of the others: run it, or leave "
            "the file out."
        )
    return stated
