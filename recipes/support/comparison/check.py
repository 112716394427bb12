"""
Checks before a comparison that the recipe accepts all settings and reports the metrics.

`check_comparison` runs this module in a separate process: parsing settings imports torch, whose memory would add to
the peak memory of the runs that `compare.py` starts.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_lsam_recipes.support.comparison.plan import CompareError, Comparison
from hf_lsam_recipes.support.metric_names import find_score
from hf_lsam_recipes.support.shipped import RECIPES, did_you_mean

# Metrics that each recipe reports for every split, and for the training.
COMMON = ("loss", "runtime", "samples", "samples_per_second", "steps_per_second")
TRAINING = (*COMMON, "step_seconds", "peak_memory_mib", "truncated", "dropped")
# Maximum number of runs that are named for a problem.
_MAX_NAMED = 2


def check_comparison(comparison: Comparison) -> None:
    """
    Raise `CompareError` with all problems of the settings and metrics of the runs.

    A recipe outside this folder is not checked: its settings are not known.
    """
    if comparison.recipe.parent != RECIPES:
        return
    metrics = {
        (task.name, tuning): m
        for task in comparison.tasks
        for tuning, m in ((False, task.metric), (True, task.tuning_metric))
    }
    runs = [
        {"name": run.name, "settings": run.settings, "metric": metrics[run.task, run.tuning]}
        for run in comparison.possible_runs()
    ]
    print(f"Checking the settings of {len(runs)} runs ...", file=sys.stderr)
    command = [sys.executable, "-m", __name__, comparison.recipe.stem]
    ended = subprocess.run(command, input=json.dumps(runs), stdout=subprocess.PIPE, check=True, text=True)
    if problems := json.loads(ended.stdout.splitlines()[-1]):
        raise CompareError("\n".join(["nothing was run, since the runs would fail:", *problems]))


def find_problems(recipe: str, runs: Sequence[dict[str, Any]]) -> list[str]:
    """
    Find the problems of runs. Each is listed once, with the names of the first runs that have it.

    Args:
        recipe (`str`): Module name of the recipe, such as `run_glue`.
        runs (`list[dict]`): For each run its `name`, `settings` and `metric`.
    """
    kinds = getattr(importlib.import_module(f"hf_lsam_recipes.{recipe}"), "SETTINGS", None)
    if kinds is None:
        return [
            f"- recipe={recipe}.py takes no YAML of settings: set it to a script that trains, such as run_glue.py."
        ]
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for problem in _problems_of(recipe, kinds, run):
            found.setdefault(problem, {})[run["name"]] = None
    return [f"- {problem} ({_abbreviated([*names])})" for problem, names in found.items()]


def _problems_of(recipe: str, kinds: Sequence[type], run: dict[str, Any]) -> list[str]:
    settings = {name: value for name, value in run["settings"].items() if name != "recipe"}
    known = [item.name for kind in kinds for item in dataclasses.fields(kind) if item.init]
    if unknown := [name for name in settings if name not in known]:
        return [f"{recipe}.py has no setting {name}.{did_you_mean(name, known)}" for name in unknown]
    try:
        parsed = _parse(kinds, settings)
    except ValueError as error:
        return [str(error)]
    metric, names = run["metric"], reported(recipe, parsed)
    if is_reported(metric, names):
        return []
    scores = sorted(filter(find_score, names))
    near = did_you_mean(metric, scores)
    return [
        f"{recipe}.py does not report {metric} with these settings, but {', '.join(scores) or 'no scores'}. Set the "
        f"metric to one that is reported, or set do_eval or do_predict if the metric needs it.{near}"
    ]


def _parse(kinds: Sequence[type], settings: dict[str, Any]) -> dict[str, Any]:
    """Parse the settings as the run will; returns all fields by name, and raises `ValueError` for a wrong setting."""
    from hf_lsam_recipes.support.settings import parse_arguments

    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.yaml"
        path.write_text(yaml.safe_dump(settings | {"output_dir": str(Path(folder) / "out")}), encoding="utf-8")
        try:
            with contextlib.redirect_stderr(said):
                parsed = parse_arguments(kinds, [str(path)], "")
        except SystemExit as error:
            raise ValueError(said.getvalue().strip().rpartition("error: ")[2]) from error
    return {name: value for part in parsed for name, value in vars(part).items()}


def is_reported(metric: str, names: Iterable[str]) -> bool:
    """Whether `metric` is one of `names`, or such a name for a part of the split: `eval_mm_accuracy`."""
    ends = [name.partition("_") for name in names]
    return metric in names or any(
        metric.startswith(f"{split}_") and metric.endswith(f"_{end}") for split, _, end in ends
    )


def reported(recipe: str, settings: dict[str, Any]) -> set[str]:
    """
    Names of the metrics that a run writes to `all_results.json`, without those of parts of a split.

    Args:
        recipe (`str`): Module name of the recipe.
        settings (`dict`): The parsed settings.
    """
    from hf_lsam_recipes.support.calibration import FIGURES, SCALED
    from hf_lsam_recipes.support.text.glue_tasks import GLUE_TASKS
    from hf_lsam_recipes.support.text.text_metrics import metric_names

    predicts = settings.get("do_predict")
    if recipe == "run_clm":
        figures: tuple[str, ...] = ("perplexity", "tokens", "truncated", "dropped")
        if settings["max_generation_samples"]:
            figures += ("exact_match", "generation_samples")
        if settings["neutral_file"]:
            figures += ("neutral_loss", "neutral_loss_before")
        splits = {"eval": settings["do_eval"]}
    elif recipe == "run_image_classification":
        figures = ("accuracy", *FIGURES)
        splits = {"eval": settings["do_eval"], "test": predicts}
    else:
        task = settings["task_name"]
        is_regression = GLUE_TASKS[task].labels is None if task else settings.get("regression", False)
        figures = metric_names(task, is_regression)
        # The test data of GLUE has no labels. With validation_fraction, its validation data takes its place.
        labelled = task is None or settings["validation_fraction"]
        shift = predicts and settings.get("shift_files")
        splits = {"eval": settings["do_eval"], "predict": predicts and labelled, "shift": shift}
    if settings.get("calibration_fraction"):
        figures += (*SCALED, "temperature", "calibration_samples")
    names = {f"{split}_{figure}" for split, wanted in splits.items() if wanted for figure in (*figures, *COMMON)}
    return names | {f"train_{figure}" for figure in TRAINING} | {"epoch", "total_flos"}


def _abbreviated(names: Sequence[str]) -> str:
    more = [f"and {len(names) - _MAX_NAMED} more"] if len(names) > _MAX_NAMED else []
    return "; ".join([*names[:_MAX_NAMED], *more])


if __name__ == "__main__":
    print(json.dumps(find_problems(sys.argv[1], json.load(sys.stdin))))
