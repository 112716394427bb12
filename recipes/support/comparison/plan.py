"""The plan of `compare.py`: tasks, methods, seeds, the runs that they need, and the folder of each."""

import hashlib
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Settings = dict[str, Any]
LOWER_IS_BETTER = ("loss", "loss_before", "perplexity", "nll", "brier", "ece")


class CompareError(Exception):
    """A problem with the comparison; the message says what it is and how to solve it."""


def is_greater_better(metric: str) -> bool:
    """Whether higher is better: true except for losses, perplexities, Brier score and calibration error."""
    return not metric.removesuffix("_scaled").endswith(LOWER_IS_BETTER)


@dataclass(frozen=True)
class Task:
    """
    A task: its settings and its metrics.

    Args:
        name (`str`): Its name in the report.
        metric (`str`): Name of the compared metric in the recipe's `all_results.json`.
        tuning_metric (`str` or `None`): Name of the metric that settings are chosen by.
        greater_is_better (`bool`): Whether higher is better, for `metric`.
        settings (`dict`): Settings of the recipe.
    """

    name: str
    metric: str
    tuning_metric: str | None
    greater_is_better: bool
    settings: Settings

    @property
    def tunes_on_same_metric(self) -> bool:
        """Whether both metrics are the same one on different splits, such as `predict_f1` and `eval_f1`."""
        return _without_split(str(self.tuning_metric)) == _without_split(self.metric)

    @property
    def tuning_greater_is_better(self) -> bool:
        """Whether higher is better, for the tuning metric: as for `metric` if it is the same one, else by its name."""
        return self.greater_is_better if self.tunes_on_same_metric else is_greater_better(str(self.tuning_metric))


