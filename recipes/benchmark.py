"""
Measure the cost of each method: time per step and peak memory as ratios to the plain Trainer, with the predicted
bound, and the same for other implementations of SAM.

    python recipes/benchmark.py
    python recipes/benchmark.py --hidden_size 768 --methods plain,sam,last-2 --output_file cost.json --picture cost.svg

The methods take turns of a few steps in one process. A turn of the plain Trainer precedes and follows each turn of
another method, which is compared with the mean of these two. A change in the speed of the machine thus affects both
alike. Memory is the peak allocated on the GPU or, on a CPU, the peak of a separate process for each method. The bound
is 1 + the predicted overhead, counted from the parameters of the model (hf_lsam/costs.py).
"""

import gc
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.blocks import find_blocks, find_candidates
from hf_lsam.costs import CostModel
from hf_lsam_recipes.support.cost.methods import METHODS
from hf_lsam_recipes.support.cost.peers import IN_TRAINER, PEERS, HandWrittenLoop
from hf_lsam_recipes.support.cost.table import table
from hf_lsam_recipes.support.cost.workload import Rows, WorkloadArguments, make_model
from hf_lsam_recipes.support.figures.cost import draw_cost, read_runs
from hf_lsam_recipes.support.json_files import check_output_file, write_json
from hf_lsam_recipes.support.settings import parse_arguments
from hf_lsam_recipes.support.stamp import stamp
from hf_lsam_recipes.support.step_timer import StepTimer, peak_memory_mib


@dataclass
class BenchmarkArguments(WorkloadArguments):
    """Settings of the benchmark."""

    methods: str = field(
        default=",".join([*METHODS, *IN_TRAINER, *PEERS]),
        metadata={"help": "Comma-separated methods and peers; must include plain."},
    )
    torch_compile: str | None = field(
        default=None, metadata={"help": "Compile the model: whole, or regional (its blocks one by one)."}
    )
    rounds: int = field(
        default=7, metadata={"help": "Turns of each method; the median is reported. 0: measure no time."}
    )
    steps: int = field(default=3, metadata={"help": "Measured steps of a turn, after one or more of warm-up."})
    memory_repeats: int = field(
        default=1,
        metadata={"help": "Processes of each method that measure peak memory; the median is reported. 0: none."},
    )
    output_file: str | None = field(
        default=None, metadata={"help": "JSON file for the results; if it exists, this run is appended to it."}
    )
    picture: str | None = field(
        default=None, metadata={"help": "File for a plot of step time against the first perturbed block."}
    )


class LogFigures(TrainerCallback):
    """Stores the last training log line, with the values that the method logs."""

    def __init__(self):
        self.line: dict[str, float] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.line = dict(logs)


