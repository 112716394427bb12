"""
Soak test: a long training of a tiny model with random settings, to detect memory growth and drift from the reference.

    python recipes/studies/soak.py --steps 20000 --output_file recipes/studies/results/soak.json

The training consists of stretches of a few hundred steps, each with settings drawn at random. A twin of the model
makes the same steps with `hf_lsam/reference.py`, from the same weights, batches and random numbers, in float64. At the
end of each stretch, the weights of both are compared, and the memory and the live objects of the process are measured.
The script exits with an error if the weights differ by more than rounding.
"""

import dataclasses
import functools
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    PrinterCallback,
    TrainingArguments,
    logging,
)

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam_recipes.studies.soak_stretch import BATCH, Rows, Stretch, build, draw
from hf_lsam_recipes.studies.soak_twin import Twin
from hf_lsam_recipes.support.json_files import check_output_file, write_json
from hf_lsam_recipes.support.settings import parse_arguments
from hf_lsam_recipes.support.stamp import stamp

LARGEST_DIFFERENCE = 1e-9


@dataclass
class SoakArguments:
    """Length and seed of the soak."""

    steps: int = field(default=20_000, metadata={"help": "Optimizer steps, over all stretches."})
    seed: int = field(default=0, metadata={"help": "Seed of the settings, the model and the batches."})
    longest: int = field(default=600, metadata={"help": "Maximum steps of a stretch; the minimum is a third of it."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the results."})

    def __post_init__(self):
        # A stretch has a multiple of 4 steps, and a third of the longest is the shortest.
        for name, least in (("steps", 1), ("longest", 12)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, but is {getattr(self, name)}.")
        check_output_file("output_file", self.output_file)


class InjectedError(Exception):
    """Raised on purpose in a pass, to test that the training continues."""


class SoakTrainer(LSAMTrainer):
    """Records the batches of a step with their random states, and injects the faults of the stretch into passes."""

    def __init__(self, stretch: Stretch, draws: random.Random, **options: Any):
        super().__init__(**options)
        self.soak = SimpleNamespace(stretch=stretch, draws=draws, window=[], fault=None, start=[])
        # The model's loss is a mean over its micro-batch, whatever number of items it is told.
        self.model_accepts_loss_kwargs = False

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any) -> Tensor:
        """Record the micro-batch; at the first one of a step also record the weights and draw the fault."""
        soak = self.soak
        if not soak.window:
            stretch = soak.stretch
            late = 2 * self.state.global_step >= stretch.steps
            soak.fault = stretch.fault if late and soak.draws.random() < stretch.fault_rate else "none"
            soak.start = [parameter.detach().clone() for parameter in self.model.parameters()]
        soak.window.append({"inputs": dict(inputs), "state": torch.get_rng_state()})
        return super().training_step(model, inputs, *rest)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss with the fault: "zero" in every pass, others at perturbed weights for the last micro-batch only."""
        loss = super().compute_loss(*args, **kwargs)
        soak = self.soak
        if not self.model.training:
            return loss
        moved = any(not torch.equal(p, start) for p, start in zip(self.model.parameters(), soak.start, strict=True))
        last_pass = self.accelerator.sync_gradients and moved
        if soak.fault == "zero":
            return loss * 0.0
        if soak.fault == "not finite" and last_pass:
            return loss * float("nan")
        if soak.fault == "error" and last_pass:
            raise InjectedError
        return loss


def set_up(model: nn.Module, stretch: Stretch) -> torch.optim.Optimizer:
    """Freeze layers and set the dropout as the stretch asks, and make an optimizer."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    layers: Any = model.layers
    for module in [model.tokens, model.types, *layers][: 3 * stretch.frozen]:
        module.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = stretch.dropout
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if stretch.adamw:
        # With a larger eps, rounding errors of gradients near zero are not amplified.
        return torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01, eps=1e-4)
    return torch.optim.SGD(trained, lr=0.02, weight_decay=1e-3)


def run(model: nn.Module, twin: nn.Module, rows: Rows, stretch: Stretch, draws: random.Random) -> dict[str, Any]:
    """Train `model` with the trainer and `twin` with the reference; returns the results of the stretch."""
    twin.load_state_dict(model.state_dict())
    optimizer, callback = set_up(model, stretch), Twin(twin, stretch, set_up(twin, stretch))
    # Reentrant checkpointing computes no gradients if no input of the checkpoint requires one.
    checkpoints = functools.partial(checkpoint, use_reentrant=draws.random() < 0.5 and stretch.frozen == 0)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=stretch.steps,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=stretch.accumulation,
            max_grad_norm=stretch.clipping,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            logging_strategy="steps" if stretch.logging else "no",
            logging_steps=stretch.logging or 1,
            eval_strategy="steps" if stretch.evaluation else "no",
            eval_steps=stretch.evaluation or None,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=draws.randrange(2**31),
        )
        tiny: Any = model
        for layer in tiny.layers:
            layer.gradient_checkpointing = stretch.checkpointing
            layer._gradient_checkpointing_func = checkpoints
        trainer = SoakTrainer(
            stretch,
            draws,
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=torch.utils.data.Subset(rows, range(2)),
            lsam_config=LSAMConfig(**stretch.config),
            optimizers=(optimizer, None),
            callbacks=[callback],
        )
        trainer.remove_callback(PrinterCallback)
        callback.trainer = trainer
        started = time.perf_counter()
        trainer.train()
    for parameter in (*model.parameters(), *twin.parameters()):
        parameter.grad = None
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return {
        "seconds": time.perf_counter() - started,
        "faults": callback.faults,
        "largest_difference": max(float((left - right).detach().abs().max()) for left, right in pairs),
    }


