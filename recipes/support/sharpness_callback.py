"""Gradient norm and sharpness of each block, and a callback that logs them during training."""

import time
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from hf_lsam.blocks import find_blocks
from hf_lsam.perturbation import norms
from hf_lsam_recipes.support.sharpness import LossFunction, LossSurface, model_loss


def block_surfaces(
    model: nn.Module, batches: Iterable[Any], loss_function: LossFunction = model_loss
) -> dict[str, LossSurface]:
    """A [`LossSurface`] for each block with trainable weights, by its name, and one for the whole model as `"all"`."""
    surfaces = {}
    for name, block in find_blocks(model).items():
        if parameters := [parameter for parameter in block.parameters() if parameter.requires_grad]:
            surfaces[name] = LossSurface(model, batches, loss_function, parameters)
    return surfaces | {"all": LossSurface(model, batches, loss_function)}


def gradient_norms(surfaces: dict[str, LossSurface]) -> dict[str, float]:
    """The gradient norm of each of `surfaces` (see [`block_surfaces`]), from one gradient of the whole model."""
    whole = surfaces["all"]
    gradient = dict(zip(whole.parameters, whole.gradient(), strict=True))
    return {
        name: float(norms([gradient[parameter] for parameter in surface.parameters]).double().norm())
        for name, surface in surfaces.items()
    }


class SharpnessCallback(TrainerCallback):
    """
    Logs the flatness of the loss during training, without affecting the training.

        trainer.add_callback(SharpnessCallback(trainer, batches, interval=100))

    It logs `sharpness/gradient_norm/<block>` and `sharpness/sam/<block>` for each block and for `all`, optionally
    `sharpness/top_eigenvalue`, and `sharpness/seconds`, the time of the measurement.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer that it is added to.
        batches (`Iterable`): See [`LossSurface`]. A few hundred rows are enough to follow the training.
        interval (`int`): Number of optimizer steps between measurements.
        rho (`float` or `None`, *optional*, defaults to `0.05`): Length of the perturbation; the default is SAM's.
            `None` leaves out `sharpness/sam`; a measurement then costs a single backward pass.
        top_eigenvalue (`bool`, *optional*, defaults to `False`): Whether to log the largest eigenvalue of the Hessian,
            which costs up to 200 Hessian products.
        loss_function (`Callable`, *optional*): See [`LossSurface`].

    Raises:
        ValueError: if `interval` is below 1.
    """

    def __init__(
        self,
        trainer: Trainer,
        batches: Iterable[Any],
        interval: int,
        rho: float | None = 0.05,
        top_eigenvalue: bool = False,
        loss_function: LossFunction = model_loss,
    ):
        if interval < 1:
            raise ValueError(f"interval counts optimizer steps and must be at least 1, but is {interval}.")
        self.trainer, self.batches, self.interval, self.rho = trainer, batches, interval, rho
        self.top_eigenvalue, self.loss_function = top_eigenvalue, loss_function

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.interval:
            return
        start = time.perf_counter()
        surfaces = block_surfaces(self.trainer.accelerator.unwrap_model(model), self.batches, self.loss_function)
        figures = {f"sharpness/gradient_norm/{name}": norm for name, norm in gradient_norms(surfaces).items()}
        if self.rho is not None:
            figures |= {f"sharpness/sam/{name}": surface.sharpness(self.rho) for name, surface in surfaces.items()}
        if self.top_eigenvalue:
            figures["sharpness/top_eigenvalue"] = surfaces["all"].top_eigenvalue()
        # Logging resets `should_log`, which would suppress the Trainer's own log line of this step.
        should_log = control.should_log
        self.trainer.log(figures | {"sharpness/seconds": time.perf_counter() - start})
        control.should_log = should_log
