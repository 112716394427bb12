"""
Figures of the benchmark: step time over the first perturbed block, with the bound and other implementations; and the
difference of measured time and bound as the model or the step grows.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_lsam_recipes.support.figures.palette import style

matplotlib.use("Agg")


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs in a file of the benchmark; raises `ValueError` if it is not one."""
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no runs of this benchmark: name another.") from error
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise ValueError(f"{path} holds no runs of this benchmark: name another.")
    return runs


def draw_cost(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the runs with times side by side; the suffix of `path` is the format."""
    timed = [run for run in runs if any("ratio" in row for row in run["figures"].values())]
    if not timed:
        raise ValueError("There are no times to draw: rounds was 0.")
    figure = Figure(figsize=(7.2 * len(timed), 4.4), dpi=150, layout="constrained")
    for axes, run in zip(figure.subplots(1, len(timed), squeeze=False)[0], timed, strict=True):
        _draw_run(axes, run)
    figure.savefig(path)


def growth(runs: list[dict[str, Any]], arguments: list[str]) -> Figure:
    """
    Step time minus the bound, over each of `arguments` of the benchmark: of the runs that differ from the first of
    `runs` in that argument alone.

    Raises:
        ValueError: if the benchmark has no such argument, or a run has no times of a method of the first.
    """
    first = runs[0]
    names = [name for name, row in first["figures"].items() if name != "plain" and row.get("bound") is not None]
    figure = Figure(figsize=(4.2 * len(arguments), 3.4), dpi=150, layout="constrained")
    for axes, argument in zip(
        figure.subplots(1, len(arguments), squeeze=False, sharey=True)[0], arguments, strict=True
    ):
        if argument not in first["arguments"]:
            raise ValueError(f"--over {argument}: the benchmark has {', '.join(first['arguments'])}.")
        alike = [run for run in runs if run["arguments"] | {argument: None} == first["arguments"] | {argument: None}]
        alike.sort(key=lambda run: run["arguments"][argument])
        places = [run["arguments"][argument] for run in alike]
        for index, name in enumerate(names):
            rows = [run["figures"].get(name, {}) for run in alike]
            if not all("ratio" in row for row in rows):
                raise ValueError(
                    f"Not every run over {argument} holds times of {name}: give them a file of their own."
                )
            error = [[row["ratio"] - row["lowest"] for row in rows], [row["highest"] - row["ratio"] for row in rows]]
            above = [row["ratio"] - row["bound"] for row in rows]
            axes.errorbar(places, above, error, label=name, elinewidth=1, markersize=5, **style(index))
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xlabel(argument)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("step time minus bound\n(plain Trainer = 1)")
    figure.axes[0].legend(fontsize=7)
    return figure


def _draw_run(axes: Axes, run: dict[str, Any]) -> None:
    figures = {name: row for name, row in run["figures"].items() if name != "plain" and "ratio" in row}
    for k, line in run["bounds"].items():
        label, dashes = f"bound, {k} block{'s' * (k != '1')}", {"1": ":", "2": "-", "4": "--"}[k]
        axes.plot(range(len(line)), line, label=label, color="#999999", lw=1.2, ls=dashes, zorder=1)
    placed = {name: row for name, row in figures.items() if row.get("first_block") is not None}
    # Methods without a first block (one pass, other implementations) have a separate column.
    column = len(next(iter(run["bounds"].values()))) + 1
    rest = sorted((name for name in figures if name not in placed), key=lambda name: figures[name]["ratio"])
    for index, name in enumerate([*placed, *rest]):
        row = figures[name]
        x = row["first_block"] if name in placed else column
        error = [[row["ratio"] - row["lowest"]], [row["highest"] - row["ratio"]]]
        drawn = style(index) | {"linestyle": "none", "markersize": 6, "elinewidth": 1}
        axes.errorbar(x, row["ratio"], error, label=f"{name} {row['ratio']:.2f}", zorder=2, **drawn)
    axes.axhline(1, color="black", lw=0.8)
    places = [*range(0, column - 1, max(1, (column - 1) // 6)), column]
    axes.set_xticks(places, [*(str(place) for place in places[:-1]), "none\nor peer"])
    axes.set_xlabel("first perturbed block")
    axes.set_ylabel("step time, plain Trainer = 1")
    arguments = run["arguments"]
    name = arguments["model_name_or_path"] or f"BERT, {arguments['num_hidden_layers']} x {arguments['hidden_size']}"
    accumulation = arguments["gradient_accumulation_steps"]
    batch = f"{arguments['batch_size']} x {arguments['sequence_length']}"
    title = f"{name}{', LoRA' * arguments['lora']}, batch {batch}{f' x {accumulation}' * (accumulation > 1)}"
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