def memory() -> dict[str, float]:
    """After garbage collection: resident MiB of the process, objects tracked by the collector, tensors among them."""
    gc.collect()
    objects = gc.get_objects()
    return {
        "rss_mib": psutil.Process().memory_info().rss / 2**20,
        "objects": len(objects),
        "tensors": sum(issubclass(type(thing), Tensor) for thing in objects),
    }


def growth(stretches: list[dict[str, Any]], name: str) -> dict[str, float]:
    """
    The slope of a line through the values of `name`, per 1,000 steps, with its standard error.

    Only the second half of the stretches counts, since the first use of a feature may allocate memory once.
    """
    rest = stretches[len(stretches) // 2 :]
    if len(rest) < 3:
        return {}
    steps, values = ([float(row[key]) for row in rest] for key in ("end", name))
    line = stats.linregress([step / 1000 for step in steps], values)
    return {
        "per_1000_steps": float(line.slope),
        "standard_error": float(line.stderr),
        "first": values[0],
        "last": values[-1],
    }


def soak(args: SoakArguments, say: Callable[..., None] = print) -> dict[str, Any]:
    """Run all stretches; returns their results, and the growth of memory."""
    torch.set_num_threads(1)
    draws, rows = random.Random(args.seed), Rows(args.seed)
    model, twin = build(args.seed), build(args.seed)
    # As text, since lists and dictionaries would be counted as objects.
    lines: list[str] = []
    done = 0
    while done < args.steps:
        # A multiple of 4, so that the shares of perturb_start and perturb_end are whole steps.
        steps = 4 * (draws.randint(args.longest // 3, args.longest) // 4)
        stretch = draw(draws, min(steps, max(4, args.steps - done)))
        figures = run(model, twin, rows, stretch, draws)
        done += stretch.steps
        lines.append(json.dumps({"end": done} | dataclasses.asdict(stretch) | figures | memory()))
        say(lines[-1], flush=True)
    stretches = [json.loads(line) for line in lines]
    return {
        "stamp": stamp([args.seed]),
        "steps": done,
        "seconds": sum(row["seconds"] for row in stretches),
        "faults": sum(row["faults"] for row in stretches),
        "largest_difference": max(row["largest_difference"] for row in stretches),
        "growth": {name: growth(stretches, name) for name in ("rss_mib", "objects", "tensors")},
        "stretches": stretches,
    }


def main(argv: list[str] | None = None) -> None:
    """Run the soak, print a line per stretch and a summary, and write the output file if one is named."""
    try:
        (args,) = parse_arguments((SoakArguments,), sys.argv[1:] if argv is None else argv, __doc__ or "")
    except ValueError as error:
        sys.exit(f"soak.py: error: {error}")
    logging.set_verbosity_error()
    results = soak(args)
    print(json.dumps({name: value for name, value in results.items() if name != "stretches"}, indent=1))
    if args.output_file:
        write_json(Path(args.output_file), results)
    if not results["largest_difference"] <= LARGEST_DIFFERENCE:
        sys.exit(f"Weights drifted from the reference: by up to {results['largest_difference']:.1e}.")


if __name__ == "__main__":
    main()
