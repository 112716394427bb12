"""
Tables of what a comparison measured beside its metric, by the rule of docs/evidence/flatness.md.

    python recipes/studies/flatness.py outputs/evidence/flatness --csv recipes/studies/results/flatness.csv
    python recipes/studies/flatness.py recipes/studies/results/flatness.csv recipes/studies/results/flatness_tasks.csv
    python recipes/studies/flatness.py recipes/studies/results/flatness.csv --picture docs/evidence/flatness.png

From the folder of a comparison, `--csv` writes one row for each run. In any case, it prints a table for each task and
figure: the mean difference of each method to the baseline with the same seed, its 95 % confidence interval, its
p-value after Holm's correction for the number of methods, and its share of SAM's mean difference. A figure that a task
does not have, such as those under shift, is left out. At the end are two tables for each primary figure: the mean
differences on all tasks, with those that are an effect by the rule, and on which tasks each method reaches the goal of
the rule, or what it lacks. `--picture` draws the primary figures over the training time.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_lsam_recipes.studies.effects import (
    BASELINE,
    FIGURES,
    FULL,
    PRIMARY,
    Runs,
    baseline_values,
    bounded_metric,
    by_task,
    effects,
    has,
    read_runs,
    shortfall,
)
from hf_lsam_recipes.support.markdown import markdown_table


def table(runs: Runs, figure: str) -> list[dict[str, str]]:
    """
    The rows of a table.

    Args:
        runs (`list[dict]`): Compared runs of one task.
        figure (`str`): A name of `FIGURES`.
    """
    values = baseline_values(runs, figure)
    rows = [{"method": BASELINE, "value": f"{fmean(values):.4f}", "seeds": str(len(values))}]
    rows += [
        {
            "method": f"{method} ({effect.chosen})" if effect.chosen else method,
            "value": f"{effect.mean:.4f}",
            "seeds": str(len(effect.differences)),
            "difference (95 %)": f"{effect.interval:+.4f}",
            "p (Holm)": f"{effect.p:.3f}",
            "share of SAM's": percent(effect.share),
            "training time": f"{effect.time:.2f}",
            "FLOPs": f"{effect.flops:.2f}",
        }
        for method, effect in effects(runs, figure).items()
    ]
    return [{name: row.get(name, "") for name in rows[-1]} for row in rows]


def overview(tasks: dict[str, Runs], figure: str) -> list[dict[str, str]]:
    """The mean difference of each method to the baseline on each of `tasks`, and whether it is an effect."""
    found = {task: effects(runs, figure) for task, runs in tasks.items() if has(runs, figure)}
    values = {task: f"{fmean(baseline_values(tasks[task], figure)):.3f}" for task in found}
    rows = [{"method": f"{BASELINE} (value)"} | values | {"time": "1.00", "FLOPs": "1.00"}]
    for method in dict.fromkeys(method for of_task in found.values() for method in of_task):
        row, present = {"method": method}, []
        for task, of_task in found.items():
            if method not in of_task:
                row[task] = "not run"
                continue
            effect = of_task[method]
            shown = f"{effect.interval.mean:+.3f}"
            row[task] = f"{shown} (effect)" if effect.p < 0.05 else shown
            present.append(effect)
        costs = {"time": fmean(e.time for e in present), "FLOPs": fmean(e.flops for e in present)}
        rows.append(row | {name: f"{cost:.2f}" for name, cost in costs.items()})
    return rows if found else []


def goal_table(tasks: dict[str, Runs], figure: str) -> list[dict[str, str]]:
    """For each method, on which of `tasks` it reaches the goal (its share of SAM's effect), or what it lacks.

    Tasks on which SAM did not run are left out, and those without a metric that the goal bounds.
    """
    bounded = {task: runs for task, runs in tasks.items() if bounded_metric(runs) is not None}
    found = {task: effects(runs, figure) for task, runs in bounded.items() if has(runs, figure)}
    found = {task: of_task for task, of_task in found.items() if FULL in of_task}
    methods = dict.fromkeys(m for of_task in found.values() for m in of_task if not m.startswith(BASELINE))
    rows = []
    for method in methods:
        row, reached = {"method": method}, 0
        for task, of_task in found.items():
            if method not in of_task:
                row[task] = "not run"
                continue
            lacks = shortfall(method, tasks[task], figure)
            shown = percent(of_task[method].share)
            reached += lacks is None
            row[task] = f"{shown} ({lacks or 'reached'})".strip()
        rows.append(row | {"reached": str(reached)})
    return rows


def percent(share: float | None) -> str:
    """A share in percent; nothing for `None`."""
    return "" if share is None else f"{100 * share:.0f} %".replace("-0 ", "0 ")


def write_csv(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the rows to a file, without the figures that none of them has."""
    names = [name for name in runs[0] if name not in FIGURES or any(run[name] != "" for run in runs)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(runs)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="folders of comparisons, or files that --csv wrote")
    parser.add_argument("--csv", type=Path, help="file to write, one row for each run")
    parser.add_argument("--picture", type=Path, help="picture of the primary figures over the time, .png or .svg")
    args = parser.parse_args(argv)
    try:
        runs = [run for path in args.results for run in read_runs(path)]
        if args.csv is not None:
            write_csv(runs, args.csv)
        tasks = by_task(runs)
        if args.picture is not None:
            # Imported late: matplotlib is only needed for pictures.
            from hf_lsam_recipes.studies.frontier import draw_frontier

            draw_frontier(tasks).savefig(args.picture)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"flatness.py: {error}")
    for task, own in tasks.items():
        for figure, title in FIGURES.items():
            if has(own, figure):
                print(f"\n## {task}: {title}\n\n{markdown_table(table(own, figure))}")
    for figure in PRIMARY:
        for title, rows in (("All tasks", overview(tasks, figure)), ("The goal", goal_table(tasks, figure))):
            if rows:
                print(f"\n## {title}: {FIGURES[figure]}\n\n{markdown_table(rows)}")


if __name__ == "__main__":
    main()
