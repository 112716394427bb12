"""What recipes can measure: gradient norms while they train, and the loss around the trained weights."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import Trainer

from hf_lsam_recipes.support.sharpness_callback import SharpnessCallback, block_surfaces


@dataclass
class MeasureArguments:
    """
    Measurements of the plain loss, in evaluation mode (no dropout; batch normalisation has its running statistics) and
    on the same training rows in every run. They do not change the training, but their memory counts into its peak.

    Args:
        gradient_norm_steps (`int`, *optional*):
            Log the gradient norm of each block and of the whole model after every so many optimizer steps.
        landscape_points (`int`, *optional*):
            After training, write the loss along one random direction of each block, and of the whole model, at so
            many points to `landscapes.json`.
        measured_samples (`int`, *optional*, defaults to `64`):
            How many training rows both are measured on.
    """

    gradient_norm_steps: int | None = field(
        default=None, metadata={"help": "Log each block's gradient norm after every so many steps."}
    )
    landscape_points: int | None = field(
        default=None, metadata={"help": "Points of each block's landscape, which is measured after training."}
    )
    measured_samples: int = field(default=64, metadata={"help": "Training rows that both are measured on."})

    def __post_init__(self):
        for name, least in (("gradient_norm_steps", 1), ("landscape_points", 2), ("measured_samples", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, but is {value}.")

    @property
    def wanted(self) -> bool:
        """Whether anything is to be measured."""
        return self.gradient_norm_steps is not None or self.landscape_points is not None


def set_up_measures(trainer: Trainer, arguments: MeasureArguments, rows: Dataset | None) -> None:
    """Check that what is wanted can be measured on some of `rows`, and let the trainer log gradient norms."""
    if not arguments.wanted:
        return
    if rows is None:
        raise ValueError("gradient_norm_steps and landscape_points measure on training rows: set do_train.")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "gradient_norm_steps and landscape_points need the whole model in each process, which FSDP and DeepSpeed "
            "share out: leave them out, or train without FSDP and DeepSpeed."
        )
    if arguments.gradient_norm_steps is not None:
        batches = _measured_batches(trainer, arguments, rows)
        trainer.add_callback(SharpnessCallback(trainer, batches, arguments.gradient_norm_steps, rho=None))


def write_landscapes(trainer: Trainer, arguments: MeasureArguments, rows: Dataset) -> None:
    """Write places and losses of each block's landscape, and of the whole model's, by name, if they are wanted."""
    if arguments.landscape_points is None:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    surfaces = block_surfaces(model, _measured_batches(trainer, arguments, rows))
    landscapes = {
        name: asdict(surface.landscape(points=arguments.landscape_points)) for name, surface in surfaces.items()
    }
    if trainer.is_world_process_zero():
        text = json.dumps(landscapes, indent=1) + "\n"
        (Path(trainer.args.output_dir) / "landscapes.json").write_text(text, encoding="utf-8")


def _measured_batches(trainer: Trainer, arguments: MeasureArguments, rows: Dataset) -> Iterable[Any]:
    order = np.random.default_rng(0).permutation(len(rows))  # type: ignore[arg-type]
    return DataLoader(
        Subset(rows, order[: arguments.measured_samples].tolist()),
        batch_size=trainer.args.per_device_eval_batch_size,
        collate_fn=trainer.data_collator,
    )
