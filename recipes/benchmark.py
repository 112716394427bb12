"""
What each method costs: time of a step and peak memory as ratios to the plain Trainer's, beside the bound, and the
peers that one would pick instead.

    python recipes/benchmark.py
    python recipes/benchmark.py --hidden_size 768 --methods plain,sam,last-2 --output_file cost.json --picture cost.svg

The methods take turns in one process, a few steps each, over and over, and between any two of them the plain Trainer
takes one: each is compared with the plain turns right before and after it, so that a machine whose speed changes hits
both alike. Memory is what is allocated on the GPU or, on a CPU, that of a process of its own for each method. The
bound is 1 + the predicted overhead, counted from the parameters of the model (hf_lsam/costs.py).
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
from hf_lsam_recipes.support.cost.peers import IN_TRAINER, PEERS, HandWrittenLoop, SAMTrainer
from hf_lsam_recipes.support.cost.table import table
from hf_lsam_recipes.support.cost.workload import Rows, WorkloadArguments, make_model
from hf_lsam_recipes.support.figures.cost import draw_cost, read_runs
from hf_lsam_recipes.support.json_files import check_output_file, write_json
from hf_lsam_recipes.support.settings import parse_arguments
from hf_lsam_recipes.support.stamp import stamp
from hf_lsam_recipes.support.step_timer import StepTimer, peak_memory_mib

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
class BenchmarkArguments(WorkloadArguments):
    """What is measured."""

    methods: str = field(
        default=",".join([*METHODS, IN_TRAINER, *PEERS]),
        metadata={"help": "Names of methods and peers, the plain one among them."},
    )
    torch_compile: str | None = field(
        default=None, metadata={"help": "Compile the model: whole, or regional (its blocks one by one)."}
    )
    rounds: int = field(default=7, metadata={"help": "Turns of each method; the figure is their median. 0: no times."})
    steps: int = field(default=3, metadata={"help": "Steps of a turn that count, after one or more that do not."})
    memory_repeats: int = field(
        default=1, metadata={"help": "Processes of each method for its peak memory, the median of which counts."}
    )
    output_file: str | None = field(
        default=None, metadata={"help": "JSON of figures; a run is added to those that the file already holds."}
    )
    picture: str | None = field(default=None, metadata={"help": "Draw cost over first perturbed block here."})


class LogFigures(TrainerCallback):
    """Keeps the last log line with the method's figures."""

    def __init__(self):
        self.line: dict[str, float] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.line = dict(logs)


class Contender:
    """A method, or a peer, with its own model, which goes a few steps whenever it is its turn."""

    def __init__(self, name: str, args: BenchmarkArguments, folder: str):
        self.settings = METHODS.get(name, {})
        # LookSAM's cost is that of a whole interval, and the first step of a turn is the warm-up.
        interval = 5 if name.endswith("looksam-5") else 1
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
        # What Accelerate reads when the Trainer is made.
        os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = str(args.torch_compile == "regional")
        kind, extra = LSAMTrainer, {"lsam_config": LSAMConfig(**self.settings)}
        if name == IN_TRAINER:
            kind, extra = SAMTrainer, {}
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
        """Seconds of a step in this turn: the median, or the mean over whole intervals."""
        if self.loop is not None:
            seconds = self.loop.run(self.steps)
        else:
            self.timer.seconds.clear()
            self.trainer.train()
            seconds = self.timer.seconds
            # While others have their turns, its model alone stays in memory.
            self.trainer.optimizer = self.trainer.lr_scheduler = None
            self.trainer.accelerator.free_memory()
        average = statistics.mean if self.warm_up > 1 else statistics.median
        return average(seconds[self.warm_up :])


def measure_times(args: BenchmarkArguments, names: list[str]) -> dict[str, dict[str, Any]]:
    """
    The figures of each method that have to do with time.

    Returns:
        By name: `ratio` (median over the rounds of its step's time over the mean of the plain turns before and after
        it), `lowest` and `highest` ratio (of the plain one: a turn over the one before, which is the noise), `seconds`
        of a step (median), `bound`, `first_block` and `captured` (of the last turn).
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
            "bound": None if name in PEERS or name == IN_TRAINER else 1 + line.get("lsam/overhead", 0.0),
            "first_block": line.get("lsam/first_block"),
            "captured": line.get("lsam/captured"),
            "settings": contender.settings,
        }
    return figures


def peak_memory(args: BenchmarkArguments, name: str) -> float:
    """Peak memory in MiB of a turn of a method, which on a CPU is that of this process."""
    logging.set_verbosity_error()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        Contender(name, args, folder).take_turn()
        return peak_memory_mib(on_gpu)


def in_a_process(args: BenchmarkArguments, name: str) -> float:
    """The same, of a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(peak_memory, args, name).result()


def measure_memory(args: BenchmarkArguments, names: list[str]) -> dict[str, dict[str, float]]:
    """By name the peak `memory_mib`, on a CPU of a fresh process, and its ratio to the plain one's."""
    if torch.cuda.is_available():
        peaks = {name: peak_memory(args, name) for name in tqdm(names, unit="method")}
    else:
        peaks = {
            name: statistics.median(in_a_process(args, name) for _ in tqdm(range(args.memory_repeats), desc=name))
            for name in names
        }
    return {name: {"memory_mib": peak, "memory_ratio": peak / peaks["plain"]} for name, peak in peaks.items()}


def measure(args: BenchmarkArguments) -> dict[str, dict[str, Any]]:
    """The figures of each method: those of `measure_times` and of `measure_memory`, as far as they are asked for."""
    names = args.methods.split(",")
    known = [*METHODS, IN_TRAINER, *PEERS]
    if "plain" not in names or not set(known).issuperset(names):
        raise ValueError(f"methods={args.methods}: it must hold plain and others of {', '.join(known)}.")
    if args.torch_compile not in (None, "whole", "regional"):
        raise ValueError(f"torch_compile must be whole or regional, or left out, but is {args.torch_compile!r}.")
    if args.torch_compile is not None and not PEERS.keys().isdisjoint(names):
        raise ValueError(
            f"torch_compile={args.torch_compile} compiles for the Trainer only: leave peers out of methods."
        )
    figures: dict[str, dict[str, Any]] = {name: {} for name in names}
    # Memory first: Linux counts into the peak of a new process what its parent has in memory as it starts it.
    for wanted, measured in ((args.memory_repeats, measure_memory), (args.rounds, measure_times)):
        if wanted:
            for name, row in measured(args, names).items():
                figures[name] |= row
    return figures


def bound_lines(args: BenchmarkArguments) -> dict[str, list[float]]:
    """For 1, 2 and 4 neighbouring blocks, 1 + the predicted overhead by the first of them."""
    model = make_model(args)
    blocks = find_blocks(model)
    candidates, costs = find_candidates(model, blocks, None), CostModel.of(model, blocks)
    return {
        str(k): [1 + costs.overhead(candidates[first : first + k]) for first in range(len(candidates) - k + 1)]
        for k in (1, 2, 4)
        if k <= len(candidates)
    }


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure, print the table, and write the files that are named."""
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
    """Run the command line, as the file and as `hf-lsam benchmark`."""
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    script()
