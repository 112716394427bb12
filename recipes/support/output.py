"""The output directory of a recipe, which is never overwritten, and its metrics."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

# Files that a finished or interrupted training run leaves in its output directory.
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

# The files of a checkpoint that training resumes from.
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


def check_output_dir(args: TrainingArguments, predictions: Sequence[str] = ()) -> str | None:
    """
    Find the checkpoint to resume from, and check that the run would not overwrite the results of another one.

    Args:
        args (`TrainingArguments`): Its `output_dir`, and its `resume_from_checkpoint`: a folder, or `true` for the
            latest checkpoint in `output_dir`.
        predictions (`Sequence[str]`): Names of the files that `do_predict` writes.

    Returns:
        `str` or `None`: The checkpoint's folder, or `None` to start from the beginning.

    Raises:
        ValueError: if `output_dir` is not set, if the checkpoint is missing or damaged, or if the run would overwrite
            results of another one.
    """
    if not args.output_dir:
        raise ValueError("output_dir is not set: name a new folder for what the run writes, such as outputs/my-run.")
    folder = Path(args.output_dir)
    wanted = args.resume_from_checkpoint
    checkpoint = None
    if wanted and wanted.lower() != "false" and args.do_train:
        latest = wanted.lower() == "true"
        checkpoint = (get_last_checkpoint(folder) if folder.is_dir() else None) if latest else wanted
        if checkpoint is None or not (Path(checkpoint) / "trainer_state.json").is_file():
            raise ValueError(
                f"resume_from_checkpoint={wanted}: {checkpoint or folder} holds no checkpoint of the Trainer. Name a "
                "folder checkpoint-<step>, or leave the setting out to start from the beginning."
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
            f"output_dir={folder} already holds {', '.join(found)}, which this run would overwrite.{resume} "
            f"{'set' if resume else 'Set'} output_dir to a new folder, or remove the old one."
        )
    return checkpoint


def check_checkpoint(folder: Path, wanted: str) -> None:
    """Raise `ValueError`, with the value `wanted` of `resume_from_checkpoint`, if a file in `folder` is incomplete."""
    for path in sorted(path for pattern in CHECKPOINT for path in folder.glob(pattern)):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="np"):
                    pass
            else:
                # torch.save writes a zip file, whose table of contents is at the end.
                zipfile.ZipFile(path).close()
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"resume_from_checkpoint={wanted}: {folder} is damaged ({path.name}: {error}). Remove it, or name "
                "another checkpoint."
            ) from error


def report(trainer: Trainer, split: str, metrics: dict[str, float]) -> dict[str, float]:
    """Print `metrics`, write them to `<split>_results.json` and add them to `all_results.json`; returns them."""
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    return metrics
