"""
Tables of what a comparison measured beside its metric, by the rule of docs/evidence/flatness.md.

    python recipes/studies/flatness.py outputs/evidence/flatness --csv recipes/studies/results/flatness.csv
    python recipes/studies/flatness.py recipes/studies/results/flatness.csv

From the folder of a comparison, `--csv` writes one row for each run. Either way, it prints a table for each task and
figure: the mean difference of each method to the baseline with the same seed, its 95 % confidence interval, its
p-value after Holm's correction for the number of methods, and its share of SAM's mean difference. A figure that a task
does not have, such as those under shift, is left out.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy import stats

from hf_lsam_recipes.support.comparison.statistics import COSTS, mean_interval
from hf_lsam_recipes.support.markdown import markdown_table

# The figures by name, and their titles. The first two are primary. Lower is better for losses and calibration errors.
FIGURES = {
    "predict_nll_scaled": "scaled loss on test data",
    "shift_nll_scaled": "scaled loss under shift",
    "predict_nll": "loss on test data",
    "shift_nll": "loss under shift",
    "predict_ece": "calibration error on test data",
    "predict_accuracy": "accuracy on test data",
    "shift_accuracy": "accuracy under shift",
    "predict_matthews_correlation": "Matthews correlation on test data",
}
BASELINE, FULL = "AdamW", "SAM"


def collect(folder: Path) -> list[dict[str, Any]]:
    """One row for each finished run in the folder of a comparison, runs for tuning included."""
    rows = []
    for path in folder.rglob("result.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        row = {
            "task": result["task"],
            "method": result["method"],
            "chosen": " ".join(f"{name}={value}" for name, value in result["chosen"].items()),
            "stage": "tuning" if result["tuning"] else "compared",
            "seed": str(result["seed"]),
        }
        # As in the runs.csv of a comparison.
        metric = "eval_nll_scaled" if result["tuning"] else "predict_nll_scaled"
        row |= {"metric": metric, "value": result["metrics"][metric]}
        row |= {name: result["metrics"].get(name, "") for name in (*FIGURES, "train_loss")}
        row |= {name: result[name] for name in (*COSTS, "commit", "machine")}
        versions = " ".join(f"{name}={version}" for name, version in result["versions"].items())
        rows.append(row | {"versions": versions})
    if not rows:
        raise ValueError(f"{folder} holds no finished run: there is no result.json in it.")
    return sorted(rows, key=lambda row: [row[name] for name in ("task", "method", "stage", "chosen", "seed")])


def holm(p_values: Sequence[float]) -> list[float]:
    """
    P-values after the correction for their number (Holm, 1979).

    The k-th smallest of n, from k = 0 on, is multiplied by n - k. None is below that of a smaller one, or above 1.
    """
    order = np.argsort(p_values)
    corrected = np.maximum.accumulate(np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)).clip(max=1)
    return corrected[np.argsort(order)].tolist()


def table(runs: Sequence[dict[str, Any]], figure: str) -> list[dict[str, str]]:
    """
    The rows of a table.

    Args:
        runs (`list[dict]`): Compared runs of one task, as `collect` returns them.
        figure (`str`): A name of `FIGURES`.
    """
    by_method: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        by_method.setdefault(run["method"], {})[run["seed"]] = run
    baseline = by_method.pop(BASELINE)

    def pairs(method: str, name: str) -> list[tuple[float, float]]:
        """The figures of a method and the baseline with the same seed."""
        own = by_method[method]
        return [(float(own[seed][name]), float(baseline[seed][name])) for seed in own if seed in baseline]

    apart = {method: [one - other for one, other in pairs(method, figure)] for method in by_method}
    corrected = dict(zip(apart, holm([p_value(differences) for differences in apart.values()]), strict=True))
    values = [float(run[figure]) for run in baseline.values()]
    rows = [{"method": BASELINE, "value": f"{fmean(values):.4f}", "seeds": str(len(values))}]
    for method, differences in apart.items():
        chosen = next(iter(by_method[method].values()))["chosen"]
        full = fmean(apart[FULL]) if FULL in apart else 0.0
        rows.append(
            {
                "method": f"{method} ({chosen})" if chosen else method,
                "value": f"{fmean(float(run[figure]) for run in by_method[method].values()):.4f}",
                "seeds": str(len(differences)),
                "difference (95 %)": f"{mean_interval(differences):+.4f}",
                "p (Holm)": f"{corrected[method]:.3f}",
                "share of SAM's": f"{fmean(differences) / full:.0%}" if full else "",
                "training time": f"{fmean(one / other for one, other in pairs(method, 'training_seconds')):.2f}",
                "FLOPs": f"{fmean(one / other for one, other in pairs(method, 'flops')):.2f}",
            }
        )
    return [{name: row.get(name, "") for name in rows[-1]} for row in rows]


def p_value(differences: Sequence[float]) -> float:
    """Of Student's t that the mean is 0; 1 if all are 0, or there are fewer than two."""
    if len(differences) < 2 or not any(differences):
        return 1.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of a comparison, or a file that --csv wrote")
    parser.add_argument("--csv", type=Path, help="file to write, one row for each run")
    args = parser.parse_args(argv)
    try:
        if args.results.is_dir():
            runs = collect(args.results)
        else:
            with args.results.open(encoding="utf-8", newline="") as file:
                runs = list(csv.DictReader(file))
        if args.csv is not None:
            with args.csv.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(runs[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(runs)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"Error: {error}")
    compared = [run for run in runs if run["stage"] == "compared"]
    for task in dict.fromkeys(run["task"] for run in compared):
        own = [run for run in compared if run["task"] == task]
        for figure, title in FIGURES.items():
            if all(run[figure] != "" and math.isfinite(float(run[figure])) for run in own):
                print(f"\n## {task}: {title}\n\n{markdown_table(table(own, figure))}")


if __name__ == "__main__":
    main()
