"""Optional measurements: gradient norms during training, and the loss landscape around the trained weights."""

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
    Measurements of the plain loss in evaluation mode (no dropout, running statistics of batch normalisation), on the
    same training rows in every run. They do not affect the training, but may raise the reported peak memory.

    Args:
        gradient_norm_steps (`int`, *optional*):
            Number of optimizer steps after which the gradient norms of each block and of the whole model are logged.
        landscape_points (`int`, *optional*):
            Number of points of the loss landscapes: the loss along one random direction of each block, and of the
            whole model, is written to `landscapes.json` after training.
        measured_samples (`int`, *optional*, defaults to `64`):
            Number of training rows that both are measured on.
    """

    gradient_norm_steps: int | None = field(
        default=None, metadata={"help": "Log each block's gradient norm every this many optimizer steps."}
    )
    landscape_points: int | None = field(
        default=None, metadata={"help": "Points of each block's loss landscape, measured after training."}
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
    """
    Check that the requested measurements are possible, and add the callback that logs gradient norms.

    Args:
        trainer (`Trainer`): The trainer, before training.
        arguments (`MeasureArguments`): The requested measurements.
        rows (`Dataset` or `None`): The training rows, of which a random part is used.

    Raises:
        ValueError: if there are no training rows, or if FSDP or DeepSpeed shards the model.
    """
    if not arguments.wanted:
        return
    if rows is None:
        raise ValueError(
            "gradient_norm_steps and landscape_points measure on training rows: set do_train, or leave them out."
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "gradient_norm_steps and landscape_points need the whole model in each process, but FSDP and DeepSpeed "
            "shard it: leave them out, or train without FSDP and DeepSpeed."
        )
    if arguments.gradient_norm_steps is not None:
        batches = _measured_batches(trainer, arguments, rows)
        trainer.add_callback(SharpnessCallback(trainer, batches, arguments.gradient_norm_steps, rho=None))


def write_landscapes(trainer: Trainer, arguments: MeasureArguments, rows: Dataset) -> None:
    """If `landscape_points` is set, write `landscapes.json`: points and losses of each block and the whole model."""
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
