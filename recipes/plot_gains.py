"""
Gain over cost, one panel for each task: from the `runs.csv` of one or several comparisons.

    python recipes/plot_gains.py gains.svg recipes/results/sentences.csv recipes/results/small_data.csv

A point is the mean difference of the metric to the baseline (the first method of the file) with the same seed, with
its 95 % interval, over the ratio of a cost to that of the baseline.
"""

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from compare_plan import is_greater_better
from compare_statistics import COSTS, mean_interval
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from palette import style

matplotlib.use("Agg")

# By task, method and seed: the metric and the costs of a run.
Gains = dict[str, dict[str, dict[int, dict[str, str]]]]
_COLUMNS = 3
# Differences up to this size are drawn on a linear scale.
_LINEAR = 0.05
_TICKS = [sign * size for size in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) for sign in (-1, 1)]


def read_runs(paths: Sequence[Path]) -> Gains:
    """
    The compared runs of several files, by task, method and seed, in the files' order.

    Raises:
        ValueError: if a file is none of `compare.py`, or a task is in two of them.
    """
    tasks: Gains = {}
    for path in paths:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or not {"task", "method", "stage", "seed", "value", *COSTS} <= rows[0].keys():
            raise ValueError(f"{path} is not a runs.csv of compare.py.")
        compared = [row for row in rows if row["stage"] == "compared"]
        for name in dict.fromkeys(row["task"] for row in compared):
            if name in tasks:
                raise ValueError(f"{path} holds runs of {name}, as does a file before it. Name one of the two.")
            tasks[name] = {}
        for row in compared:
            tasks[row["task"]].setdefault(row["method"], {})[int(row["seed"])] = row
    return tasks


def draw_gains(tasks: Gains, cost: str) -> Figure:
    """One panel for each task; every method has the same mark in all of them."""
    names = list(dict.fromkeys(method for methods in tasks.values() for method in methods))
    columns = min(_COLUMNS, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(3.1 * columns, 2.7 * lines + 0.9), dpi=150, layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    # One method may be far from the others: equal steps around zero, and powers of ten beyond.
    grid[0].set_yscale("symlog", linthresh=_LINEAR, linscale=2)
    grid[0].yaxis.set_major_locator(FixedLocator(_TICKS))
    grid[0].yaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    for axes in grid[len(tasks) :]:
        axes.remove()
    entries = {}
    for axes, (task, methods) in zip(grid, tasks.items(), strict=False):
        baseline, *others = methods
        base = methods[baseline]
        for method in others:
            seeds = [seed for seed in methods[method] if seed in base]
            gains = [float(methods[method][seed]["value"]) - float(base[seed]["value"]) for seed in seeds]
            ratios = [
                float(methods[method][s][cost]) / float(base[s][cost]) for s in seeds if methods[method][s][cost]
            ]
            if not ratios:
                continue
            gain, ratio = mean_interval(gains), mean_interval(ratios)
            bar = None if gain.ends is None else [[gain.mean - gain.ends[0]], [gain.ends[1] - gain.mean]]
            drawn = style(names.index(method)) | {"linestyle": "none", "markersize": 6, "elinewidth": 1, "capsize": 2}
            entries[method] = axes.errorbar([ratio.mean], [gain.mean], bar, **drawn)
        axes.axhline(0, color="black", lw=0.8)
        metric = next(iter(base.values()))["metric"]
        what = metric.partition("_")[2].replace("_", " ") + ("" if is_greater_better(metric) else " (lower is better)")
        axes.set_title(f"{task}\n{what}, n = {len(base)}", fontsize=9, parse_math=False)
        axes.set_xlim(left=0.95)
        axes.set_xlabel(f"{COSTS[cost]}, {baseline} = 1", fontsize=8, parse_math=False)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("difference to the baseline, 95 % interval", fontsize=9)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


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
