"""`LSAM`: the same steps in a loop without a Trainer."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from accelerate import Accelerator, utils
from torch import Tensor, amp, distributed, nn, optim
from transformers.utils import logging

from .config import LSAMConfig
from .distributed import check_loop, is_distributed
from .given import Optimized, loop_roots
from .passes import buffers_not_sent
from .state import load_state, save_state
from .step import LSAMStep

logger = logging.get_logger(__name__)


@dataclass(eq=False, repr=False)
class LSAM:
    """
    Layer-wise SAM in a loop of one's own: `loss = lsam.backward(lambda: model(**batch).loss)`, not `loss.backward()`.

    Args:
        model (`nn.Module`): What the loop calls, wrapped or compiled as it may be.
        optimizer (`Optimizer`): Any one; blocks are chosen among what it trains.
        config ([`LSAMConfig`]): The settings; what does not fit the model, or is not supported, is refused at once.
        max_steps (`int`): Optimizer steps of the training, of which `perturb_start` and `perturb_end` are shares.
        scaler (`GradScaler`, *optional*): Scales the loss in here; the loop calls its `step` and `update` as ever.
        accelerator (`Accelerator`, *optional*): Runs the backward pass; its `accumulate` tells which one is the last.
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
        own, trained = utils.extract_model_from_parallel(self.model, keep_torch_compile=False), Optimized(self)
        config = self.config if self.config.enabled else LSAMConfig(rho=0.0, block_selection="all")  # of any model
        self._lsam = LSAMStep(own, config, self.max_steps, self.scaler, self.model, trained, lambda: loop_roots(self))

    def backward(self, compute_loss: Callable[[], Tensor], is_last: bool = True) -> Tensor:
        """Both passes of a micro-batch, after which the optimizer steps if it `is_last`; returns pass 1's loss."""
        if self.step >= self.max_steps:
            what = f"The loop has run the max_steps={self.max_steps} optimizer steps that LSAM was told of"
            logger.warning_once(f"{what}, and those that follow are plain. Count those of the whole training.")
        step, self.compute_loss = self._lsam, compute_loss
        own = step.config.sharpness_scope == "micro_batch" and step.perturbs(self.step)

        def run() -> Tensor:
            again = bool(step.second_pass.running)
            sync = getattr(self.model, "no_sync", nullcontext) if again or own or not is_last else nullcontext
            with sync(), buffers_not_sent(self.model) if again else nullcontext():
                loss = compute_loss()
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
        """Whether `compute_loss` is called again, for pass 2."""
        return self._lsam.second_pass.running == 2

    def log(self) -> dict[str, float]:
        """The `lsam/` figures since the last call."""
        line = self._lsam.log.line()
        self._lsam.reset_log()
        return line

    def save(self, folder: str) -> None:
        """Write what the next step begins with, as the Trainer does; for every process to call."""
        save_state(self._lsam, folder, self.step, not is_distributed() or distributed.get_rank() == 0)

    def load(self, folder: str) -> None:
        """Go on from what `save` has written."""
        self.step = load_state(self._lsam, folder)
