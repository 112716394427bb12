"""The picture of the demo: learning curves, cost, and which blocks were perturbed when."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_lsam_recipes.support.figures.palette import style

matplotlib.use("Agg")

# What the picture needs of a run, and of a point of its curve.
RUN = {"method", "seed", "curve", "blocks", "training_seconds", "step_seconds", "peak_memory_mib"}
POINT = {"step", "accuracy", "loss"}


def read_demo(path: Path) -> dict[str, Any]:
    """The results of the demo; raises `ValueError` if the file holds something else."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        runs = results["runs"]
        is_demo = runs and all(run.keys() >= RUN and all(p.keys() >= POINT for p in run["curve"]) for run in runs)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a results.json of the demo ({error!r}).") from error
    if not is_demo:
        raise ValueError(f"{path} is not a results.json of the demo.")
    return results


def draw(results: dict[str, Any], path: Path):
    """Write the picture of `results` (the form of the demo's results.json) to `path`, as wide as a README shows it."""
    methods = list(dict.fromkeys(run["method"] for run in results["runs"]))
    runs = {method: [run for run in results["runs"] if run["method"] == method] for method in methods}
    mapped = [method for method in methods if any(sum(row["counts"].values()) for row in runs[method][0]["blocks"])]
    figure = Figure(figsize=(12, 7.2), dpi=150, layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.2, 1])[:, 0]
    accuracy, loss, cost = top.subplots(1, 3, width_ratios=[1, 1, 1.1])
    _learning_curves(accuracy, runs, "accuracy")
    _learning_curves(loss, runs, "loss")
    accuracy.legend(fontsize=9)
    _cost_bars(cost, runs)
    if mapped:
        blocks = max((list(runs[method][0]["blocks"][0]["counts"]) for method in mapped), key=len)
        maps = bottom.subplots(1, len(mapped), sharey=True, squeeze=False)[0]
        for axes, method in zip(maps, mapped, strict=True):
            image = _block_map(axes, method, runs[method], blocks)
        maps[0].set_ylabel("block (first to last)")
        bottom.colorbar(image, ax=list(maps), label="share of steps", fraction=0.04, pad=0.01)
        bottom.suptitle("What was perturbed, and when", fontsize=11)
    figure.savefig(path)


def _learning_curves(axes: Axes, runs: dict[str, list[dict]], metric: str):
    """A metric on the validation part: the mean over seeds, and the range between them."""
    for index, (method, repeats) in enumerate(runs.items()):
        steps = [point["step"] for point in repeats[0]["curve"]]
        values = np.array([[point[metric] for point in run["curve"]] for run in repeats])
        drawn = style(index)
        axes.plot(steps, values.mean(0), label=method, lw=1.8, markersize=4, **drawn)
        axes.fill_between(steps, values.min(0), values.max(0), color=drawn["color"], alpha=0.12, linewidth=0)
    seeds = len(next(iter(runs.values())))
    axes.set_title(f"Validation {metric} ({seeds} seed{'s' * (seeds > 1)})", fontsize=11)
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.3)


def _cost_bars(axes: Axes, runs: dict[str, list[dict]]):
    """Training time relative to the first method, labelled with that of a median step and the peak memory."""
    plain = {run["seed"]: run for run in next(iter(runs.values()))}

    def ratio(repeats: list[dict], time: str) -> float:
        return fmean(run[time] / plain[run["seed"]][time] for run in repeats)

    for index, repeats in enumerate(runs.values()):
        whole, step = ratio(repeats, "training_seconds"), ratio(repeats, "step_seconds")
        memory = fmean(run["peak_memory_mib"] for run in repeats)
        axes.barh(index, whole, color=style(index)["color"], height=0.6)
        axes.text(whole + 0.03, index, f"{whole:.2f}x (step {step:.2f}x)\n{memory:,.0f} MiB", va="center", fontsize=9)
    axes.set_yticks(range(len(runs)), [method.replace(", ", ",\n") for method in runs], fontsize=9)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.8)
    axes.set_xlabel(f"training time, {next(iter(runs))} = 1")
    axes.set_title("Cost: training time and peak memory", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _block_map(axes: Axes, method: str, repeats: list[dict], blocks: list[str]):
    """Blocks by time: the share of the steps in which each block was perturbed, over all seeds."""
    rows = repeats[0]["blocks"]
    shares = np.zeros((len(blocks), len(rows)))
    for run in repeats:
        for column, row in enumerate(run["blocks"]):
            counts = row["counts"]
            # Full SAM has one candidate, "all", that holds every block.
            shares[:, column] += [
                counts.get(block, counts.get("all")) / row["steps"] / len(repeats) for block in blocks
            ]
    edges = [0, *(row["step"] for row in rows)]
    image = axes.pcolormesh(edges, np.arange(len(blocks) + 1), shares, cmap="cividis", vmin=0, vmax=1)
    axes.set_yticks(np.arange(len(blocks)) + 0.5, [block.rpartition(".")[2] for block in blocks])
    axes.invert_yaxis()
    axes.set_xlabel("optimizer step")
    axes.set_title(method, fontsize=10)
    return image
