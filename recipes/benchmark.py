"""
What each method costs: time of a step as a ratio to the plain Trainer's, beside the bound.

    python recipes/benchmark.py
    python recipes/benchmark.py --hidden_size 768 --methods plain,sam,last-2 --output_file cost.json

The methods take turns in one process, a few steps each, over and over: what the machine does meanwhile hits all of
them alike. The bound is 1 + the predicted overhead, counted from the model's parameters (hf_lsam/selection.py).
"""

import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import StepTimer, parse_arguments
from stamp import stamp
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_lsam import LSAMConfig, LSAMTrainer

METHODS: dict[str, dict[str, Any]] = {
    "plain": {"block_selection": "none"},
    "off": {"rho": 0.0},
    "sam": {"block_selection": "all"},
    "generalized-sam": {"block_selection": "all", "alpha": 0.8},
    "looksam-5": {"block_selection": "all", "perturb_interval": 5, "reuse_correction": 0.7},
    "top-1": {"num_perturbed_blocks": 1},
    "top-2": {"num_perturbed_blocks": 2},
    "top-4": {"num_perturbed_blocks": 4},
    "last-1": {"block_selection": "last", "num_perturbed_blocks": 1},
    "last-2": {"block_selection": "last", "num_perturbed_blocks": 2},
    "last-4": {"block_selection": "last", "num_perturbed_blocks": 4},
    "budget-0.1": {"block_selection": "budget", "max_overhead": 0.1, "num_perturbed_blocks": None},
    "budget-0.2": {"block_selection": "budget", "max_overhead": 0.2, "num_perturbed_blocks": None},
    "budget-0.5": {"block_selection": "budget", "max_overhead": 0.5, "num_perturbed_blocks": None},
    "one-pass-2": {"ascent_gradient": "previous"},
    "one-pass-all": {"ascent_gradient": "previous", "block_selection": "all"},
}


@dataclass
class BenchmarkArguments:
    """What is measured."""

    methods: str = field(default=",".join(METHODS), metadata={"help": "Names of methods, the plain one among them."})
    num_hidden_layers: int = field(default=12, metadata={"help": "Blocks of the BERT encoder, random weights."})
    hidden_size: int = field(default=384, metadata={"help": "Its width; heads are 64 wide."})
    batch_size: int = field(default=8, metadata={"help": "Rows of a micro-batch."})
    sequence_length: int = field(default=128, metadata={"help": "Tokens of a row."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches of a step."})
    rounds: int = field(default=7, metadata={"help": "Turns of each method; the figure is their median."})
    steps: int = field(default=3, metadata={"help": "Steps of a turn that count, after one or more that do not."})
    bf16: bool = field(default=False, metadata={"help": "Train under bf16 autocast."})
    output_file: str | None = field(default=None, metadata={"help": "Write the figures here as JSON."})


class RandomRows(Dataset):
    """As many rows of random tokens as asked for."""

    def __init__(self, rows: int, length: int, vocabulary: int):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(5, vocabulary, (rows, length), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": torch.tensor(index % 2)}


class LogFigures(TrainerCallback):
    """Keeps the last log line with the method's figures."""

    def __init__(self):
        self.line: dict[str, float] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.line = dict(logs)


class Contender:
    """A method with its own model and trainer, which goes a few steps whenever it is its turn."""

    def __init__(self, name: str, args: BenchmarkArguments, folder: str):
        self.settings = METHODS[name]
        set_seed(0)
        config = BertConfig(
            num_hidden_layers=args.num_hidden_layers,
            hidden_size=args.hidden_size,
            num_attention_heads=args.hidden_size // 64,
            intermediate_size=4 * args.hidden_size,
        )
        # LookSAM's cost is that of a whole interval, and the first step of a turn is the warm-up.
        interval = self.settings.get("perturb_interval", 1)
        self.warm_up = interval
        steps = self.warm_up + max(args.steps, interval) // interval * interval
        self.timer, self.figures = StepTimer(), LogFigures()
        self.trainer = LSAMTrainer(
            model=AutoModelForSequenceClassification.from_config(config),
            args=TrainingArguments(
                output_dir=f"{folder}/{name}",
                per_device_train_batch_size=args.batch_size,
                gradient_accumulation_steps=args.gradient_accumulation_steps,
                max_steps=steps,
                logging_steps=steps,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                bf16=args.bf16,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=RandomRows(
                steps * args.batch_size * args.gradient_accumulation_steps, args.sequence_length, config.vocab_size
            ),
            lsam_config=LSAMConfig(**self.settings),
            callbacks=[self.timer, self.figures],
        )
        self.trainer.remove_callback(PrinterCallback)

    def take_turn(self) -> float:
        """Seconds of a step in this turn: the median, or the mean over whole intervals."""
        self.timer.seconds.clear()
        self.trainer.train()
        seconds = self.timer.seconds[self.warm_up :]
        average = statistics.mean if self.warm_up > 1 else statistics.median
        return average(seconds)


def measure(args: BenchmarkArguments) -> dict[str, dict[str, Any]]:
    """
    The figures of each method.

    Returns:
        By name: `ratio` (median over the rounds of its step's time over the plain one's in the same round), `lowest`
        and `highest` ratio, `seconds` of a step (median), `bound`, `first_block` and `captured` (of the last turn).
    """
    names = args.methods.split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown or "plain" not in names:
        raise ValueError(f"methods={args.methods}: it must hold plain and others of {', '.join(METHODS)}.")
    times: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        contenders = {name: Contender(name, args, folder) for name in names}
        with tqdm(total=(args.rounds + 1) * len(names), unit="turn") as bar:
            for number in range(args.rounds + 1):
                for name, contender in contenders.items():
                    seconds = contender.take_turn()
                    # The first round warms up.
                    if number > 0:
                        times[name].append(seconds)
                    bar.update()
    figures = {}
    for name, contender in contenders.items():
        ratios = [mine / plain for mine, plain in zip(times[name], times["plain"], strict=True)]
        line = contender.figures.line
        figures[name] = {
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "seconds": statistics.median(times[name]),
            "bound": 1 + line.get("lsam/overhead", 0.0),
            "first_block": line.get("lsam/first_block"),
            "captured": line.get("lsam/captured"),
            "settings": contender.settings,
        }
    return figures


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    rows = ["| method | step time over plain | range | bound | first block | captured |", "|---|---|---|---|---|---|"]
    for name, row in figures.items():
        first = "" if row["first_block"] is None else f"{row['first_block']:.1f}"
        captured = "" if row["captured"] is None else f"{row['captured']:.2f}"
        spread = f"{row['lowest']:.2f} to {row['highest']:.2f}"
        rows.append(f"| {name} | {row['ratio']:.3f} | {spread} | {row['bound']:.3f} | {first} | {captured} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure, print the table, and write the file if one is named."""
    (args,) = parse_arguments((BenchmarkArguments,), sys.argv[1:] if argv is None else argv, __doc__ or "")
    logging.set_verbosity_error()
    figures = measure(args)
    print(table(figures))
    if args.output_file:
        results = {"stamp": stamp([0]), "arguments": asdict(args), "figures": figures}
        Path(args.output_file).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
