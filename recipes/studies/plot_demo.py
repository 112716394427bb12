"""
Plot the results of the demo: learning curves, cost, and the perturbed blocks over the training.

    python recipes/studies/plot_demo.py demo/results.json demo/results.png
"""

import argparse
import sys
from pathlib import Path

from hf_lsam_recipes.support.figures.demo import draw, read_demo


def main(argv: list[str] | None = None):
    """Run the command line `argv`: read the results and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("results", type=Path, help="results.json of the demo")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    args = parser.parse_args(argv)
    try:
        draw(read_demo(args.results), args.picture)
    except (OSError, ValueError) as error:
        sys.exit(f"plot_demo.py: {error}")


if __name__ == "__main__":
    main()
