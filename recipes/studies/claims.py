"""
Test two claims of the paper on the results of a comparison, with 95 % confidence intervals over the seeds.

    python recipes/studies/claims.py outputs/compare/glue_small

- Penalising a few layers lowers the gradient norm of the whole model: its mean over the last third of the training, as
  a ratio to the baseline with the same seed. Less than 1 supports the claim.
- The layers with large gradients stay the same: for the layers' mean gradient norms in the first, second and last
  third of the training, Kendall's W (1: one ranking in all three, 1/3: by chance), Spearman's rank correlation of
  the first with the last (by chance 0), and the share of the top k of the first that is in the top k of the last (by
  chance k / layers; with as few layers as k, or fewer, always 1).

Set `gradient_norm_steps` in the comparison's settings: both claims are then tested on the gradients of the plain
loss on the same rows in every run. Without it, the first uses the gradients that the optimizer received, which SAM
computes at perturbed weights, and the second the perturbed steps of layer-wise methods. A method that overfits the
measured rows, as plain training on little data soon does, has almost no gradient there. So compare the training losses
as well when you interpret the first result.
"""

import argparse
import csv
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from hf_lsam_recipes.support.comparison.series import (
    Curve,
    ResultsError,
    TaskResults,
    block_norms,
    read_results,
    whole_norms,
)
from hf_lsam_recipes.support.comparison.statistics import mean_interval
from hf_lsam_recipes.support.markdown import markdown_table

PARTS = 3


@dataclass(frozen=True)
class Consistency:
    """Agreement of the rankings of layers by gradient norm over the parts of a training; see the docstring above."""

    kendall_w: float
    spearman: float
    overlap: float


RANKING = tuple(field.name for field in fields(Consistency))


def late_mean(curve: Curve) -> float | None:
    """The mean of a curve over the last third of the steps, or `None` where it has no point there."""
    late = [value for step, value in curve.items() if step > max(curve) * (PARTS - 1) / PARTS]
    return float(np.mean(late)) if late else None


def norm_ratios(results: TaskResults, method: str) -> dict[int, float]:
    """By seed, the ratio to the baseline of the whole model's gradient norm over the last third of the training."""
    measured = results.measured()

    def late(name: str) -> dict[int, float]:
        means = {run["seed"]: late_mean(whole_norms(run, measured)) for run in results.runs[name]}
        return {seed: mean for seed, mean in means.items() if mean is not None}

    own, base = late(method), late(results.baseline)
    return {seed: own[seed] / base[seed] for seed in own if base.get(seed)}


def consistency(norms: dict[str, Curve], k: int) -> Consistency | None:
    """
    Agreement of the rankings of the layers of a run.

    Args:
        norms (`dict[str, Curve]`): The gradient norm of each layer, by step.
        k (`int`): Number of top layers whose overlap is computed.

    Returns:
        `Consistency` or `None`: `None` if there is no ranking: fewer than 2 layers, fewer steps than parts, equal
        norms, or a norm that is not finite.
    """
    steps = sorted(set.intersection(*map(set, norms.values()))) if norms else []
    if len(steps) < PARTS or len(norms) < 2:
        return None
    parts = np.array_split(steps, PARTS)
    means = np.array([[np.mean([curve[step] for step in part]) for curve in norms.values()] for part in parts])
    if not np.isfinite(means).all() or (means == means[:, :1]).all(axis=1).any():
        return None
    pairs = [stats.spearmanr(one, other).statistic for one, other in itertools.combinations(means, 2)]
    first, last = (set(np.argsort(-means[part], kind="stable")[:k].tolist()) for part in (0, -1))
    return Consistency(
        # Kendall's W from the mean rank correlation of all pairs.
        kendall_w=float((1 + (PARTS - 1) * np.mean(pairs)) / PARTS),
        spearman=float(stats.spearmanr(means[0], means[-1]).statistic),
        overlap=len(first & last) / min(k, len(norms)),
    )


def figures(results: TaskResults, k: int) -> list[dict[str, Any]]:
    """One row per run: its results, `None` where there is none, and commit, machine and versions."""
    measured = results.measured()
    rows = []
    for method, runs in results.runs.items():
        ratios = norm_ratios(results, method) if method != results.baseline else {}
        for run in runs:
            ranking = consistency(block_norms(run, measured), k)
            rows.append(
                {"task": results.task, "method": method, "seed": run["seed"], "measured": measured, "top_k": k}
                | {"norm_ratio": ratios.get(run["seed"])}
                | (asdict(ranking) if ranking else dict.fromkeys(RANKING))
                | {"commit": run["commit"], "machine": run["machine"]}
                | {"versions": " ".join(f"{name}={number}" for name, number in run["versions"].items())}
            )
    return rows


def table(results: TaskResults, rows: Sequence[dict[str, Any]], k: int) -> str:
    """Markdown: a row for each method."""
    titles = [f"late gradient norm / {results.baseline}", "Kendall's W", "Spearman", f"top {k} kept"]
    lines = []
    for method in results.runs:
        own = [row for row in rows if row["method"] == method]
        columns = [[row[name] for row in own if row[name] is not None] for name in ("norm_ratio", *RANKING)]
        intervals = [f"{mean_interval(values):.3f}" if values else "" for values in columns]
        lines.append({"method": method, **dict(zip(titles, intervals, strict=True)), "n": len(own)})
    return markdown_table(lines)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write `rows`, with an empty cell for `None`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().partition("\n")[0], allow_abbrev=False)
    parser.add_argument("results", type=Path, help="output_dir of compare.py")
    parser.add_argument("--top_k", type=int, default=2, help="number of layers that count as critical (default: 2)")
    parser.add_argument("--csv", type=Path, help="file for the results of each run")
    args = parser.parse_args(argv)
    if args.top_k < 1:
        parser.error(f"--top_k counts layers and must be at least 1, but is {args.top_k}.")
    if args.csv and not args.csv.parent.is_dir():
        parser.error(f"--csv cannot be written: there is no folder {args.csv.parent}.")
    try:
        found = read_results(args.results)
    except ResultsError as error:
        sys.exit(f"claims.py: {error}")
    rows = {results.task: figures(results, args.top_k) for results in found}
    for results in found:
        what = "measured on the same rows" if results.measured() else "as logged, not measured on the same rows"
        print(f"## {results.task}\n\nGradient norms {what}.\n\n{table(results, rows[results.task], args.top_k)}\n")
    if args.csv:
        write_csv(args.csv, list(itertools.chain.from_iterable(rows.values())))


if __name__ == "__main__":
    main()
