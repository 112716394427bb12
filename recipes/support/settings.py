"""What the recipes share: settings from a YAML and the command line, a guarded output directory, timer and metrics."""

import dataclasses
import json
import os
import resource
import statistics
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.trainer_utils import get_last_checkpoint
from yaml_text import read_yaml_text

# What a finished or interrupted training run leaves in its output directory.
RUN_OUTPUT = (
    "checkpoint-*",
    "*_results.json",
    "trainer_state.json",
    "lsam_blocks.jsonl",
    "config.json",
    "adapter_config.json",
    "*.safetensors",
    "README.md",
)

# What training goes on from, in a checkpoint.
CHECKPOINT = (
    "trainer_state.json",
    "config.json",
    "*.index.json",
    "*.safetensors",
    "pytorch_model*.bin",
    "optimizer.bin",
    "*.pt",
    "*.pth",
)


def parse_arguments(kinds: Sequence[type], argv: list[str], description: str) -> tuple[Any, ...]:
    """
    Read an optional YAML of settings, which comes first, and the command line, which overrides it.

    Args:
        kinds (`Sequence[type]`): The dataclasses whose fields are the settings.
        argv (`list[str]`): `[settings.yaml] [--setting value ...]`; `null` as a value is `None`.
        description (`str`): What `--help` says first.

    Raises:
        ValueError: for a YAML that cannot be read, or an unknown setting. (A value of the wrong type ends the program
            with one line, as argparse does.)
    """
    _train_together_on_cpus()
    parser = HfArgumentParser(
        kinds, usage="%(prog)s [settings.yaml] [--setting value ...]", description=description, allow_abbrev=False
    )
    for kind in (int, float, str, string_to_bool):
        parser.register("type", kind, lambda text, kind=kind: None if text == "null" else kind(text))
    if argv and not argv[0].startswith("-"):
        known = {item.name for kind in kinds for item in dataclasses.fields(kind) if item.init}
        scalars, lists = read_yaml(Path(argv[0]), known)
        parser.set_defaults(**lists)
        argv = scalars + argv[1:]
    *parsed, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"Unknown setting {unknown[0]!r}: --help lists those there are.")
    return tuple(parsed)


def _train_together_on_cpus() -> None:
    """
    Tell Accelerate to use the CPU if several processes were launched where there is nothing else.

    Its launcher does not tell them, and without being told each of them would train alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"


def read_yaml(path: Path, known: set[str]) -> tuple[list[str], dict[str, list[str]]]:
    """A YAML's settings as command-line arguments, read as the command line reads them, and those that are lists."""
    if not path.is_file():
        raise ValueError(f"{path} is no file: the first argument is a YAML of settings, or starts with --.")
    try:
        settings = read_yaml_text(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid YAML: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold one `setting: value` a line.")
    if unknown := [str(name) for name in settings if name not in known]:
        raise ValueError(f"{path} has unknown settings: {', '.join(unknown)}. --help lists those there are.")
    scalars, lists = [], {}
    for name, value in settings.items():
        if isinstance(value, list):
            lists[name] = value
        else:
            text = json.dumps(value) if isinstance(value, dict) else "null" if value in ("", "~") else value
            scalars.append(f"--{name}={text}")
    return scalars, lists


def check_output_dir(args: TrainingArguments, predictions: Sequence[str] = ()) -> str | None:
    """
    Find the checkpoint to resume from, and see to it that nothing is written over.

    Args:
        args (`TrainingArguments`): Its `output_dir`, and its `resume_from_checkpoint`: a folder, or `true` for the
            latest checkpoint in `output_dir`.
        predictions (`Sequence[str]`): Names of the files that `do_predict` writes.

    Returns:
        `str` or `None`: The checkpoint's folder, or `None` for a fresh start.

    Raises:
        ValueError: if there is no such checkpoint, or the run would write over what another one left.
    """
    folder = Path(args.output_dir)
    wanted = args.resume_from_checkpoint
    checkpoint = None
    if wanted and wanted.lower() != "false" and args.do_train:
        latest = wanted.lower() == "true"
        checkpoint = (get_last_checkpoint(folder) if folder.is_dir() else None) if latest else wanted
        if checkpoint is None or not (Path(checkpoint) / "trainer_state.json").is_file():
            raise ValueError(
                f"resume_from_checkpoint={wanted}: {checkpoint or folder} holds no checkpoint of the Trainer. Name a "
                "folder checkpoint-<step>, or leave the setting out to start afresh."
            )
        check_checkpoint(Path(checkpoint), wanted)
        if Path(checkpoint).resolve().parent == folder.resolve():
            return checkpoint
    patterns = [*RUN_OUTPUT] if args.do_train else ["eval_results.json"] if args.do_eval else []
    patterns += predictions if args.do_predict else []
    found = sorted({path.name for pattern in patterns for path in folder.glob(pattern)})
    if found:
        resume = " Resume with resume_from_checkpoint=true," if args.do_train and get_last_checkpoint(folder) else ""
        raise ValueError(
            f"output_dir={folder} already holds {', '.join(found)}, which this run would write over.{resume} "
            f"{'set' if resume else 'Set'} output_dir to a new folder, or remove the old one."
        )
    return checkpoint


def check_checkpoint(folder: Path, wanted: str) -> None:
    """Raise `ValueError`, naming the file, if one of a checkpoint was not written to its end."""
    for path in sorted(path for pattern in CHECKPOINT for path in folder.glob(pattern)):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="np"):
                    pass
            else:
                # What torch.save writes; its table of contents stands at the end.
                zipfile.ZipFile(path).close()
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"resume_from_checkpoint={wanted}: {folder} is damaged ({path.name}: {error}). Remove it, or name "
                "another checkpoint."
            ) from error


