"""
Tables of what a comparison measured beside its metric, by the rule of docs/evidence/flatness.md.

    python recipes/studies/flatness.py outputs/evidence/flatness --csv recipes/studies/results/flatness.csv
    python recipes/studies/flatness.py recipes/studies/results/flatness.csv

From the folder of a comparison, `--csv` writes one row for each run. Either way, it prints a table for each task and
figure: the mean difference of each method to the baseline with the same seed, its 95 % confidence interval, its p-value
after Holm's correction for the number of methods, and its share of SAM's mean difference. Figures of other data, as
those under shift, are left out where a task has none.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from hf_lsam_recipes.support.comparison.statistics import mean_interval
from hf_lsam_recipes.support.markdown import markdown_table

# The figures of a table by name, and their titles; the first two are primary, and lower is better for all but accuracy.
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


def collect(folder: Path) -> pd.DataFrame:
    """One row for each finished run in the folder of a comparison, runs for tuning included."""
    rows = []
    for path in sorted(folder.rglob("result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        rows.append(
            {
                "task": result["task"],
                "method": result["method"],
                "chosen": " ".join(f"{name}={value}" for name, value in result["chosen"].items()),
                "stage": "tuning" if result["tuning"] else "compared",
                "seed": result["seed"],
                **{name: result["metrics"].get(name) for name in ("eval_nll_scaled", *FIGURES, "train_loss")},
                **{name: result[name] for name in ("training_seconds", "step_seconds", "flops", "commit", "machine")},
                "versions": " ".join(f"{name}={version}" for name, version in result["versions"].items()),
            }
        )
    if not rows:
        raise ValueError(f"{folder} holds no finished run: there is no result.json in it.")
    return pd.DataFrame(rows).dropna(axis="columns", how="all")


def holm(p_values: Sequence[float]) -> list[float]:
    """
    P-values after the correction for their number (Holm, 1979).

    The k-th smallest of n, from k = 0 on, is multiplied by n - k; none is less than that of a smaller one, nor above 1.
    """
    order = np.argsort(p_values)
    corrected = np.maximum.accumulate(np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)).clip(max=1)
    return corrected[np.argsort(order)].tolist()


def table(runs: pd.DataFrame, figure: str) -> list[dict[str, str]]:
    """
    The rows of a table.

    Args:
        runs (`pd.DataFrame`): Compared runs of one task, as `collect` returns them.
        figure (`str`): A name of `FIGURES`.
    """
    values = runs.pivot(index="seed", columns="method", values=figure)
    seconds, flops = (
        runs.pivot(index="seed", columns="method", values=name) for name in ("training_seconds", "flops")
    )
    methods = [method for method in dict.fromkeys(runs["method"]) if method != BASELINE]
    apart = {method: (values[method] - values[BASELINE]).dropna() for method in methods}
    corrected = dict(zip(methods, holm([stats.ttest_1samp(apart[m], 0.0).pvalue for m in methods]), strict=True))
    rows = [{"method": BASELINE, "value": f"{values[BASELINE].mean():.4f}", "seeds": str(values[BASELINE].count())}]
    for method in methods:
        interval, chosen = mean_interval(apart[method].tolist()), runs.loc[runs["method"] == method, "chosen"].iloc[0]
        share = apart[method].mean() / apart[FULL].mean() if FULL in apart else np.nan
        rows.append(
            {
                "method": f"{method} ({chosen})" if chosen else method,
                "value": f"{values[method].mean():.4f}",
                "seeds": str(len(apart[method])),
                "difference (95 %)": f"{interval:+.4f}",
                "p (Holm)": f"{corrected[method]:.3f}",
                "share of SAM's": f"{share:.0%}",
                "training time": f"{(seconds[method] / seconds[BASELINE]).mean():.2f}",
                "FLOPs": f"{(flops[method] / flops[BASELINE]).mean():.2f}",
            }
        )
    return [{name: row.get(name, "") for name in rows[-1]} for row in rows]


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of a comparison, or a file that --csv wrote")
    parser.add_argument("--csv", type=Path, help="file to write, one row for each run")
    args = parser.parse_args(argv)
    try:
        runs = collect(args.results) if args.results.is_dir() else pd.read_csv(args.results, keep_default_na=False)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"Error: {error}")
    if args.csv is not None:
        runs.to_csv(args.csv, index=False)
    compared = runs[runs["stage"] == "compared"]
    for task, own in compared.groupby("task", sort=False):
        for figure, title in FIGURES.items():
            if figure in own and pd.to_numeric(own[figure], errors="coerce").notna().all():
                print(f"\n## {task}: {title}\n\n{markdown_table(table(own.astype({figure: float}), figure))}")


if __name__ == "__main__":
    main()
