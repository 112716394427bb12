"""
Draw the figures of a comparison as SVG and PNG, in a folder for each task.

    python recipes/plot.py outputs/compare/glue_small figures/

They correspond to Figures 1 to 5 of the paper (gradient norms of the layers, loss landscapes of the layers, learning
curves, gradient norm of the whole model, perturbations of each layer), plus accuracy against cost. If the results lack
the data of a figure, it is skipped, and the reason is printed to stderr.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from hf_lsam_recipes.support.comparison.plan import slug
from hf_lsam_recipes.support.comparison.series import ResultsError, TaskResults, read_results
from hf_lsam_recipes.support.comparison.statistics import COSTS
from hf_lsam_recipes.support.figures.comparison import (
    NotDrawnError,
    accuracy_over_cost,
    gradient_norm,
    layer_gradient_norms,
    layer_landscapes,
    learning_curves,
    perturbations,
)


def draw(results: TaskResults, cost: str) -> dict[str, Figure]:
    """
    Draw the figures of a task, by name. Reasons for skipped figures are printed to stderr.

    Args:
        results (`TaskResults`): The runs of the task.
        cost (`str`): The cost on the x axis of `accuracy_over_cost`, a key of `COSTS`.
    """
    figures: dict[str, Callable[[TaskResults], Figure]] = {
        "layer_gradient_norms": layer_gradient_norms,
        "layer_landscapes": layer_landscapes,
        "learning_curves": learning_curves,
        "gradient_norm": gradient_norm,
        "perturbations": perturbations,
        "accuracy_over_cost": partial(accuracy_over_cost, cost=cost),
    }
    drawn: dict[str, Figure] = {}
    if len(results.seeds) == 1:
        _warn(f"{results.task}: there is only one seed, so the figures show no variation between seeds.")
    if cost.endswith("seconds") and any(run["processes"] > 1 for runs in results.runs.values() for run in runs):
        _warn(f"{results.task}: several runs shared the machine, so times are inaccurate. --cost flops avoids them.")
    for method, runs in results.runs.items():
        if not all(math.isfinite(run["metrics"].get(results.metric, 0.0)) for run in runs):
            _warn(f"{results.task}: {results.metric} of {method} is not finite, so it is not drawn against cost.")
    for name, figure in figures.items():
        try:
            drawn[name] = figure(results)
        except NotDrawnError as reason:
            _warn(f"{results.task}: {name} is not drawn: {reason}.")
    return drawn


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure to `stem`.svg and `stem`.png, reproducibly to the byte; returns the paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("svg", "png")]
    with matplotlib.rc_context({"svg.hashsalt": stem.name}):
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1])
    return paths


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().partition("\n")[0], allow_abbrev=False)
    parser.add_argument("results", type=Path, help="output_dir of compare.py")
    parser.add_argument("figures", type=Path, help="folder for the pictures")
    parser.add_argument(
        "--cost",
        choices=list(COSTS),
        default="training_seconds",
        help="cost on the x axis of accuracy_over_cost (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        for results in read_results(args.results):
            for name, figure in draw(results, args.cost).items():
                for path in save(figure, args.figures / slug(results.task) / name):
                    print(path)
    except ResultsError as error:
        sys.exit(f"plot.py: {error}")


def script() -> None:
    """Entry point of the script and of `hf-lsam plot`."""
    main()


if __name__ == "__main__":
    script()
