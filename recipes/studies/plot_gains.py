"""
Gains over the baseline with their 95 % confidence intervals, one row for each task, from the results of comparisons.

    python recipes/studies/plot_gains.py gains.svg recipes/studies/results/{sentences,small_data}.csv
    python recipes/studies/plot_gains.py docs/gains.png recipes/studies/gains.yaml

A mark is the mean difference of the metric to the baseline with the same seed. Accuracies, correlations and similar
metrics are drawn in points (100 times the metric) on one axis for all tasks. Each loss has a separate axis. The legend
gives the cost of each method as a ratio to the baseline.

A YAML can select the tasks and methods, and name them: see `read_panels` in `gains.py`.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_lsam_recipes.studies.gains import POINTS, Panel, Point, TaskRuns, by_unit, gains, read_panels, read_runs
from hf_lsam_recipes.support.comparison.statistics import COSTS
from hf_lsam_recipes.support.figures.palette import style

matplotlib.use("Agg")

# Inches: a README is shown about eight wide. Heights of a mark, of the space between rows, and of title and axis.
_WIDTH, _MARK, _SPACE, _FRAME = 8, 0.13, 0.16, 0.45


def draw_gains(panels: dict[str, Panel], cost: str) -> Figure:
    """
    One row for each task; every method has the same mark in all of them.

    Args:
        panels (`dict[str, Panel]`): By title, tasks of one unit. A title that is the unit is left out.
        cost (`str`): The cost in the legend, a key of `COSTS`.

    Raises:
        ValueError: if there is nothing to draw.
    """
    points = {
        title: {name: _finite(name, task, cost) for name, task in panel.items()} for title, panel in panels.items()
    }
    methods = list(dict.fromkeys(method for rows in points.values() for row in rows.values() for method in row))
    if not methods:
        raise ValueError("There is no difference to draw: run methods and baseline with the same seeds.")
    heights = [len(panel) * (_MARK * len(methods) + _SPACE) + _FRAME for panel in panels.values()]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.7), dpi=200, layout="constrained")
    grid = list(figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0])
    drawn: dict[str, Any] = {}
    shared: dict[str, Axes] = {}
    for axes, (title, panel) in zip(grid, panels.items(), strict=True):
        drawn |= _draw_panel(axes, panel, points[title], methods)
        unit = next(iter(panel.values())).unit
        if title != unit:
            axes.set_title(title, fontsize=10, loc="left", fontweight="bold", parse_math=False)
        baselines = " or ".join(dict.fromkeys(task.baseline for task in panel.values()))
        text = f"difference to {baselines} with the same seed, {_words(unit)}, 95 % confidence interval"
        axes.set_xlabel(text, fontsize=9, parse_math=False)
        if unit in shared:
            # `sharex` takes over the limits of the first panel, so both are scaled again.
            axes.sharex(shared[unit])
            axes.autoscale(axis="x")
        shared[unit] = axes
    legend = figure.legend(
        [drawn[method] for method in methods],
        [_with_cost(method, points) for method in methods],
        title=f"in brackets: {COSTS[cost]}, baseline = 1",
        loc="outside lower center",
        ncols=min(3, len(methods)),
        fontsize=9,
        title_fontsize=9,
    )
    for label in legend.get_texts():
        label.set_parse_math(False)
    return figure


def _finite(name: str, task: TaskRuns, cost: str) -> dict[str, Point]:
    """The points of a task that can be drawn. The other ones are reported to stderr, with the reason."""
    points = gains(task, cost)
    drawn = {method: point for method, point in points.items() if math.isfinite(point.gain.mean)}
    for method in [method for method in task.runs if method not in drawn and method != task.baseline]:
        why = "its difference is not finite" if method in points else "no seed has both"
        print(f"{name}: {method} is not drawn over {task.baseline}: {why}.", file=sys.stderr)
    return drawn


def _draw_panel(axes: Axes, panel: Panel, points: dict[str, dict[str, Point]], methods: list[str]) -> dict[str, Any]:
    """Draw the rows of a panel; returns the entry of each method for the legend."""
    entries, labels = {}, []
    for row, (name, task) in enumerate(panel.items()):
        scale = 100 if task.unit == POINTS else 1
        for method, point in points[name].items():
            mean, ends = scale * point.gain.mean, point.gain.ends
            bar = None if ends is None else [[mean - scale * ends[0]], [scale * ends[1] - mean]]
            place = (methods.index(method) + 0.5) / len(methods) - 0.5
            # The first style is that of the baseline, which is the line at zero.
            drawn = style(1 + methods.index(method)) | {"linestyle": "none", "markersize": 6, "capsize": 2}
            entries[method] = axes.errorbar([mean], [row + 0.75 * place], xerr=bar, elinewidth=1.2, **drawn)
        counts = sorted({point.seeds for point in points[name].values()}) or [0]
        n = f"n = {counts[0]}" + f" to {counts[-1]}" * (len(counts) > 1)
        what = _words(task.metric) + " (lower is better)" * (not task.greater_is_better)
        labels.append(f"{name}\n{what}, {n}")
        if row % 2:
            axes.axhspan(row - 0.5, row + 0.5, color="black", alpha=0.04, linewidth=0)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=9, parse_math=False)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params("y", length=0)
    axes.tick_params("x", labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return entries


def _words(metric: str) -> str:
    name = metric if metric == POINTS else metric.partition("_")[2]
    return "scaled loss" if name == "nll_scaled" else name.replace("_", " ")


def _with_cost(method: str, points: dict[str, dict[str, dict[str, Point]]]) -> str:
    """The method with the range of its costs over the tasks, where they are known."""
    ratios = [row[method].ratio for rows in points.values() for row in rows.values() if method in row]
    known = sorted(ratio for ratio in ratios if ratio is not None)
    ends = dict.fromkeys(f"{ratio:.2f}" for ratio in (known[:1] + known[-1:]))
    return f"{method} ({' to '.join(ends)})" if known else method


def main(argv: list[str] | None = None):
    """Run the command line `argv`: read the runs and write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().partition("\n")[0], allow_abbrev=False)
    parser.add_argument("picture", type=Path, help="the picture to write, for instance .svg or .png")
    parser.add_argument(
        "runs", type=Path, nargs="+", help="runs.csv of compare.py, results.json of the demo, or one YAML of a picture"
    )
    parser.add_argument(
        "--cost",
        choices=list(COSTS),
        default="flops",
        help="default: FLOPs, which do not depend on the load of the machine",
    )
    args = parser.parse_args(argv)
    try:
        if any(path.suffix in (".yaml", ".yml") for path in args.runs):
            if len(args.runs) > 1:
                raise ValueError("A YAML names its own files: leave out the other arguments.")
            panels = read_panels(args.runs[0])
        else:
            panels = by_unit(read_runs(args.runs))
        draw_gains(panels, args.cost).savefig(args.picture)
    except (OSError, ValueError) as error:
        sys.exit(f"plot_gains.py: {error}")


if __name__ == "__main__":
    main()
