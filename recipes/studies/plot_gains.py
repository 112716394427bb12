"""
Gain over cost, one panel for each task: from the `runs.csv` of one or several comparisons.

    python recipes/studies/plot_gains.py gains.svg recipes/studies/results/{sentences,small_data}.csv

A point is the mean difference of the metric to the baseline with the same seed, with its 95 % interval, over the ratio
of a cost to that of the baseline. Panels have one axis of differences, but for those of a loss, and for those whose
differences would not be seen on it.
"""

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.scale import SymmetricalLogScale
from matplotlib.ticker import FixedLocator, MaxNLocator

from hf_lsam_recipes.support.comparison.plan import is_greater_better
from hf_lsam_recipes.support.comparison.statistics import COSTS, Interval, mean_interval
from hf_lsam_recipes.support.figures.palette import style

matplotlib.use("Agg")

_COLUMNS = 3
# One method may be far from the others: equal steps around zero, and powers of ten beyond.
_SCALE = SymmetricalLogScale(None, linthresh=0.05, linscale=2)
_TICKS = [sign * size for size in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) for sign in (-1, 1)]
# Differences are seen on a shared axis if the largest of a panel is so large beside the largest of all, as drawn.
_SEEN = 0.1


@dataclass(frozen=True)
class TaskRuns:
    """
    The compared runs of a task.

    Args:
        metric (`str`): Name of the compared figure.
        greater_is_better (`bool`): Whether more of it is better.
        baseline (`str`): The method that the others are compared with.
        runs (`dict[str, dict[int, dict]]`): By method and seed, the row of the file.
    """

    metric: str
    greater_is_better: bool
    baseline: str
    runs: dict[str, dict[int, dict[str, str]]]


@dataclass(frozen=True)
class Point:
    """A method on a task: its gain over the baseline, of `seeds` pairs, and the ratio of its cost."""

    gain: Interval
    ratio: float
    seeds: int


def read_runs(paths: Sequence[Path]) -> dict[str, TaskRuns]:
    """
    The compared runs of several files, by task, in the files' order.

    Raises:
        ValueError: if a file is none of `compare.py`, a task is in two of them, or it has no run of its baseline.
    """
    tasks: dict[str, TaskRuns] = {}
    for path in paths:
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
        for name, runs in by_task.items():
            if name in tasks:
                raise ValueError(f"{path} holds runs of {name}, as does a file before it. Name one of the two.")
            row = next(iter(next(iter(runs.values())).values()))
            tasks[name] = TaskRuns(row["metric"], _direction(row), _baseline(path, name, row, compared, runs), runs)
    if not tasks:
        raise ValueError("The files hold no compared run, only those that settings were chosen by.")
    return tasks


def gains(task: TaskRuns, cost: str) -> dict[str, Point]:
    """The points of a task, of those methods that share a seed, and one with the cost, with the baseline."""
    base, points = task.runs[task.baseline], {}
    for method, runs in task.runs.items():
        seeds = [seed for seed in runs if seed in base] if method != task.baseline else []
        # The time of a run that was stopped and gone on with is not known.
        pairs = [(runs[seed][cost], base[seed][cost]) for seed in seeds]
        ratios = [float(own) / float(other) for own, other in pairs if own and other and float(other)]
        if ratios:
            differences = [float(runs[seed]["value"]) - float(base[seed]["value"]) for seed in seeds]
            points[method] = Point(mean_interval(differences), mean_interval(ratios).mean, len(seeds))
    return points