@dataclass(frozen=True)
class Method:
    """A method: settings of the recipe, and a grid of values to choose from."""

    name: str
    settings: Settings
    grid: dict[str, list]

    @property
    def candidates(self) -> list[Settings]:
        """The settings to choose from: every combination of the grid; a single empty one without a grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


@dataclass(frozen=True)
class Run:
    """
    One training run, in a separate process and folder.

    Args:
        chosen (`dict`): Values from the method's grid.
        tuning (`bool`): Whether it is a tuning run, by which they are chosen.
        settings (`dict`): All settings of the recipe except the output directory.
    """

    task: str
    method: str
    seed: int
    chosen: Settings
    tuning: bool
    settings: Settings
    folder: Path

    @property
    def name(self) -> str:
        """Its name in messages."""
        chosen = "".join(f", {name}={value}" for name, value in self.chosen.items()) if self.tuning else ""
        return f"{self.task}, {self.method}{chosen}, {'tuning ' * self.tuning}seed {self.seed}"

    @property
    def digest(self) -> str:
        """A digest of all settings, by which a stored result is recognised."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    def result(self) -> dict[str, Any] | None:
        """The result of the finished run; raises `CompareError` if it was made with other settings."""
        path = self.folder / "result.json"
        if not path.exists():
            return None
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            digest, before = result["digest"], result["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CompareError(f"{path} is damaged ({error!r}): remove it to run {self.name} again.") from error
        if digest != self.digest:
            now = self.settings
            changed = [
                f"{name} was {before.get(name, 'not set')}, and is {now.get(name, 'not set')}"
                for name in sorted(before | now)
                if before.get(name) != now.get(name)
            ]
            raise CompareError(
                f"{self.name} has an earlier result with other settings: {'; '.join(changed)}. To keep results of "
                f"different settings apart, set another output_dir, or remove {self.folder} to run it again."
            )
        return result


@dataclass(frozen=True)
class Comparison:
    """
    Methods x tasks x seeds.

    Args:
        recipe (`Path`): The script of each run: takes a YAML of settings, and writes `all_results.json`.
        output_dir (`Path`): Folder for the runs, `<task>/<method>/seed-<n>`, and the report.
        settings (`dict`): Settings of the recipe for all runs.
        tasks, methods (`list`): What is compared.
        baseline (`str`): The method that the others are compared with.
        seeds, tuning_seeds (`list[int]`): Those of the compared runs, and of the runs that settings are chosen by.
        processes (`int`): Number of parallel runs.
        threads (`int`): Threads of each run.
        keep_models (`bool`): Whether to keep the weights in the folders of the runs.
    """

    recipe: Path
    output_dir: Path
    settings: Settings
    tasks: list[Task]
    methods: list[Method]
    baseline: str
    seeds: list[int]
    tuning_seeds: list[int] = field(default_factory=list)
    processes: int = 1
    threads: int = 1
    keep_models: bool = False

    def tuning_runs(self) -> list[Run]:
        """The runs by which settings are chosen, of each method with a grid."""
        return [
            self._run(task, method, seed, chosen, tuning=True)
            for seed in self.tuning_seeds
            for task in self.tasks
            for method in self.methods
            for chosen in method.candidates
            if len(method.candidates) > 1
        ]

    def final_runs(self) -> list[Run]:
        """The compared runs, seed by seed, of each method whose settings are known by now."""
        return [
            self._run(task, method, seed, chosen, tuning=False)
            for seed in self.seeds
            for task in self.tasks
            for method in self.methods
            if (chosen := self.choose(task, method)) is not None
        ]

    def possible_runs(self) -> list[Run]:
        """A run for each task, method and candidate, in tuning and in the comparison, with the first seed."""
        return [
            self._run(task, method, seeds[0], chosen, tuning)
            for task in self.tasks
            for method in self.methods
            for chosen in method.candidates
            for tuning, seeds in ((True, self.tuning_seeds), (False, self.seeds))
            if not tuning or len(method.candidates) > 1
        ]

    def choose(self, task: Task, method: Method) -> Settings | None:
        """
        Choose the candidate with the best mean of the tuning metric; `None` while a tuning run is missing.

        Of equal candidates, the first is chosen. A mean that is NaN is worse than any other.
        """
        if len(method.candidates) == 1:
            return method.candidates[0]
        best, best_mean = None, -float("inf")
        for chosen in method.candidates:
            runs = [self._run(task, method, seed, chosen, tuning=True) for seed in self.tuning_seeds]
            results = [run.result() for run in runs]
            values = [metric_of(result, task.tuning_metric) for result in results if result is not None]
            if len(values) < len(runs):
                return None
            mean = sum(values) / len(values) * (1 if task.tuning_greater_is_better else -1)
            if best is None or mean > best_mean:
                best, best_mean = chosen, mean if mean == mean else -float("inf")
        return best

    def _run(self, task: Task, method: Method, seed: int, chosen: Settings, tuning: bool) -> Run:
        settings = self.settings | task.settings | method.settings | chosen
        folder = self.output_dir / slug(task.name) / slug(method.name)
        if tuning:
            # Tuning runs do not evaluate on the data of the comparison.
            settings |= {"do_predict": "false"}
            folder = folder / "tuning" / tuning_folder(chosen)
        settings = {"recipe": self.recipe.name, **settings, "seed": seed}
        return Run(task.name, method.name, seed, chosen, tuning, settings, folder / f"seed-{seed}")


def metric_of(result: dict[str, Any], name: str | None) -> float:
    """A metric of a finished run; raises `CompareError` if it has none of that name."""
    metrics = result["metrics"]
    if name not in metrics:
        raise CompareError(
            f"{result['task']}, {result['method']}, seed {result['seed']} has an earlier result without {name}, but "
            f"with {', '.join(metrics)}. Set the metric of the task to one of them, or set another output_dir."
        )
    return metrics[name]


def _without_split(metric: str) -> str:
    """The name of a metric without its split."""
    return metric.partition("_")[2] or metric


def tuning_folder(chosen: Settings) -> str:
    """The folder of the tuning runs of a candidate."""
    return slug("-".join(f"{name}-{value}" for name, value in chosen.items()))


def slug(name: str) -> str:
    """Convert `name` to a folder name: lower case, with `-` for other characters than letters, digits, `.` and `_`."""
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.")