def run_script(prepare: Callable[[list[str]], Any], execute: Callable[[Any], Any]) -> None:
    """
    A recipe as a script: `prepare` with the command line's arguments, and `execute` with what it returns.

    Before training, what is wrong are the settings, and the message says it all: the script ends with it.
    """
    prepared = None
    try:
        prepared = prepare(sys.argv[1:])
        execute(prepared)
    except (ValueError, NotImplementedError, OSError) as problem:
        if prepared is not None and (prepared.timer.started or not prepared.args.do_train):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {problem}")


def report(trainer: Trainer, split: str, metrics: dict[str, float]) -> dict[str, float]:
    """Print `metrics`, write them to `<split>_results.json` and add them to `all_results.json`; returns them."""
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    return metrics


def make_compute_loss(label_smoothing: float, is_regression: bool = False):
    """
    The `compute_loss_func` of the Trainer for a classifier, or a regression: the mean over all rows of an optimizer
    step.

    BERT and its like take the mean over a micro-batch, whatever number of rows the Trainer tells them: with gradient
    accumulation, or in several processes, their own loss would be as many times too large.
    """

    def compute_loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None):
        logits = outputs["logits"]
        if is_regression:
            total = torch.nn.functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="sum")
        else:
            total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return compute_loss


def read_logits(predictions: np.ndarray | tuple) -> np.ndarray:
    """The logits, which some models return with hidden states behind them."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def peak_memory_mib(on_gpu: bool) -> float:
    """Peak memory: allocated on the GPU since its statistics were reset, or resident in this process without one."""
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class StepTimer(TrainerCallback):
    """Wall time of each optimizer step: the passes and the update, but neither loading of data nor evaluation."""

    def __init__(self):
        self.seconds: list[float] = []
        self.started = False
        self._start = 0.0
        self._on_gpu = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = True
        self._on_gpu = args.device.type == "cuda"
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self._now() - self._start)

    def metrics(self) -> dict[str, float]:
        """Median time of a step, and the peak memory."""
        seconds = {"train_step_seconds": statistics.median(self.seconds)} if self.seconds else {}
        return seconds | {"train_peak_memory_mib": peak_memory_mib(self._on_gpu)}

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()