class Contender:
    """
    A method or peer with a model of its own, which trains a few steps in each turn.

    Args:
        name (`str`): A key of `METHODS` or `PEERS`, or `IN_TRAINER`.
        args (`BenchmarkArguments`): The model, the data and the number of steps.
        folder (`str`): Folder for the Trainer's files.
    """

    def __init__(self, name: str, args: BenchmarkArguments, folder: str):
        self.settings = METHODS.get(name, {})
        # With an interval, whole intervals are measured, after one of warm-up. Other methods warm up for one step.
        interval = 5 if name.endswith("looksam-5") else self.settings.get("perturb_interval", 1)
        self.warm_up = interval
        self.steps = self.warm_up + max(args.steps, interval) // interval * interval
        self.timer, self.figures = StepTimer(), LogFigures()
        model = make_model(args)
        rows = Rows(self.steps * args.batch_size * args.gradient_accumulation_steps, args, model.config.vocab_size)
        self.loop: HandWrittenLoop | None = None
        if name in PEERS:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            batches = DataLoader(rows, args.batch_size)
            self.loop = HandWrittenLoop(name, model.to(device), batches, args.gradient_accumulation_steps, args.bf16)
            return
        # Accelerate reads this when the Trainer is constructed.
        os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = str(args.torch_compile == "regional")
        kind, extra = LSAMTrainer, {"lsam_config": LSAMConfig(**self.settings)}
        if name in IN_TRAINER:
            kind, extra = IN_TRAINER[name], {}
        self.trainer = kind(
            model=model,
            args=TrainingArguments(
                output_dir=f"{folder}/{name}",
                per_device_train_batch_size=args.batch_size,
                gradient_accumulation_steps=args.gradient_accumulation_steps,
                max_steps=self.steps,
                logging_steps=self.steps,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                bf16=args.bf16,
                use_cpu=not torch.cuda.is_available(),
                torch_compile=args.torch_compile is not None,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=rows,
            callbacks=[self.timer, self.figures],
            **extra,
        )
        self.trainer.remove_callback(PrinterCallback)

    def take_turn(self) -> float:
        """Train for a turn; returns seconds per step: the median, or the mean over whole intervals."""
        if self.loop is not None:
            seconds = self.loop.run(self.steps)
        else:
            self.timer.seconds.clear()
            self.trainer.train()
            seconds = self.timer.seconds
            # Between its turns, only the model stays in memory.
            self.trainer.optimizer = self.trainer.lr_scheduler = None
            self.trainer.accelerator.free_memory()
        average = statistics.mean if self.warm_up > 1 else statistics.median
        return average(seconds[self.warm_up :])


def measure_times(args: BenchmarkArguments, names: list[str]) -> dict[str, dict[str, Any]]:
    """
    Measure the time per step of each method.

    Returns:
        By name: `ratio` of its time to the mean of the plain turns before and after it (median over the rounds),
        `lowest` and `highest` ratio (for plain, a turn over the one before it: the noise), `seconds` per step
        (median), the `bound`, the `settings`, and `first_block` and `captured` as logged in the last turn.
    """
    others = [name for name in names if name != "plain"]
    times: dict[str, list[float]] = {name: [] for name in names}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        contenders = {name: Contender(name, args, folder) for name in names}
        with tqdm(total=(args.rounds + 1) * (2 * len(others) + 1), unit="turn") as bar:

            def turn(name: str, counts: bool) -> float:
                seconds = contenders[name].take_turn()
                if counts:
                    times[name].append(seconds)
                bar.update()
                return seconds

            for number in range(args.rounds + 1):
                # The first round warms up.
                counts = number > 0
                before = turn("plain", counts)
                for name in others:
                    seconds, after = turn(name, counts), turn("plain", counts)
                    if counts:
                        ratios[name].append(2 * seconds / (before + after))
                        ratios["plain"].append(after / before)
                    before = after
    figures = {}
    for name, contender in contenders.items():
        line = contender.figures.line
        figures[name] = {
            "ratio": 1.0 if name == "plain" else statistics.median(ratios[name]),
            "lowest": min(ratios[name], default=1.0),
            "highest": max(ratios[name], default=1.0),
            "seconds": statistics.median(times[name]),
            "bound": None if name in PEERS or name in IN_TRAINER else 1 + line.get("lsam/overhead", 0.0),
            "first_block": line.get("lsam/first_block"),
            "captured": line.get("lsam/captured"),
            "settings": contender.settings,
        }
    return figures


def peak_memory(args: BenchmarkArguments, name: str) -> float:
    """Peak memory in MiB during a turn of a method: allocated on the GPU or, without one, resident in this process."""
    logging.set_verbosity_error()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        Contender(name, args, folder).take_turn()
        return peak_memory_mib(on_gpu)


def peak_memory_of_new_process(args: BenchmarkArguments, name: str) -> float:
    """Peak memory in MiB of a new process that runs a turn of a method."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(peak_memory, args, name).result()


def measure_memory(args: BenchmarkArguments, names: list[str]) -> dict[str, dict[str, float]]:
    """Measure the peak memory of each method: by name, `memory_mib`, and `memory_ratio` to plain."""
    if torch.cuda.is_available():
        peaks = {name: peak_memory(args, name) for name in tqdm(names, unit="method")}
    else:
        peaks = {
            name: statistics.median(
                peak_memory_of_new_process(args, name) for _ in tqdm(range(args.memory_repeats), desc=name)
            )
            for name in names
        }
    return {name: {"memory_mib": peak, "memory_ratio": peak / peaks["plain"]} for name, peak in peaks.items()}


def measure(args: BenchmarkArguments) -> dict[str, dict[str, Any]]:
    """
    Measure the peak memory and time of each method, as requested by `memory_repeats` and `rounds`.

    Returns:
        By name, the values of `measure_memory` and `measure_times`.

    Raises:
        ValueError: if `methods` or `torch_compile` is not valid, or if they do not go together.
    """
    names = args.methods.split(",")
    known = [*METHODS, *IN_TRAINER, *PEERS]
    if "plain" not in names or not set(known).issuperset(names):
        raise ValueError(f"methods={args.methods}: it must include plain, and only names among {', '.join(known)}.")
    if args.torch_compile not in (None, "whole", "regional"):
        raise ValueError(f"torch_compile must be whole or regional, or left out, but is {args.torch_compile!r}.")
    if args.torch_compile is not None and not PEERS.keys().isdisjoint(names):
        raise ValueError(
            f"torch_compile={args.torch_compile} is supported in the Trainer only: leave {', '.join(PEERS)} out of "
            "methods."
        )
    figures: dict[str, dict[str, Any]] = {name: {} for name in names}
    # Memory first: on Linux, the peak of a new process includes the memory of its parent at the time of the fork.
    for wanted, measured in ((args.memory_repeats, measure_memory), (args.rounds, measure_times)):
        if wanted:
            for name, row in measured(args, names).items():
                figures[name] |= row
    return figures


def bound_lines(args: BenchmarkArguments) -> dict[str, list[float]]:
    """The bound (1 + predicted overhead) for 1, 2 and 4 adjacent blocks, listed by the index of the first of them."""
    model = make_model(args)
    blocks = find_blocks(model)
    candidates, costs = find_candidates(model, blocks, None), CostModel.of(model, blocks)
    return {
        str(k): [1 + costs.overhead(candidates[first : first + k]) for first in range(len(candidates) - k + 1)]
        for k in (1, 2, 4)
        if k <= len(candidates)
    }


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run the command line `argv`: measure, print the table, and write `output_file` and `picture` if they are set."""
    (args,) = parse_arguments((BenchmarkArguments,), sys.argv[1:] if argv is None else argv, __doc__ or "")
    for setting in ("output_file", "picture"):
        check_output_file(setting, getattr(args, setting))
    runs = read_runs(Path(args.output_file)) if args.output_file and Path(args.output_file).exists() else []
    logging.set_verbosity_error()
    figures = measure(args)
    print(table(figures))
    arguments = {key: value for key, value in asdict(args).items() if key not in ("output_file", "picture")}
    for key in ("model_name_or_path", "text_file"):
        arguments[key] = arguments[key] and Path(arguments[key]).name
    run = {"stamp": stamp([0]), "arguments": arguments, "bounds": bound_lines(args), "figures": figures}
    if args.output_file:
        write_json(Path(args.output_file), {"runs": [*runs, run]})
    if args.picture:
        draw_cost([run], Path(args.picture))
    return figures


def script() -> None:
    """Entry point of the script and of `hf-lsam benchmark`."""
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    script()
