"""
Fine-tune a real model on real text with AdamW, SAM and layer-wise SAM, and compare their accuracy and cost.

    python recipes/demo.py --output_dir demo --seeds 0 1

Each run of `recipes/run_glue.py` is a separate process, so that its peak memory can be measured. Runs with the same
seed see the same batches in the same order, and follow each other directly. Finished runs are kept: a second call runs
only those that are missing, or whose settings, code or versions have changed. The first two methods are compared as
soon as both have finished with the first seed.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from hf_lsam_recipes.support.text.demo_assets import AssetError, model_folder, rated_sentences, write_splits
from hf_lsam_recipes.support.text.demo_methods import METHODS, SECONDS, SPLITS, STEPS, TRAINING, on_console, table

RECIPES = Path(__file__).resolve().parent
CODE = [
    *RECIPES.parent.glob("hf_lsam/*.py"),
    # The modules that run_glue.py imports and that affect its results.
    RECIPES / "run_glue.py",
    *(
        RECIPES / "support" / f"{name}.py"
        for name in ("adapters", "calibration", "files", "hints", "loading", "logits", "measures", "output")
    ),
    *(
        RECIPES / "support" / f"{name}.py"
        for name in ("robustness", "rows", "settings", "sharpness", "sharpness_callback", "shipped", "step_timer")
    ),
    *(RECIPES / "support" / f"{name}.py" for name in ("tables", "training", "yaml_text")),
    *(RECIPES / "support" / "text" / f"glue_{name}.py" for name in ("data", "metric", "sampling", "tasks")),
    RECIPES / "support" / "text" / "text_metrics.py",
]

# Number of runs, all of the first seed, that are compared before the others start.
FIRST = 2


class RunError(Exception):
    """A run has failed; the message names it and the file with its output."""


@dataclass(frozen=True)
class Run:
    """One method with one seed."""

    method: str
    seed: int
    settings: dict[str, Any]
    folder: Path

    @property
    def trained(self) -> bool:
        """Whether the run has been trained. Its folder is renamed to `folder` when training has finished."""
        return self.folder.is_dir()

    @property
    def tested(self) -> bool:
        """Whether the run has been evaluated on the test part. Its weights are deleted after that."""
        return self.trained and not (self.folder / "model" / "model.safetensors").exists()


def plan(seeds: Iterable[int], settings: dict[str, Any], folder: Path, version: str) -> list[Run]:
    """
    List all runs in order: for each seed, every method.

    Args:
        seeds (`Iterable[int]`): The seeds.
        settings (`dict`): Settings of all runs. Those of a method take precedence.
        folder (`Path`): The parent of the runs' folders. The name of each has a hash of the settings and `version`.
        version (`str`): Identifies code, data and library versions.
    """
    runs = []
    for seed in seeds:
        for method, own in METHODS.items():
            of_run = settings | own | {"seed": seed}
            digest = hashlib.sha256(json.dumps([of_run, version], sort_keys=True).encode()).hexdigest()[:10]
            slug = re.sub(r"[^a-z0-9]+", "-", method.lower()).strip("-")
            runs.append(Run(method, seed, of_run, folder / f"{slug}-seed{seed}-{digest}"))
    return runs


def train(run: Run, on_epoch: Callable[[float], None]):
    """
    Train in a separate process, whose output goes to `train.log`.

    Args:
        run (`Run`): The run.
        on_epoch (`Callable[[float], None]`): Called with each epoch, a fraction within one included, that it logs.

    Raises:
        RunError: if the process fails.
    """
    partial = run.folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "settings.yaml").write_text(yaml.safe_dump(run.settings, sort_keys=False))
    arguments = [str(partial / "settings.yaml"), "--output_dir", str(partial / "model"), "--do_train"]
    process = subprocess.Popen(
        [sys.executable, str(RECIPES / "run_glue.py"), *arguments],
        env=os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    log = partial / "train.log"
    with log.open("w") as file, process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                if reported := re.search(r"'epoch': '?([\d.]+)", line):
                    on_epoch(float(reported[1]))
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        ending = "".join(log.read_text().splitlines(keepends=True)[-15:])
        raise RunError(
            f"{run.method}, seed {run.seed} failed:\n{ending}\nThe full output is in {log}. Finished runs are kept."
        )
    partial.rename(run.folder)


def test(run: Run, test_file: Path, run_glue: Callable[[list[str]], Any]):
    """Evaluate on the test part with `run_glue`, the recipe's `main`, and delete the weights."""
    output = run.folder / "test"
    shutil.rmtree(output, ignore_errors=True)
    arguments = [str(run.folder / "settings.yaml"), "--model_name_or_path", str(run.folder / "model")]
    arguments += ["--validation_file", str(test_file), "--max_eval_samples", "null", "--output_dir", str(output)]
    with (run.folder / "test.log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        run_glue([*arguments, "--eval_strategy", "no", "--do_eval"])
    (run.folder / "model" / "model.safetensors").unlink()


def test_all(runs: list[Run], test_file: Path):
    """Evaluate on the test part those of `runs` that have not been evaluated yet."""
    from hf_lsam_recipes.run_glue import main as run_glue

    for run in tqdm([run for run in runs if not run.tested], desc="Evaluating on the test part", unit="model"):
        test(run, test_file, run_glue)


def finish(runs: list[Run], test_file: Path):
    """Train and evaluate those of `runs` that have not finished yet; raises `RunError` if one fails."""
    steps, done = STEPS * len(runs), STEPS * sum(run.trained for run in runs)
    with tqdm(total=steps, initial=done, unit="step", smoothing=0, mininterval=1, disable=done == steps) as bar:
        for run in [run for run in runs if not run.trained]:
            bar.set_description(f"{run.method}, seed {run.seed}")
            begin = bar.n

            def show(epoch: float, begin: int = begin):
                bar.update(begin + round(STEPS * epoch / TRAINING["num_train_epochs"]) - bar.n)

            train(run, show)
            bar.update(begin + STEPS - bar.n)
    if all(run.tested for run in runs):
        return
    # In a separate process: the memory of this one adds to the peak memory of the runs that it starts.
    process = multiprocessing.get_context("spawn").Process(target=test_all, args=(runs, test_file))
    process.start()
    try:
        process.join()
    except BaseException:
        process.kill()
        raise
    if process.exitcode != 0:
        raise RunError(f"The evaluation failed. Its output is above and in {runs[0].folder.parent}/*/test.log.")


def announcement(runs: list[Run]) -> str:
    """The text printed at the start: the runs, and how long they will take."""
    missing = [run for run in runs if not run.tested]
    methods = "; ".join(dict.fromkeys(run.method for run in runs))
    lines = [f"{len(runs)} runs of {STEPS} steps. Methods: {methods}."]
    if len(missing) < len(runs):
        lines.append(f"{len(runs) - len(missing)} of {len(runs)} runs are already finished.")
    if missing:
        lines.append(f"This takes about {minutes(missing)} on two CPU cores.")
    if first := [run for run in runs[:FIRST] if run in missing]:
        lines.append(f"A first comparison, with one seed, is printed after about {minutes(first)}.")
    return "\n".join(lines)


def minutes(runs: list[Run]) -> str:
    """The expected duration of the runs, such as `7 minutes`, rounded up."""
    number = math.ceil(sum(SECONDS[run.method] for run in runs) / 60)
    return f"{number} minute{'s' if number > 1 else ''}"


def read_run(run: Run) -> dict[str, Any]:
    """Read the results of a finished run from its folder."""
    train = json.loads((run.folder / "model" / "train_results.json").read_text())
    state = json.loads((run.folder / "model" / "trainer_state.json").read_text())
    test = json.loads((run.folder / "test" / "eval_results.json").read_text())
    blocks = run.folder / "model" / "lsam_blocks.jsonl"
    evaluation = sum(line.get("eval_runtime", 0.0) for line in state["log_history"])
    return {
        "method": run.method,
        "seed": run.seed,
        "test_accuracy": test["eval_accuracy"],
        "test_loss": test["eval_loss"],
        "training_seconds": train["train_runtime"] - evaluation,
        "step_seconds": train["train_step_seconds"],
        "peak_memory_mib": train["train_peak_memory_mib"],
        "curve": [
            {"step": line["step"], "accuracy": line["eval_accuracy"], "loss": line["eval_loss"]}
            for line in state["log_history"]
            if "eval_accuracy" in line
        ],
        "blocks": [json.loads(row) for row in blocks.read_text().splitlines()] if blocks.exists() else [],
    }


def _fingerprint(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def demo(output_dir: Path, seeds: list[int], model: Path | None, reviews: Path | None):
    """
    Run the demo: get model and text, run what is missing, and write `results.json`, `table.md` and `results.png`.

    Args:
        output_dir (`Path`): Folder for downloads, runs and results.
        seeds (`list[int]`): The seeds of each method.
        model (`Path` or `None`): Wheel or folder of the model; `None` downloads it.
        reviews (`Path` or `None`): Source release or text file of the reviews; `None` downloads them.

    Raises:
        AssetError: if the model or the reviews cannot be obtained.
        RunError: if a run fails.
    """
    cache = output_dir / "assets"
    model = model_folder(cache, model)
    files = write_splits(rated_sentences(cache, reviews), cache / "reviews", SPLITS)
    settings = {
        "model_name_or_path": str(model.resolve()),
        "train_file": str(files["train"].resolve()),
        "validation_file": str(files["validation"].resolve()),
        **TRAINING,
    }
    used = [*CODE, *files.values(), *(path for path in model.iterdir() if path.is_file())]
    version = " ".join([_fingerprint(used), *map(importlib.metadata.version, ("torch", "transformers", "accelerate"))])
    runs = plan(seeds, settings, output_dir / "runs", version)

    print(announcement(runs), flush=True)
    first, rest = runs[:FIRST], runs[FIRST:]
    test_file = files["test"].resolve()
    finish(first, test_file)
    if not all(run.tested for run in rest):
        comparison = on_console(table([read_run(run) for run in first]))
        print(f"\nA first comparison, with one seed. The other runs follow.\n\n{comparison}", flush=True)
        finish(rest, test_file)

    # Imported late: the memory of this process adds to the peak memory of the runs that it starts.
    from hf_lsam_recipes.support.figures.demo import draw
    from hf_lsam_recipes.support.stamp import stamp

    figures = [read_run(run) for run in runs]
    data = {"train": SPLITS.train, "validation": SPLITS.validation, "test": SPLITS.test, "flipped": SPLITS.flipped}
    results = {"stamp": stamp(seeds), "data": data, "training": TRAINING, "methods": METHODS, "runs": figures}
    (output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (output_dir / "table.md").write_text(table(figures))
    draw(results, output_dir / "results.png")
    print(f"\n{on_console(table(figures))}")
    print(f"{SPLITS.flipped:.0%} of the {SPLITS.train} training labels are flipped at random (label noise). The")
    print(f"{SPLITS.test} test labels are clean. Mean and range over the seeds {', '.join(map(str, seeds))}.")
    print(f"Picture: {output_dir / 'results.png'}. Results: {output_dir / 'results.json'}, {output_dir / 'table.md'}.")


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--model", type=Path, help="wheel or folder of the model, instead of the download")
    parser.add_argument("--reviews", type=Path, help="source release or .txt of the reviews, instead of the download")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Stopping this process must stop the run that it waits for.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        demo(args.output_dir, list(dict.fromkeys(args.seeds)), args.model, args.reviews)
    except (AssetError, RunError) as error:
        sys.exit(f"demo.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. Finished runs are kept; the same command resumes.")


def script() -> None:
    """Entry point of the script and of `hf-lsam demo`."""
    main()


if __name__ == "__main__":
    script()
