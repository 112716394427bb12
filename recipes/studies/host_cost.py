"""
Measure the host cost of each method, with a model so small that only Python and launching operations take time.

    python recipes/studies/host_cost.py
    python recipes/studies/host_cost.py --methods plain,sam,sam-by-hand --rounds 40 --output_file host.json

When a GPU waits for its host, as with the small batches of GLUE, the host cost is the cost of a step. It is measured
as the CPU time of one thread for an optimizer step, with the Trainer's whole loop, relative to the plain Trainer in
the same round. The methods take turns of a few steps. Each has a separate training, which continues in its next turn.
The second pass runs extra checks at steps 1, 2, 4, 8, ..., so these steps are not counted for any method. Each turn
has one log line.

Calls of Python functions, and of C functions from Python, are counted in one more turn, with the same result in every
run. They are reported by the file that made them, and by the part of a pass that they belong to (the innermost of
`PARTS` on the stack, see `host_calls.py`).
"""

import gc
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam_recipes.studies.host_calls import CallCounter
from hf_lsam_recipes.support.cost.methods import METHODS
from hf_lsam_recipes.support.cost.peers import IN_TRAINER
from hf_lsam_recipes.support.json_files import check_output_file, write_json
from hf_lsam_recipes.support.markdown import markdown_table
from hf_lsam_recipes.support.settings import parse_arguments
from hf_lsam_recipes.support.stamp import stamp

_VOCABULARY = 100


