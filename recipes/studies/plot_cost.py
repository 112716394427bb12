"""
Plot the results of the benchmark: step time against the first perturbed block, with the bound and other
implementations; or the difference of measured time and bound for growing models or steps.

    python recipes/studies/plot_cost.py recipes/studies/results/cost_12_blocks.json cost.svg
    python recipes/studies/plot_cost.py recipes/studies/results/growth.json growth.svg --over num_hidden_layers
"""

import argparse
import sys
from pathlib import Path

from hf_lsam_recipes.support.figures.cost import draw_cost, growth, read_runs


def main(argv: list[str] | None = None):
    """Run the command line `argv`: read the results and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("results", type=Path, help="output_file of the benchmark")
    parser.add_argument("picture", type=Path, help="the picture to write, for instance .svg or .png")
    parser.add_argument(
        "--over", nargs="+", metavar="ARGUMENT", help="plot the difference against these arguments instead"
    )
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.results)
        if not runs or not all({"arguments", "bounds", "figures"} <= run.keys() for run in runs):
            raise ValueError(f"{args.results} holds no runs of this benchmark that can be drawn.")
        if args.over:
            growth(runs, args.over).savefig(args.picture)
        else:
            draw_cost(runs, args.picture)
    except (OSError, ValueError) as error:
        sys.exit(f"plot_cost.py: {error}")


if __name__ == "__main__":
    main()
