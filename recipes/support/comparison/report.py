"""The report of `compare.py`: on the console, as Markdown, as a self-contained HTML page, and all runs as CSV."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_lsam_recipes.support.comparison.console import show
from hf_lsam_recipes.support.comparison.html import draw_panels, page
from hf_lsam_recipes.support.comparison.plan import CompareError, Comparison, Run, Task, metric_of
from hf_lsam_recipes.support.comparison.statistics import COSTS, Row, mean_interval, missing_runs, remarks, table
from hf_lsam_recipes.support.json_files import write_json
from hf_lsam_recipes.support.markdown import escape, markdown_table

FIGURES = (*COSTS, "wall_seconds")


def write_report(comparison: Comparison) -> list[str]:
    """
    Write `report.md`, `report.html`, `runs.csv` and `results.json`, and print the tables.

    Returns:
        `list[str]`: Names of the runs that are missing.

    Raises:
        CompareError: if there is no finished run.
    """
    finished, results = _results(comparison.final_runs())
    tuning = _results(comparison.tuning_runs())[1]
    if not results and not tuning:
        raise CompareError(f"output_dir={comparison.output_dir} holds no finished run to report: run it first.")
    missing = missing_runs(comparison, finished)
    tables = {task.name: table(comparison, task, results) for task in comparison.tasks}
    notes = remarks(comparison, tuning + results, missing)
    sections = [(task.name, caption(comparison, task), lines(tables[task.name])) for task in comparison.tasks]
    panels = [draw_panels(comparison, task, tables[task.name], results) for task in comparison.tasks]
    output = comparison.output_dir
    (output / "report.md").write_text(markdown(sections, notes), encoding="utf-8")
    (output / "report.html").write_text(page(sections, panels, notes), encoding="utf-8")
    write_csv(output / "runs.csv", comparison, tuning + results)
    directions = {task.name: task.greater_is_better for task in comparison.tasks}
    report = {"baseline": comparison.baseline, "greater_is_better": directions}
    write_json(output / "results.json", report | {"runs": results, "tuning_runs": tuning})
    show(sections, notes)
    print(f"\nReport with pictures: {output / 'report.html'}. All runs: {output / 'runs.csv'}.")
    return missing


def markdown(sections: Sequence[tuple[str, str, list[dict[str, str]]]], notes: Sequence[str]) -> str:
    """
    The report as Markdown.

    Args:
        sections: For each task its name, the caption of its table, and the rows of the table.
        notes: Caveats for the reader.
    """
    parts = ["# Comparison", *(f"**{escape(note)}**" for note in notes)]
    for title, text, rows in sections:
        parts += [f"## {escape(title)}", escape(text), markdown_table(rows)]
    return "\n\n".join(parts) + "\n"


def caption(comparison: Comparison, task: Task) -> str:
    """The caption of a task's table."""
    tuned = any(len(method.candidates) > 1 for method in comparison.methods)
    return (
        f"{task.metric}, {_better(task.greater_is_better)}: mean (range). Differences are "
        f"to {comparison.baseline} with the same seed, with their 95 % interval (Student's t, not corrected for the "
        f"number of methods); costs are means of the ratios to it. Seeds {', '.join(map(str, comparison.seeds))}."
        + f" Settings were chosen by {task.tuning_metric}, {_better(task.tuning_greater_is_better)}, seeds "
        f"{', '.join(map(str, comparison.tuning_seeds))}." * tuned
    )


def lines(rows: Sequence[Row]) -> list[dict[str, str]]:
    """
    The rows of a table, as text, by the titles of the columns.

    A column that is empty throughout is left out, and so is `tried` where no method had settings to choose from.
    """
    found = [_cells(row) for row in rows]
    names = [name for name in found[0] if any(line[name] for line in found)]
    if all(row.tried == 1 for row in rows):
        names.remove("tried")
    return [{name: line[name] for name in names} for line in found]


def write_csv(path: Path, comparison: Comparison, results: Sequence[dict[str, Any]]) -> None:
    """Write one row per run, tuning runs included."""
    tasks = {task.name: task for task in comparison.tasks}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        stamped = ("commit", "machine", "resumed", "processes", "threads")
        last = ("versions", "baseline", "greater_is_better")
        writer.writerow(["task", "method", "chosen", "stage", "seed", "metric", "value", *FIGURES, *stamped, *last])
        for result in results:
            task, tuning = tasks[result["task"]], result["tuning"]
            metric = task.tuning_metric if tuning else task.metric
            writer.writerow(
                [
                    result["task"],
                    result["method"],
                    " ".join(f"{name}={value}" for name, value in result["chosen"].items()),
                    "tuning" if tuning else "compared",
                    result["seed"],
                    metric,
                    metric_of(result, metric),
                    *(result[name] for name in FIGURES + stamped),
                    " ".join(f"{name}={number}" for name, number in result["versions"].items()),
                    comparison.baseline,
                    task.tuning_greater_is_better if tuning else task.greater_is_better,
                ]
            )


def _results(runs: Sequence[Run]) -> tuple[list[Run], list[dict[str, Any]]]:
    """The finished runs among `runs`, and their results."""
    pairs = [(run, result) for run in runs if (result := run.result()) is not None]
    return [run for run, _ in pairs], [result for _, result in pairs]


def _better(greater_is_better: bool) -> str:
    return f"{'higher' if greater_is_better else 'lower'} is better"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _cells(row: Row) -> dict[str, str]:
    """All cells of a row; the range of a single value is left out."""
    values, difference = list(row.values.values()), row.difference
    mean = f"{mean_interval(values).mean:.4f}" if values else "missing"
    if len(values) > 1 and all(map(math.isfinite, values)):
        mean += f" ({min(values):.4f} to {max(values):.4f})"
    return {
        "method": row.method,
        "chosen": ", ".join(f"{name}={value}" for name, value in row.chosen.items()),
        "tried": str(row.tried),
        "mean (range)": mean,
        "difference [95 %]": f"{difference:+.4f}" if difference is not None else "",
        "wins / losses": f"{row.wins} / {row.losses}" if difference is not None else "",
        **{title: _times(row.costs[name]) for name, title in COSTS.items()},
        "n": str(len(values)),
    }