@dataclass
class HostArguments:
    """Methods and sizes of the measurement."""

    methods: str = field(
        default=f"plain,off,one-pass-2,last-1,last-2,top-2,sam,{','.join(IN_TRAINER)}",
        metadata={"help": "Comma-separated methods of benchmark.py; must include plain."},
    )
    num_hidden_layers: int = field(default=12, metadata={"help": "Blocks of the BERT."})
    hidden_size: int = field(default=32, metadata={"help": "Its width; it has 2 heads."})
    batch_size: int = field(default=2, metadata={"help": "Rows of a batch."})
    sequence_length: int = field(default=8, metadata={"help": "Tokens of a row."})
    rounds: int = field(default=20, metadata={"help": "Turns of each method; the median of its ratios is reported."})
    steps: int = field(default=10, metadata={"help": "Steps of a turn."})
    warm_up: int = field(default=40, metadata={"help": "Steps of each method before the first turn."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the results."})

    def __post_init__(self):
        for name in ("num_hidden_layers", "batch_size", "sequence_length", "rounds", "steps", "warm_up"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        names = self.methods.split(",")
        if "plain" not in names or not {*METHODS, *IN_TRAINER}.issuperset(names):
            raise ValueError(
                f"methods={self.methods}: it must include plain, and only names among "
                f"{', '.join([*METHODS, *IN_TRAINER])}."
            )


class Contender(TrainerCallback):
    """
    The training of a method in a separate thread, which runs a few steps in each of its turns and waits otherwise.

    Args:
        name: The method.
        args: The model, and how many steps there are.
        folder: For the Trainer's files.
    """

    def __init__(self, name: str, args: HostArguments, folder: str):
        self.name = name
        self.seconds: list[float] = []
        self.calls = CallCounter()
        self.counted = 0
        self._counts, self._left, self._start = False, 0, 0.0
        self._turn, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._trainer = _make_trainer(name, args, folder)
        self._trainer.remove_callback(PrinterCallback)
        self._trainer.add_callback(self)
        self._thread = threading.Thread(target=self._train, name=name, daemon=True)

    def go(self, steps: int, counts: bool = False) -> None:
        """Run `steps` more steps, and time them or count their calls (not those whose number is a power of two)."""
        self.seconds, self._left, self._counts = [], steps, counts
        if self._thread.ident is None:
            # Not earlier: constructing a Trainer changes global state that another one reads when it begins to train.
            self._thread.start()
        self._turn.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Let the training end, if it has begun."""
        self._left = 0
        self._turn.release()
        if self._thread.ident is not None:
            self._thread.join()

    def _train(self) -> None:
        # The number of threads is a setting of each thread.
        torch.set_num_threads(1)
        try:
            self._trainer.train()
        except BaseException as error:
            self._error = error
        self._done.release()

    def on_train_begin(self, args, state, control, **kwargs):
        self._turn.acquire()
        self._begin_step(1)

    def on_step_end(self, args, state, control, **kwargs):
        seconds = time.thread_time() - self._start
        sys.setprofile(None)
        if not _is_power_of_two(state.global_step):
            self.seconds.append(seconds)
            self.counted += self._counts
        self._left -= 1
        if self._left == 0:
            self._done.release()
            self._turn.acquire()
        control.should_training_stop = self._left == 0
        self._begin_step(state.global_step + 1)

    def _begin_step(self, number: int) -> None:
        if self._counts and not _is_power_of_two(number):
            sys.setprofile(self.calls)
        self._start = time.thread_time()


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _make_trainer(name: str, args: HostArguments, folder: str) -> Trainer:
    set_seed(0)
    config = BertConfig(
        vocab_size=_VOCABULARY,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=2,
        intermediate_size=4 * args.hidden_size,
        max_position_embeddings=args.sequence_length,
    )
    # Up to the counted turn, and one step more, so that the training ends when told to, within one epoch.
    steps = args.warm_up + (args.rounds + 1) * args.steps + 1
    tokens = torch.randint(1, _VOCABULARY, (steps * args.batch_size, args.sequence_length))
    rows = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": place % 2}
        for place, row in enumerate(tokens)
    ]
    kind, extra = LSAMTrainer, {"lsam_config": LSAMConfig(**METHODS.get(name, {}))}
    if name == "plain" or name in IN_TRAINER:
        kind, extra = IN_TRAINER.get(name, Trainer), {}
    return kind(
        model=BertForSequenceClassification(config),
        args=TrainingArguments(
            output_dir=f"{folder}/{name}",
            per_device_train_batch_size=args.batch_size,
            max_steps=steps,
            logging_steps=args.steps,
            save_strategy="no",
            report_to="none",
            log_level="error",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows,
        **extra,
    )


def measure(args: HostArguments) -> dict[str, dict[str, Any]]:
    """
    The figures of each method.

    Returns:
        By name: `ratio` (median over the rounds of its CPU time over the plain one's), `lowest` and `highest` ratio,
        `milliseconds` of a step (median), `calls` of a step, `calls_ratio`, and of these `calls_by_part` and
        `calls_by_file`.
    """
    names = args.methods.split(",")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        contenders = [Contender(name, args, folder) for name in names]
        try:
            for contender in contenders:
                contender.go(args.warm_up)
            # Excludes all objects allocated so far from garbage collection during the steps.
            gc.collect()
            gc.freeze()
            for _ in tqdm(range(args.rounds), unit="round"):
                for contender in contenders:
                    contender.go(args.steps)
                    seconds[contender.name].append(statistics.mean(contender.seconds))
            for contender in contenders:
                contender.go(args.steps, counts=True)
        finally:
            for contender in contenders:
                contender.end()
            gc.unfreeze()
    calls = {contender.name: contender.calls.total / contender.counted for contender in contenders}
    figures = {}
    for contender in contenders:
        name, count = contender.name, contender.counted
        ratios = [own / plain for own, plain in zip(seconds[name], seconds["plain"], strict=True)]
        figures[name] = {
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "milliseconds": 1000 * statistics.median(seconds[name]),
            "calls": calls[name],
            "calls_ratio": calls[name] / calls["plain"],
            "calls_by_part": {key: number / count for key, number in contender.calls.parts.most_common()},
            "calls_by_file": {key: number / count for key, number in contender.calls.files.most_common()},
        }
    return figures


def tables(figures: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown: a table of methods, and two of the calls that each method adds to those of plain."""
    parts = [
        markdown_table(
            [
                {
                    "method": name,
                    "CPU time over plain": f"{row['ratio']:.3f}",
                    "range": f"{row['lowest']:.2f} to {row['highest']:.2f}",
                    "ms": f"{row['milliseconds']:.2f}",
                    "calls over plain": f"{row['calls_ratio']:.3f}",
                    "calls": f"{row['calls']:.0f}",
                }
                for name, row in figures.items()
            ]
        )
    ]
    others = [name for name in figures if name != "plain"]
    for title, key in (("calls for", "calls_by_part"), ("calls by", "calls_by_file")):
        plain = figures["plain"][key]
        places = sorted({place for row in figures.values() for place in row[key]})
        added = {p: {name: figures[name][key].get(p, 0) - plain.get(p, 0) for name in others} for p in places}
        lines = [
            {title: place, "plain": f"{plain.get(place, 0):.0f}"}
            | {name: f"{number:+.0f}" for name, number in added[place].items()}
            for place in sorted(places, key=lambda place: -sum(added[place].values()))
        ]
        parts.append(markdown_table(lines))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure, print the tables, and write the output file if one is named."""
    (args,) = parse_arguments((HostArguments,), sys.argv[1:] if argv is None else argv, __doc__ or "")
    check_output_file("output_file", args.output_file)
    logging.set_verbosity_error()
    figures = measure(args)
    print(tables(figures))
    if args.output_file:
        arguments = {key: value for key, value in asdict(args).items() if key != "output_file"}
        write_json(Path(args.output_file), {"stamp": stamp([0]), "arguments": arguments, "figures": figures})
    return figures


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
