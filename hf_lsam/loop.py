"""`LSAM`: the same steps in a training loop without a Trainer."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from accelerate import Accelerator, utils
from torch import Tensor, amp, distributed, nn, optim
from transformers.utils import logging

from .config import LSAMConfig
from .distributed import check_loop, is_distributed
from .given import Optimized
from .passes import buffers_not_sent
from .state import load_state, save_state
from .step import LSAMStep
from .step_log import announce

logger = logging.get_logger(__name__)


@dataclass(eq=False, repr=False)
class LSAM:
    """Layer-wise SAM in your own loop: `loss = lsam.backward(lambda: model(**batch).loss)` replaces `loss.backward()`.

    Args:
        model (`nn.Module`): The model as the loop calls it, possibly wrapped or compiled.
        optimizer (`Optimizer`): Any optimizer; only parameters that it trains are perturbed.
        config ([`LSAMConfig`]): The settings.
        max_steps (`int`): Number of optimizer steps of the training, for `perturb_start` and `perturb_end`.
        scaler (`GradScaler`, *optional*): Scales the loss in `backward`; the loop still calls its `step` and `update`.
        accelerator (`Accelerator`, *optional*): Runs the backward pass; its `accumulate` marks the last micro-batch.

    Raises `ValueError` if the settings do not fit the model, and `NotImplementedError` for what is not supported.
    """

    model: nn.Module
    optimizer: optim.Optimizer
    config: LSAMConfig
    max_steps: int
    scaler: amp.GradScaler | None = None
    accelerator: Accelerator | None = None

    def __post_init__(self) -> None:
        check_loop(self.model, self.config, self.scaler, self.accelerator)
        self.step, self.scaler = 0, self.accelerator.scaler if self.accelerator is not None else self.scaler
        self._lsam_optimized = Optimized(self)
        self._lsam = self._new_step()
        self._lsam_is_main = not is_distributed() or distributed.get_rank() == 0
        if self.config.enabled and self._lsam_is_main:
            announce(self._lsam.config, self._lsam.candidates, self._lsam.costs, self.max_steps)

    def _new_step(self, has_begun: bool = False) -> LSAMStep:
        own = utils.extract_model_from_parallel(self.model, keep_torch_compile=False)
        config = self.config if self.config.enabled else LSAMConfig(rho=0.0, block_selection="all")  # fits any model
        given: dict = dict(called=self.model, optimized=self._lsam_optimized, roots=lambda: {"lsam": self})
        return LSAMStep(own, config, self.max_steps, self.scaler, **given, has_begun=has_begun)

    def backward(self, compute_loss: Callable[[], Tensor], is_last: bool = True) -> Tensor:
        """Both passes of a micro-batch, if `is_last` the last one of an optimizer step; returns the loss of pass 1."""
        if self.step >= self.max_steps:
            what = f"The loop runs more than the max_steps={self.max_steps} optimizer steps that LSAM was given"
            logger.warning_once(f"{what}; further ones are plain. Set max_steps to the number of all steps.")
        if not self._lsam.window and not self._lsam.fits(self._lsam.config):
            log, self._lsam = self._lsam.log, self._new_step(has_begun=True)
            self._lsam.log.load(log.state())
        step, self.compute_loss = self._lsam, compute_loss
        if step.window and all(parameter.grad is None for parameter in self.model.parameters()):
            step.give_up()  # the loop has called `zero_grad` in the middle of a step
        own = step.config.sharpness_scope == "micro_batch" and step.perturbs(self.step)

        def run() -> Tensor:
            again = bool(step.second_pass.running)
            sync = getattr(self.model, "no_sync", nullcontext) if again or own or not is_last else nullcontext
            with sync(), buffers_not_sent(self.model) if again else nullcontext():
                loss = compute_loss()
                if not again:
                    step.second_pass.see(loss)
                if self.accelerator is not None and (loss.requires_grad or not again):
                    self.accelerator.backward(loss)
                elif loss.requires_grad or not again:
                    (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                return loss.detach()

        steps = is_last and (self.accelerator is None or self.accelerator.sync_gradients)
        loss = step(run, run, self.step, steps)
        self.step += steps
        return loss

    @property
    def in_second_pass(self) -> bool:
        """Whether pass 2 runs, in which `compute_loss` is called a second time for the same batch."""
        return self._lsam.second_pass.running == 2

    def log(self) -> dict[str, float]:
        """The `lsam/` figures since the last call, those of [`LSAMMixin`]."""
        line = self._lsam.log.line()
        self._lsam.reset_log()
        return line

    def save(self, folder: str) -> None:
        """Write `lsam_state.safetensors` to `folder`, an existing one; to be called in every process."""
        save_state(self._lsam, folder, self.step, self._lsam_is_main)

    def load(self, folder: str) -> None:
        """Continue from what `save` wrote to `folder`; `ValueError` if it is damaged or of another model."""
        self.step = load_state(self._lsam, folder)
