"""
Fine-tune a text classification or regression model with layer-wise SAM, in an Accelerate loop instead of a Trainer.

    accelerate launch recipes/run_glue_no_trainer.py recipes/glue/rte.yaml --rho 0.1

It uses `LSAM` where `run_glue.py` uses `LSAMTrainer`: search for `lsam` below. It accepts the YAMLs of `run_glue.py`,
but of the settings of training only those of `LoopArguments`; `--help` lists all settings.
"""

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from datasets import Dataset
from peft import TaskType
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_scheduler,
)

from hf_lsam import LSAM, LSAMConfig
from hf_lsam_recipes.run_glue import check_labels, longest_text, tokenize
from hf_lsam_recipes.support.adapters import AdapterArguments
from hf_lsam_recipes.support.loading import ModelArguments, find_model, load_model
from hf_lsam_recipes.support.settings import parse_arguments
from hf_lsam_recipes.support.text.glue_data import load_text_data
from hf_lsam_recipes.support.text.glue_tasks import DataArguments
from hf_lsam_recipes.support.text.text_metrics import glue_metric


@dataclass
class LoopArguments:
    """
    How to train: a subset of `TrainingArguments`, with the same names and defaults.

    Args:
        output_dir (`str`):
            Folder for the model, `log.jsonl`, `all_results.json` and, after each epoch, a checkpoint `epoch_<n>`.
        resume_from_checkpoint (`bool`, *optional*, defaults to `False`):
            Whether to resume after the last epoch that the run in `output_dir` has finished.

    Raises:
        ValueError: if a setting is not supported, or does not fit the content of `output_dir`.
    """

    output_dir: str = field(metadata={"help": "Folder for the model, log, metrics and checkpoints."})
    do_train: bool = field(default=True, metadata={"help": "Must be true."})
    do_eval: bool = field(default=True, metadata={"help": "Must be true."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Examples of a micro-batch, per process."})
    per_device_eval_batch_size: int = field(
        default=8, metadata={"help": "Examples of a batch in evaluation, per process."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches per optimizer step."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Highest learning rate of AdamW."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    num_train_epochs: int = field(default=3, metadata={"help": "Epochs."})
    warmup_steps: int = field(default=0, metadata={"help": "Steps over which the learning rate rises from 0."})
    logging_steps: float = field(
        default=500, metadata={"help": "Steps between two log lines; below 1, a fraction of all steps."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of the new head, the order of the data and dropout."})
    resume_from_checkpoint: bool = field(default=False, metadata={"help": "Resume after the last finished epoch."})

    def __post_init__(self):
        if not (self.do_train and self.do_eval):
            raise ValueError(
                "This script always trains and evaluates: leave out do_train and do_eval. To evaluate or predict "
                "only, use run_glue.py."
            )
        every = self.logging_steps
        if every <= 0 or (every >= 1 and every != int(every)):
            raise ValueError(
                f"logging_steps must be a whole number of steps, or a fraction of all steps below 1, but is {every}."
            )
        has_log = (Path(self.output_dir) / "log.jsonl").exists()
        if has_log and not self.resume_from_checkpoint:
            raise ValueError(
                f"output_dir={self.output_dir} contains another run: set output_dir to a new folder, or set "
                "resume_from_checkpoint."
            )
        if self.resume_from_checkpoint and self.checkpoint is None:
            raise ValueError(
                f"output_dir={self.output_dir} has no checkpoint of an epoch: leave out resume_from_checkpoint."
            )

    @property
    def checkpoint(self) -> Path | None:
        """The last complete checkpoint, or `None`. The state of LSAM is saved last, so it marks a complete one."""
        saved = [path.parent for path in Path(self.output_dir).glob("epoch_*/lsam_state.safetensors")]
        return max(saved, key=lambda folder: int(folder.name.removeprefix("epoch_")), default=None)


SETTINGS = (ModelArguments, DataArguments, LSAMConfig, LoopArguments)


@dataclass
class Run:
    """Checked settings, data and model: what `prepare` returns and `execute` runs."""

    args: LoopArguments
    lsam_config: LSAMConfig
    data_args: DataArguments
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    datasets: dict[str, Dataset]


def prepare(argv: list[str]) -> Run:
    """
    Check settings and data, and load the model. No file is written.

    Args:
        argv (`list[str]`): The command-line arguments.

    Raises:
        ValueError: if a setting, the output directory or the data are not usable; the message says what to set.
    """
    description = (__doc__ or "").strip().splitlines()[0]
    model_args, data_args, lsam_config, args = parse_arguments(SETTINGS, argv, description, "glue")
    source = find_model(model_args, training=True)
    data = load_text_data(data_args, ["train", "validation"], source.config.label2id)
    settings = check_labels(data_args, data, source.config, training=True) | {"ignore_mismatched_sizes": True}
    set_seed(args.seed)
    no_adapter, task_type = AdapterArguments(), TaskType.SEQ_CLS
    model = load_model(AutoModelForSequenceClassification, source, no_adapter, task_type, training=True, **settings)
    datasets = tokenize(data, source.tokenizer, longest_text(data_args.max_seq_length, source.tokenizer, model))
    return Run(args, lsam_config, data_args, model, source.tokenizer, datasets)


def execute(run: Run) -> dict[str, float]:
    """Train, evaluate and save a checkpoint after each epoch, and return the metrics of the last epoch."""
    args, output = run.args, Path(run.args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # The order of the data depends on the seed and the epoch only, so it is the same in a resumed run.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    collate = DataCollatorWithPadding(run.tokenizer)
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    train_loader = DataLoader(run.datasets["train"], args.per_device_train_batch_size, True, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(run.model, optimizer, train_loader)
    evaluated = {
        prefix: accelerator.prepare(
            DataLoader(run.datasets[split], args.per_device_eval_batch_size, collate_fn=collate)
        )
        for split, prefix in (("validation", "eval"), ("validation_mismatched", "eval_mm"))
        if split in run.datasets
    }
    steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    max_steps = steps_per_epoch * args.num_train_epochs
    log_every = math.ceil(max_steps * args.logging_steps) if args.logging_steps < 1 else args.logging_steps
    scheduler = get_scheduler("linear", optimizer, args.warmup_steps, max_steps)
    accelerator.register_for_checkpointing(scheduler)

    lsam = LSAM(model, optimizer, run.lsam_config, max_steps, accelerator=accelerator)
    if args.resume_from_checkpoint:
        accelerator.load_state(str(args.checkpoint))
        lsam.load(str(args.checkpoint))

    metrics: dict[str, float] = {}
    for epoch in range(lsam.step // steps_per_epoch, args.num_train_epochs):
        model.train()
        loader.set_epoch(epoch)
        total, count = torch.zeros((), device=accelerator.device), 0
        for batch in loader:
            with accelerator.accumulate(model):
                # Without LSAM: accelerator.backward(model(**batch).loss)
                total += lsam.backward(lambda: model(**batch).loss)  # noqa: B023
                count += 1
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
                if lsam.step % log_every == 0 or lsam.step % steps_per_epoch == 0:
                    loss = accelerator.reduce(total / count, "mean").item()
                    write(accelerator, output, {"step": lsam.step, "loss": loss} | lsam.log())
                    total, count = torch.zeros_like(total), 0

        metrics = {"epoch": epoch + 1.0}
        for prefix, eval_loader in evaluated.items():
            metrics |= {f"{prefix}_{name}": value for name, value in evaluate(run, accelerator, model, eval_loader)}
        write(accelerator, output, metrics)
        checkpoint = output / f"epoch_{epoch + 1}"
        accelerator.save_state(str(checkpoint))
        accelerator.wait_for_everyone()
        lsam.save(str(checkpoint))

    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(output)
        run.tokenizer.save_pretrained(output)
        (output / "all_results.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()  # no process leaves before the others are done
    accelerator.end_training()
    return metrics


def evaluate(run: Run, accelerator: Accelerator, model, loader) -> Iterable[tuple[str, float]]:
    """Evaluate `model` on the batches of `loader`; returns names and values of the task's metrics."""
    metric = glue_metric(run.data_args)
    model.eval()
    for batch in loader:
        with torch.no_grad():
            logits = model(**batch).logits
        predictions = logits.squeeze(-1) if run.data_args.is_regression else logits.argmax(dim=-1)
        predictions, labels = accelerator.gather_for_metrics((predictions, batch["labels"]))
        metric.add_batch(predictions=predictions.tolist(), references=labels.tolist())
    return metric.compute().items()


def write(accelerator: Accelerator, output: Path, line: dict[str, float]) -> None:
    """Print a log line, and append it to `log.jsonl`."""
    accelerator.print(json.dumps(line))
    if accelerator.is_main_process:
        with open(output / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the recipe with command-line arguments `argv` and return its metrics."""
    return execute(prepare(sys.argv[1:] if argv is None else argv))


def script() -> None:
    """Entry point of the script. An error before training is printed without a traceback."""
    try:
        run = prepare(sys.argv[1:])
    except (ValueError, OSError) as problem:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {problem}")
    execute(run)


if __name__ == "__main__":
    script()
