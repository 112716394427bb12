"""The YAML of `compare.py`, read and checked."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_lsam_recipes.support.comparison.plan import (
    CompareError,
    Comparison,
    Method,
    Settings,
    Task,
    is_greater_better,
    slug,
    tuning_folder,
)
from hf_lsam_recipes.support.shipped import RECIPES, did_you_mean
from hf_lsam_recipes.support.yaml_text import read_yaml_text

# Settings that `compare.py` sets for each run.
RESERVED_SETTINGS = ("output_dir", "seed", "resume_from_checkpoint")
# Values that mean "not set".
EMPTY = (None, "", "null", "~")


def read_comparison(path: Path, overrides: Mapping[str, Any], settings: Mapping[str, str]) -> Comparison:
    """
    Read and check a YAML.

    Args:
        path (`Path`): The YAML.
        overrides (`dict`): Replacements of its top-level names, such as `output_dir`. A `recipe` here may be any
            script; that of the YAML, which may come from someone else, must be one of the recipes.
        settings (`dict`): Settings of the recipe for all runs. They replace those of the YAML and of its tasks.

    Raises:
        CompareError: for the first problem; the message says how to solve it.
    """
    content = _read_with_base(path) | dict(overrides)
    for name in ("recipe", "output_dir", "tasks", "methods", "seeds"):
        if not content.get(name) or content[name] in EMPTY:
            raise CompareError(f"{path} sets no {name}, which is required: add it.")
    methods = [_read_method(name, own) for name, own in _mapping("methods", content["methods"]).items()]
    tasks = [_read_task(name, own, settings) for name, own in _mapping("tasks", content["tasks"]).items()]
    common = _mapping("settings", content.get("settings")) | dict(settings)
    baseline = content.get("baseline") or methods[0].name
    seeds, tuning_seeds = (_integers(content, name) for name in ("seeds", "tuning_seeds"))
    _check(common, tasks, methods, baseline, tuning_seeds, settings)
    threads = _integer("threads", content.get("threads") or 1)
    processes = content.get("processes") or max(1, (os.cpu_count() or 1) // threads)
    by_name = "recipe" not in overrides
    name = _text("recipe", content["recipe"])
    recipe = RECIPES / name if by_name else Path(name)
    if not recipe.is_file() or (by_name and recipe.name != name):
        raise CompareError(
            f"recipe={name} is not the name of a script in {RECIPES}. To run a script from another "
            "folder, give its path by --recipe."
        )
    return Comparison(
        recipe=recipe,
        output_dir=Path(_text("output_dir", content["output_dir"])),
        settings=common,
        tasks=tasks,
        methods=methods,
        baseline=baseline,
        seeds=seeds,
        tuning_seeds=tuning_seeds,
        processes=_integer("processes", processes),
        threads=threads,
        keep_models=_switch("keep_models", content.get("keep_models", "false")),
    )


def _read_with_base(path: Path) -> dict[str, Any]:
    """
    Read a YAML, and add what it inherits from its `base`, the path of another YAML relative to its folder.

    `settings` are merged name by name. Any other name replaces that of the base. `null` removes a name of the base.
    """
    content = _read(path)
    base = content.pop("base", None)
    if base in EMPTY:
        return content
    base_path = path.parent / _text("base", base)
    if not base_path.is_file():
        raise CompareError(f"{path}: base={base} is not a file ({base_path}). Name one relative to {path.parent}.")
    shared = _read(base_path)
    if "base" in shared:
        raise CompareError(
            f"{path}: base={base} has a base itself, {shared['base']}, which is not supported: name that one, or "
            "copy its settings."
        )
    owned = _mapping("settings", shared.get("settings"))
    merged = _patch(owned, _mapping("settings", content.pop("settings", None)))
    return _patch(shared, content) | {"settings": merged}


def _patch(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Update `shared` with `own`, and remove the names of `shared` that are null in `own`."""
    removed = {name for name, value in own.items() if name in shared and value in EMPTY}
    return {name: value for name, value in (shared | own).items() if name not in removed}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml_text(path)
    except (OSError, ValueError) as error:
        raise CompareError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise CompareError(f"{path} must have one `name: value` per line.")
    known = [*Comparison.__dataclass_fields__, "base"]
    if unknown := [str(name) for name in content if name not in known]:
        near = did_you_mean(unknown[0], known)
        raise CompareError(
            f"{path} has unknown names: {', '.join(unknown)}. Known names are {', '.join(known)}.{near}"
        )
    return content


