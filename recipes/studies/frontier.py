"""The effect of each method over its cost, a panel for each primary figure of each task."""

import math
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_lsam_recipes.studies.effects import (
    BASELINE,
    FIGURES,
    MAX_TIME,
    PRIMARY,
    Effect,
    Runs,
    baseline_values,
    effects,
    has,
)
from hf_lsam_recipes.support.figures.comparison import WIDTH
from hf_lsam_recipes.support.figures.palette import style

matplotlib.use("Agg")

_EDGE = 15  # percent; the few results beyond it, of runs that do not learn, would hide the others


def draw_frontier(tasks: dict[str, Runs]) -> Figure:
    """
    The mean difference to the baseline with its 95 % interval, in percent of the baseline's mean, over the time.

    Args:
        tasks (`dict[str, Runs]`): The compared runs of each task.
    """
    shown = [(task, figure) for figure in PRIMARY for task, runs in tasks.items() if has(runs, figure)]
    found = {(task, figure): effects(tasks[task], figure) for task, figure in shown}
    methods = list(dict.fromkeys(method for of_task in found.values() for method in of_task))
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(WIDTH, 2.6 * rows + 1.6), dpi=150, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    entries: dict[str, Any] = {}
    for axes, place in zip(grid, shown, strict=False):
        base = sum(values := baseline_values(tasks[place[0]], place[1])) / len(values)
        for method, effect in found[place].items():
            entries[method] = _draw(axes, effect, base, 1 + methods.index(method))
        axes.set_title(f"{place[0]}\n{FIGURES[place[1]]}, {BASELINE} {base:.3f}", fontsize=9, parse_math=False)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axvline(MAX_TIME, color="black", linewidth=0.8, linestyle=":")
        axes.tick_params(labelsize=9)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(shown) :]:
        axes.remove()
    for axes in grid[max(len(shown) - columns, 0) : len(shown)]:
        axes.set_xlabel(f"training time, {BASELINE} = 1", fontsize=9)
        axes.tick_params(labelbottom=True)
    figure.supylabel(f"difference to {BASELINE} with the same seed, in %", fontsize=9)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _draw(axes: Axes, effect: Effect, base: float, index: int) -> Any:
    """Draw the point of a method; one that is out of the panel is drawn at its edge, with its value."""
    mean, ends = 100 * effect.interval.mean / base, effect.interval.ends
    bar = None if ends is None else [[mean - 100 * ends[0] / base], [100 * ends[1] / base - mean]]
    drawn = style(index) | {"linestyle": "none", "markersize": 6, "elinewidth": 1, "capsize": 2}
    if abs(mean) > _EDGE:
        axes.annotate(f"{mean:+.0f} %", (effect.time, math.copysign(_EDGE, mean)), (5, -4), textcoords="offset points")
        mean, bar = math.copysign(_EDGE, mean), None
    return axes.errorbar([effect.time], [mean], bar, **drawn)