def draw_gains(tasks: dict[str, TaskRuns], cost: str) -> Figure:
    """
    One panel for each task; every method has the same mark in all of them.

    Raises:
        ValueError: if there is no point to draw.
    """
    names = list(dict.fromkeys(method for task in tasks.values() for method in task.runs))
    points = {name: gains(task, cost) for name, task in tasks.items()}
    for name, task in tasks.items():
        drawn = {method for method, point in points[name].items() if math.isfinite(point.gain.mean)}
        for method in [method for method in task.runs if method not in drawn | {task.baseline}]:
            why = "its difference is no finite number" if method in points[name] else f"no seed has {cost} of both"
            print(f"{name}: {method} is not drawn over {task.baseline}: {why}.", file=sys.stderr)
    if not any(points.values()):
        raise ValueError(f"No seed has {cost} of some method and of its baseline: draw over another --cost.")
    columns = min(_COLUMNS, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(3.1 * columns, 2.7 * lines + 0.9), dpi=150, layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in grid[len(tasks) :]:
        axes.remove()
    own = _own_axes(tasks, points)
    shared = [axes for axes, name in zip(grid, tasks, strict=False) if name not in own]
    _share_differences(shared)
    entries: dict[str, Any] = {}
    for place, (axes, (name, task)) in enumerate(zip(grid, tasks.items(), strict=False)):
        entries |= _draw_panel(axes, name, task, points[name], names)
        axes.set_xlabel(f"{COSTS[cost]}, {task.baseline} = 1", fontsize=8, parse_math=False)
        if name in own:
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
            axes.set_ylabel("axis of its own", fontsize=8)
        elif place % columns and grid[place - 1] in shared:
            axes.tick_params(labelleft=False)
    figure.supylabel("difference to the baseline, 95 % interval", fontsize=9)
    legend = figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _direction(row: dict[str, str]) -> bool:
    """Whether more is better; files of old do not say it."""
    said = row.get("greater_is_better")
    return said == "True" if said else is_greater_better(row["metric"])


def _baseline(path: Path, task: str, row: dict[str, str], compared: Sequence[dict], runs: dict[str, Any]) -> str:
    """
    What the file says; in one of old, which does not, the first method of the file.

    Files of old were also put together of several comparisons: a task without a run of that method has its own first.
    """
    if not (said := row.get("baseline")):
        first = compared[0]["method"]
        return first if first in runs else row["method"]
    if said not in runs:
        raise ValueError(
            f"{path} has no compared run of {said} on {task}, which is the baseline of the others: run it, or leave "
            "the file out."
        )
    return said


def _own_axes(tasks: dict[str, TaskRuns], points: dict[str, dict[str, Point]]) -> set[str]:
    """The tasks whose differences have an axis of their own: in other units, or too small to be seen."""
    sizes = {name: [abs(point.gain.mean) for point in of.values()] for name, of in points.items()}
    drawn = {name: _SCALE.get_transform().transform([*filter(math.isfinite, of)]) for name, of in sizes.items()}
    largest = {name: float(max(of, default=0.0)) for name, of in drawn.items()}
    others = {name for name, task in tasks.items() if is_greater_better(task.metric)}
    limit = _SEEN * max((largest[name] for name in others), default=0.0)
    return {name for name in tasks if name not in others or 0 < largest[name] < limit}


def _share_differences(panels: Sequence[Axes]) -> None:
    """One axis of differences for all."""
    for axes in panels[1:]:
        axes.sharey(panels[0])
    for axes in panels[:1]:
        # Once they share it: sharing does not bring the scale along.
        axes.set_yscale(_SCALE)
        axes.yaxis.set_major_locator(FixedLocator(_TICKS))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")


def _draw_panel(axes: Axes, name: str, task: TaskRuns, points: dict[str, Point], names: list[str]) -> dict[str, Any]:
    """The points of a task, and what the legend shows of them."""
    entries = {}
    for method, point in points.items():
        if math.isfinite(point.gain.mean):
            mean, ends = point.gain.mean, point.gain.ends
            bar = None if ends is None else [[mean - ends[0]], [ends[1] - mean]]
            drawn = style(names.index(method)) | {"linestyle": "none", "markersize": 6, "elinewidth": 1, "capsize": 2}
            entries[method] = axes.errorbar([point.ratio], [mean], bar, **drawn)
    axes.axhline(0, color="black", lw=0.8)
    counts = sorted({point.seeds for point in points.values()}) or [0]
    n = f"n = {counts[0]}" + f" to {counts[-1]}" * (len(counts) > 1)
    what = task.metric.partition("_")[2].replace("_", " ") + " (lower is better)" * (not task.greater_is_better)
    axes.set_title(f"{name}\n{what}, {n}", fontsize=9, parse_math=False)
    axes.set_xlim(left=0.95)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return entries


def main(argv: list[str] | None = None):
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().partition("\n")[0], allow_abbrev=False)
    parser.add_argument("picture", type=Path, help="the picture to write, for instance .svg or .png")
    parser.add_argument("runs", type=Path, nargs="+", help="runs.csv of compare.py")
    parser.add_argument("--cost", choices=list(COSTS), default="flops", help="default: FLOPs, which no load changes")
    args = parser.parse_args(argv)
    try:
        draw_gains(read_runs(args.runs), args.cost).savefig(args.picture)
    except (OSError, ValueError) as error:
        sys.exit(f"plot_gains.py: {error}")


if __name__ == "__main__":
    main()
