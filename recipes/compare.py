"""
Compare methods: tune each on its grid, then run each on every task with every seed.

    python recipes/compare.py recipes/compare/glue_small.yaml --set data_dir=path/to/glue

Each run is a separate process, and several run in parallel. Runs with the same seed see the same data in the same
order and start from the same weights. Finished runs are kept, so the same command resumes a stopped comparison.
"""

import argparse
import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_lsam_recipes.support.comparison.check import check_comparison
from hf_lsam_recipes.support.comparison.config import read_comparison
from hf_lsam_recipes.support.comparison.plan import CompareError, Comparison, Run
from hf_lsam_recipes.support.comparison.runs import run_all
from hf_lsam_recipes.support.shipped import RECIPES, find_yaml

# Options that change the data: each value has its results in a separate folder.
DATA_CHANGES = ("label_noise", "train_fraction")


def compare(comparison: Comparison) -> list[str]:
    """
    Run all runs without a result, tuning runs first.

    Returns:
        `list[str]`: The problem of each run that failed.

    Raises:
        CompareError: before the first run, if a setting is wrong, the output directory cannot be created, or it
            contains a result of other settings.
    """
    problems: list[str] = []
    stamp: dict[str, Any] = {}
    try:
        comparison.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompareError(
            f"output_dir={comparison.output_dir} cannot be created ({error.strerror}): name another folder."
        ) from error
    # Results of other settings are refused here, before hours of work.
    for run in comparison.final_runs():
        run.result()
    for stage, plan in (("Tuning", comparison.tuning_runs), ("Comparing", comparison.final_runs)):
        runs = plan()
        missing = [run for run in runs if run.result() is None]
        if missing:
            if not stamp:
                check_comparison(comparison)
                stamp = make_stamp()
            problems += run_stage(stage, missing, len(runs), comparison, stamp)
    return problems


def run_stage(
    stage: str, missing: Sequence[Run], count: int, comparison: Comparison, stamp: dict[str, Any]
) -> list[str]:
    """Run the `missing` runs of a stage of `count` runs, with a progress bar; returns the problems."""
    problems: list[str] = []
    with tqdm(total=count, initial=count - len(missing), desc=stage, unit="run", smoothing=0) as bar:

        def on_end(run: Run, problem: str | None):
            if problem is not None:
                problems.append(problem)
                bar.write(problem, file=sys.stderr)
            bar.update()

        run_all(missing, comparison, stamp, on_end)
    return problems


def make_stamp() -> dict[str, Any]:
    """
    Find commit, versions and machine.

    This needs torch, whose memory would add to the peak memory of the runs that this process starts. So a separate
    process does it.
    """
    command = [sys.executable, str(RECIPES / "support" / "stamp.py")]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit code: 1 if a run failed or is missing, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().partition("\n")[0], allow_abbrev=False)
    parser.add_argument("config", help="YAML of tasks, methods and seeds, or the name of a shipped one")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the recipe for all runs"
    )
    parser.add_argument("--label_noise", metavar="P", help="flip this share of the training labels")
    parser.add_argument("--train_fraction", metavar="P", help="train on this share of the training data")
    parser.add_argument("--recipe", help="script of each run; a YAML can only name a shipped recipe")
    parser.add_argument("--output_dir", help="folder of the runs and the report")
    parser.add_argument("--seeds", nargs="+", help="seeds of the compared runs")
    parser.add_argument("--processes", help="number of parallel runs")
    parser.add_argument("--threads", help="threads of each run")
    parser.add_argument("--report_only", action="store_true", help="start no run, and report the finished ones")
    args = parser.parse_args(argv)
    try:
        comparison = read_comparison(find_comparison(args.config), *read_overrides(args))
        if apart := [f"{name}-{getattr(args, name)}" for name in DATA_CHANGES if getattr(args, name) is not None]:
            comparison = dataclasses.replace(comparison, output_dir=comparison.output_dir / "_".join(apart))
        problems = [] if args.report_only else compare(comparison)
        # Imported late: the memory of this process adds to the peak memory of the runs that it starts.
        from hf_lsam_recipes.support.comparison.report import write_report

        missing = write_report(comparison)
    except CompareError as error:
        sys.exit(f"compare.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. Finished runs are kept; the same command resumes.")
    return 1 if missing or problems else 0


def find_comparison(name: str) -> Path:
    """The YAML of a comparison, from its path or the name of a shipped one; raises `CompareError` if there is none."""
    try:
        return find_yaml(name, "compare")
    except ValueError as error:
        raise CompareError(str(error)) from error


def read_overrides(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """The command line's replacements of top-level names of the YAML, and of settings of the recipe."""
    settings: dict[str, str] = {}
    for item in args.set:
        name, sign, value = item.partition("=")
        if not sign:
            raise CompareError(f"--set takes NAME=VALUE, but got {item!r}.")
        settings[name] = value
    names = ("recipe", "output_dir", "seeds", "processes", "threads")
    overrides = {name: value for name in names if (value := getattr(args, name)) is not None}
    settings |= {name: value for name in DATA_CHANGES if (value := getattr(args, name)) is not None}
    return overrides, settings


def script() -> None:
    """Entry point of the script and of `hf-lsam compare`."""
    # Stopping this process must stop the runs that it waits for.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    sys.exit(main())


if __name__ == "__main__":
    script()
