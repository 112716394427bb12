"""The figures of a comparison on one task. Lines are means over the seeds, and bands the range between them."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from hf_lsam_recipes.support.comparison.series import (
    Band,
    Curve,
    Run,
    TaskResults,
    block_names,
    block_norms,
    curve_of,
    over_seeds,
    perturbation_counts,
    whole_norms,
)
from hf_lsam_recipes.support.comparison.statistics import COSTS, mean_interval
from hf_lsam_recipes.support.figures.palette import style

# Inches: at the width of a README, 9 points are as large as its text.
WIDTH = 9.0
LAYER_LINES = ("-", "--", "-.", ":")


class NotDrawnError(Exception):
    """The reason why a figure cannot be drawn from these results."""


def layer_gradient_norms(results: TaskResults) -> Figure:
    """The gradient norm of each layer during training, a panel for each method that has them."""
    measured = results.measured()
    norms = {method: [block_norms(run, measured) for run in runs] for method, runs in results.runs.items()}
    shown = {method: of_runs for method, of_runs in norms.items() if of_runs and all(of_runs)}
    if not shown:
        raise NotDrawnError(
            "no run has gradient norms of layers. Set gradient_norm_steps in the comparison's settings"
        )
    figure, panels = _panels(list(shown), columns=3)
    blocks = list(next(iter(next(iter(shown.values())))))
    # From dark to light, without the light yellow: the order of the layers is visible with any colour vision.
    colours = matplotlib.colormaps["cividis"](np.linspace(0, 0.85, len(blocks)))
    for method, axes in panels.items():
        for index, block in enumerate(blocks):
            band = over_seeds([of_run[block] for of_run in shown[method] if block in of_run])
            _draw_band(axes, band, block.rpartition(".")[2], color=colours[index], linestyle=LAYER_LINES[index % 4])
        _log_scale(axes)
        axes.set_xlabel("optimizer step")
    what = "on the same rows" if measured else "mean of the perturbed steps"
    figure.supylabel(f"gradient norm of a layer ({what})", fontsize=9)
    _finish(figure, results, "Gradient norms of the layers", "layer")
    return figure


def layer_landscapes(results: TaskResults) -> Figure:
    """The loss along a random direction of each layer and of the whole model, a panel for each."""
    runs = [run for of_method in results.runs.values() for run in of_method]
    if not all(run.get("landscapes") for run in runs):
        raise NotDrawnError("not every run has landscapes. Set landscape_points in the comparison's settings")
    figure, panels = _panels(list(runs[0]["landscapes"]), columns=4)

    def landscape(run: Run, block: str) -> Curve:
        return dict(zip(run["landscapes"][block]["places"], run["landscapes"][block]["losses"], strict=True))

    for block, axes in panels.items():
        _draw_methods(axes, results, partial(landscape, block=block), markers=False)
        axes.set_title(f"layer {block.rpartition('.')[2]}" if block != "all" else "whole model", fontsize=9)
        axes.set_xlabel("distance")
    figure.supylabel("loss along a random direction (distance 1: as long as the weights)", fontsize=9)
    _finish(figure, results, "Loss around the trained weights")
    return figure


def learning_curves(results: TaskResults) -> Figure:
    """The training loss, and the validation metric of runs that were evaluated during training."""
    validation = results.tuning_metric or "eval_" + results.metric.partition("_")[2]
    runs = [run for of_method in results.runs.values() for run in of_method]
    names = [name for name in ("loss", validation) if any(curve_of(run, name) for run in runs)]
    if not names:
        raise NotDrawnError(f"no run logged a loss or {validation}. Set logging_steps and eval_strategy")
    figure, panels = _panels(names, columns=2)
    for name, axes in panels.items():
        _draw_methods(axes, results, partial(curve_of, name=name))
        axes.set_xlabel("optimizer step")
        axes.set_title("training loss" if name == "loss" else name, fontsize=9, parse_math=False)
    _finish(figure, results, "Learning curves")
    return figure


def gradient_norm(results: TaskResults) -> Figure:
    """The gradient norm of the whole model during training, all methods."""
    measured = results.measured()
    runs = [run for of_method in results.runs.values() for run in of_method]
    if not any(whole_norms(run, measured) for run in runs):
        raise NotDrawnError("no run logged a gradient norm. Set logging_steps or gradient_norm_steps")
    figure, panels = _panels([""], columns=1)
    axes = panels[""]
    _draw_methods(axes, results, lambda run: whole_norms(run, measured))
    _log_scale(axes)
    axes.set_xlabel("optimizer step")
    what = "of the plain loss, on the same rows" if measured else "that the optimizer gets"
    axes.set_ylabel(f"norm of the gradient\n{what}")
    _finish(figure, results, "Gradient norm of the whole model")
    return figure


def perturbations(results: TaskResults) -> Figure:
    """How often each method perturbed each layer in a run."""
    blocks = block_names([run for of_method in results.runs.values() for run in of_method])
    if not blocks:
        raise NotDrawnError("no method chose among layers")
    figure, panels = _panels([""], columns=1)
    axes = panels[""]
    shown = {method: runs for method, runs in results.runs.items() if runs}
    places = [float(place) for place in range(len(blocks))]
    for place, (method, runs) in enumerate(shown.items()):
        counts = [dict(zip(places, perturbation_counts(run, blocks), strict=True)) for run in runs]
        band = over_seeds(counts)
        # Side by side: some methods have the same counts.
        x = band.places + (place - (len(shown) - 1) / 2) * 0.7 / len(shown)
        ends = np.array([band.mean - band.low, band.high - band.mean])
        drawn = style(_index(results, method)) | {"linewidth": 0.8, "elinewidth": 1, "markersize": 5}
        axes.errorbar(x, band.mean, ends, label=f" {method}", **drawn)
    axes.set_xticks(range(len(blocks)), [block.rpartition(".")[2] for block in blocks])
    axes.set_xlabel("layer (first to last)")
    axes.set_ylabel("perturbations in a training")
    _finish(figure, results, "Perturbations of each layer")
    return figure


def accuracy_over_cost(results: TaskResults, cost: str = "training_seconds") -> Figure:
    """The compared metric over the cost, as a ratio to the baseline with the same seed; bars are 95 % intervals."""
    metric = results.metric
    base = {run["seed"]: run[cost] for run in results.runs[results.baseline] if run[cost]}
    figure, panels = _panels([""], columns=1)
    axes = panels[""]
    for method, runs in results.runs.items():
        pairs = [
            (run[cost] / base[run["seed"]], run["metrics"][metric])
            for run in runs
            if run["seed"] in base and run[cost] is not None and metric in run["metrics"]
        ]
        if not pairs:
            continue
        x, y = (mean_interval(values) for values in zip(*pairs, strict=True))
        if not math.isfinite(y.mean):
            continue
        bars = [None if of.ends is None else [[of.mean - of.ends[0]], [of.ends[1] - of.mean]] for of in (x, y)]
        drawn = style(_index(results, method)) | {"linestyle": "none", "markersize": 7, "elinewidth": 1, "capsize": 2}
        axes.errorbar([x.mean], [y.mean], bars[1], bars[0], label=f" {method}", **drawn)
    if not axes.containers:
        raise NotDrawnError(f"no seed has {metric} of some method and {cost} of it and of {results.baseline}")
    better = "" if results.greater_is_better else " (lower is better)"
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"{COSTS[cost]}, {results.baseline} with the same seed = 1", parse_math=False)
    axes.set_ylabel(metric + better, parse_math=False)
    _finish(figure, results, "Accuracy over cost", spread="mean and 95 % interval")
    return figure


def _draw_methods(axes: Axes, results: TaskResults, curve: Callable[[Run], Curve], markers: bool = True) -> None:
    """A line with its band for each method."""
    for index, (method, runs) in enumerate(results.runs.items()):
        band = over_seeds([curve(run) for run in runs])
        drawn = style(index) if markers else style(index) | {"marker": ""}
        # About 8 markers on each line.
        _draw_band(axes, band, f" {method}", markersize=5, markevery=math.ceil(len(band.places) / 8) or 1, **drawn)


def _draw_band(axes: Axes, band: Band, label: str, **drawn: Any) -> None:
    if len(band.places):
        axes.plot(band.places, band.mean, label=label, linewidth=1.6, **drawn)
        axes.fill_between(band.places, band.low, band.high, color=drawn["color"], alpha=0.12, linewidth=0)


def _log_scale(axes: Axes) -> None:
    """Logarithmic, with plain numbers at 1, 2 and 5 times the powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter("{x:g}")
    axes.tick_params(which="minor", labelsize=9)


def _panels(names: Sequence[str], columns: int) -> tuple[Figure, dict[str, Axes]]:
    """A figure of panels with these titles."""
    columns = min(columns, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(WIDTH, 2.3 * rows + 2.1 if columns > 1 else 5.0), dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=columns > 2).flat
    for axes in grid[len(names) :]:
        axes.remove()
    panels = dict(zip(names, grid, strict=False))
    for name, axes in panels.items():
        axes.set_title(name, fontsize=9, parse_math=False)
        axes.tick_params(labelsize=9)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _finish(
    figure: Figure, results: TaskResults, title: str, legend: str = "", spread: str = "mean and range"
) -> None:
    """Title and one legend for all panels."""
    seeds = results.seeds
    of_seeds = f"{spread} of {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    figure.suptitle(f"{title}: {results.task}, {of_seeds}", fontsize=11, parse_math=False)
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        entries |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = 8 if legend else 3
    drawn = figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize=9, title=legend or None
    )
    for text in drawn.get_texts():
        text.set_parse_math(False)


def _index(results: TaskResults, method: str) -> int:
    """The position of a method, which determines its style."""
    return list(results.runs).index(method)