def _read_task(name: str, own: Any, overrides: Mapping[str, str]) -> Task:
    own = _mapping(f"Task {name}", own)
    metric, tuning_metric = (
        None if (value := own.pop(key, None)) in EMPTY else _text(f"The {key} of {name}", value)
        for key in ("metric", "tuning_metric")
    )
    if metric is None:
        raise CompareError(
            f"Task {name} sets no metric: set it to a name in the recipe's all_results.json, such as eval_accuracy."
        )
    greater_is_better = _switch("greater_is_better", own.pop("greater_is_better", is_greater_better(metric)))
    return Task(name, metric, tuning_metric, greater_is_better, own | {n: overrides[n] for n in own if n in overrides})


def _read_method(name: str, own: Any) -> Method:
    own = _mapping(f"Method {name}", own)
    grid = own.pop("grid", {})
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise CompareError(f"The grid of {name} must hold `setting: [value, ...]`.")
    return Method(name, own, grid)


def _check(
    common: Settings,
    tasks: Sequence[Task],
    methods: Sequence[Method],
    baseline: str,
    tuning_seeds: Sequence[int],
    overrides: Mapping[str, str],
) -> None:
    names = [method.name for method in methods]
    if baseline not in names:
        raise CompareError(f"baseline={baseline} is not one of the methods: {', '.join(names)}.")
    for kind, all_names in (("tasks", [task.name for task in tasks]), ("methods", names)):
        slugs = [slug(name) for name in all_names]
        if not all(slugs) or len(set(slugs)) < len(slugs):
            raise CompareError(f"The names of the {kind} must differ in letters or digits: {', '.join(all_names)}.")
    for owner in (common, *(task.settings for task in tasks), *(method.settings | method.grid for method in methods)):
        if taken := [name for name in RESERVED_SETTINGS if name in owner]:
            raise CompareError(f"{taken[0]} is set for each run by compare.py: leave it out.")
    for method in methods:
        if clash := [name for name in overrides if name in method.settings | method.grid]:
            raise CompareError(
                f"{clash[0]} is a setting of {method.name}, and cannot be set for all runs: leave it out."
            )
        if len(method.candidates) > 1:
            _check_grid(method, tasks, tuning_seeds)


def _check_grid(method: Method, tasks: Sequence[Task], tuning_seeds: Sequence[int]) -> None:
    if not tuning_seeds:
        raise CompareError(f"{method.name} has a grid: set tuning_seeds to choose from it.")
    folders: dict[str, Settings] = {}
    for chosen in method.candidates:
        if other := folders.get(tuning_folder(chosen)):
            raise CompareError(
                f"The grid of {method.name} holds {other} and {chosen}, whose runs would share the folder "
                f"{tuning_folder(chosen)}: values must differ in letters, digits or points."
            )
        folders[tuning_folder(chosen)] = chosen
    for task in tasks:
        if task.tuning_metric in (None, task.metric):
            raise CompareError(
                f"{method.name} has a grid: set a tuning_metric for task {task.name} that is not the compared "
                "metric. Choosing settings by the compared metric would bias the comparison in favour of the method."
            )
        reversed_by_user = not task.greater_is_better and is_greater_better(task.metric)
        if reversed_by_user and not task.tunes_on_same_metric and task.tuning_greater_is_better:
            raise CompareError(
                f"Task {task.name} sets greater_is_better=false for {task.metric}, which does not tell whether higher "
                f"{task.tuning_metric} is better: set tuning_metric to the same metric on another split."
            )


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value in EMPTY:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise CompareError(f"{name} must have one `name: value` per line, but holds {value!r}.")
    return dict(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise CompareError(f"{name} must be a single text, but is {value!r}.")
    return value


def _integers(content: Mapping[str, Any], name: str) -> list[int]:
    values = content.get(name) or []
    values = values if isinstance(values, list) else [values]
    return list(dict.fromkeys(_integer(name, value, least=0) for value in values))


def _integer(name: str, value: Any, least: int = 1) -> int:
    try:
        number = int(value)
    except (ValueError, TypeError):
        number = least - 1
    if number < least:
        raise CompareError(f"{name} must be an integer of at least {least}, but is {value!r}.")
    return number


def _switch(name: str, value: Any) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise CompareError(f"{name} must be true or false, but is {value!r}.")
    return str(value).lower() == "true"
