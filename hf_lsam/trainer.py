"""`LSAMMixin` and `LSAMTrainer`: the Trainer with a training step of two passes."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from .composition import check_order, check_repeatable, signature_of
from .config import LSAMConfig
from .deepspeed import bypass_engine, delayed_update, reduction_bits
from .distributed import check_hooks, check_supported
from .given import Optimized
from .kinds import Attributes
from .passes import Backward, buffers_not_sent, copy_of, modes_kept, weights_counted_once
from .search import set_up_trial
from .state import load_state, save_state
from .step import LSAMStep
from .step_log import StuckWatch, announce, append_row, drop_rows_after

if TYPE_CHECKING:
    from transformers import Trainer as _AnyTrainer
else:
    _AnyTrainer = object

logger = logging.get_logger(__name__)


class LSAMMixin(_AnyTrainer):
    """Layer-wise SAM for any subclass of [`~transformers.Trainer`]: `class LSAMSFTTrainer(LSAMMixin, SFTTrainer)`.

    Both passes run through the `training_step` of the next class, with its autocast, loss normalisation and gradient
    scaler. The logged loss is that of pass 1 (with `ascent_gradient="previous"`, the one at the perturbed weights).

    A line at the start of training says what is perturbed, when, and at what predicted cost. Each log line of the
    training loss also has, as means over the perturbed steps since the last line:

    - `lsam/grad_norm`: norm of the plain gradient over all candidate blocks;
    - `lsam/captured`: share of the selected blocks in its square;
    - `lsam/perturbation_norm`: norm of the perturbation;
    - `lsam/first_block`: index of the first perturbed block (0-based), at which pass 2 starts;
    - `lsam/overhead`: cost of pass 2 in plain steps, counted from what ran; mean over all steps, perturbed or not;
    - `lsam/active`: share of the steps that were perturbed;
    - `lsam/skipped`: number of perturbations that were skipped, since the gradient was zero or not finite, no block
      with a gradient fitted `max_overhead`, or pass 2 failed. A warning gives each reason once.

    For each of these lines, `lsam_blocks.jsonl` in the output directory gets a row with `counts`, the number of
    selections of each block, and `norms`, its mean gradient norm.

    In `hyperparameter_search`, `hp_space` may also return fields of [`LSAMConfig`], which hold for that trial.

    Args:
        lsam_config ([`LSAMConfig`], *optional*, defaults to `LSAMConfig()`): The settings; the rest is the Trainer's.

    Raises:
        TypeError: if `lsam_config` is not a [`LSAMConfig`].
        ValueError: from `train`, before the first step, if the settings do not fit the model.
        NotImplementedError: likewise, for what is not supported; the message says what to set instead.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        check_order(cls, LSAMMixin)
        cls.__signature__ = signature_of(cls, LSAMMixin)

    def __init__(self, *args: Any, lsam_config: LSAMConfig | None = None, **kwargs: Any):
        if lsam_config is not None and not isinstance(lsam_config, LSAMConfig):
            raise TypeError(
                f"lsam_config must be an LSAMConfig, but is a {type(lsam_config).__name__}. Convert a dictionary with "
                "LSAMConfig(**settings)."
            )
        super().__init__(*args, **kwargs)
        self.lsam_config = LSAMConfig() if lsam_config is None else lsam_config
        self._lsam: LSAMStep | None = None
        self._lsam_run: Any = None  # the TrainerState that `_lsam` belongs to; each run has its own
        self._lsam_checkpoint: str | None = None
        self._lsam_watch, self._lsam_flops, self._lsam_reached = StuckWatch(), 0.0, False
        self._lsam_optimized = Optimized(self)
        self._lsam_counted: tuple[Any, int] = (None, 0)  # the last batch, and its floating-point operations

    def train(self, *args: Any, **kwargs: Any):
        """Check that the settings are supported and fit the model, then train."""
        self._lsam, self._lsam_run, self._lsam_checkpoint, self._lsam_reached = None, None, None, False
        own_config = self.lsam_config
        try:
            return super().train(*args, **kwargs)
        finally:
            self.lsam_config = own_config
            self._lsam_counted = (None, 0)

    def _hp_search_setup(self, trial: Any) -> None:
        """Apply the settings of a trial, if there is one, and check the settings: `train` always calls this."""
        if self.hp_search_backend is None or trial is None:
            super()._hp_search_setup(trial)
        else:
            set_up_trial(self, trial, super()._hp_search_setup)
        if self.lsam_config.enabled:
            check_repeatable(type(self), LSAMMixin)
            check_supported(self, self.lsam_config)
            # Before transformers 5.3, a trial's model is created later, so the first step checks it.
            if self.model is not None:
                self._new_step(self.model, max_steps=1, has_begun=False)

    @property
    def in_second_pass(self) -> bool:
        """Whether pass 2 runs, in which `training_step` and `compute_loss` are called again for the same batch.

        Changes that a pass makes to the trainer, its objects and modules are undone. Files, iterators and objects of
        other threads cannot be restored: `if not self.in_second_pass: self.file.write(...)`.
        """
        return self._lsam is not None and self._lsam.second_pass.running == 2

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run pass 1 over a micro-batch and, if the step is perturbed, pass 2; returns the loss of pass 1."""
        training_step = super().training_step
        step = self._lsam_of_run(model) if self.lsam_config.enabled else None
        self._lsam_reached = True
        if step is None:
            return training_step(model, inputs, num_items_in_batch)
        step.structure.look()
        number, step.max_steps = self.state.global_step, max(self.state.max_steps, 1)
        # Each process is perturbed by its own gradient; the step averages them over processes afterwards.
        own = step.config.sharpness_scope == "micro_batch" and step.perturbs(number)
        # One batch for each pass: a `compute_loss` may pop labels from it, or mask its tokens in place.
        has_two = step.config.ascent_gradient == "current" and step.perturbs(number)
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        kept = copy_of((inputs, num_items_in_batch)) if has_two else None
        own_step = getattr(training_step, "__func__", None) is not Trainer.training_step
        backward = Backward(self.accelerator, step.second_pass.see, step.trained.parameters if own_step else ())

        def pass_1() -> Tensor:
            seen: Any = backward.in_pass_1() if has_two else nullcontext()
            with self.accelerator.no_sync(model) if own else nullcontext(), modes_kept(model, step.structure), seen:
                loss = training_step(model, inputs, num_items_in_batch)
            step.second_pass.alters |= backward.gradients_changed()
            return loss

        def pass_2() -> Tensor:
            batch, num_items = copy_of(kept)
            # Without synchronisation, FSDP2 would leave no sharded gradients.
            sync = nullcontext() if self.accelerator.is_fsdp2 else self.accelerator.no_sync(model)
            direct: Any = bypass_engine(model, self.accelerator) if is_deepspeed else nullcontext(model)
            modes = modes_kept(model, step.structure)
            with sync, modes, buffers_not_sent(model), direct as called, backward.in_pass_2():
                return training_step(called, batch, num_items)

        held_back: AbstractContextManager[None] = nullcontext()
        if is_deepspeed:
            step.second_pass.bits = reduction_bits(model)
            held_back = delayed_update(model, step.gradients_read_at(number), lambda: step.mixed)
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            # A schedule-free optimizer moves the weights here: now, and not in a pass, when they are perturbed.
            self.optimizer.train()
        self._lsam_flops += float(self.floating_point_ops(inputs))
        with held_back:
            loss = step(pass_1, pass_2, number, self.accelerator.sync_gradients)
        # The Trainer counts pass 1. Of pass 2, the last run counts, and those for a comparison do not.
        if own or self.accelerator.sync_gradients:
            self.current_flos += step.overhead * self._lsam_flops
            self._lsam_flops = 0.0
        return loss

    def floating_point_ops(self, inputs: dict[str, Tensor | Any]) -> int:
        """The operations of a plain pass; cached for the last batch, since the count visits all modules."""
        if self._lsam_counted[0] is not inputs:
            step = self._lsam
            with nullcontext() if step is None else weights_counted_once(self.model, step.structure.counts):
                self._lsam_counted = (inputs, super().floating_point_ops(inputs))
        return self._lsam_counted[1]

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the model; not in pass 2, when its weights are perturbed."""
        if not self.in_second_pass:
            super().save_model(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the `lsam/` figures to a line of the training loss, and a row to `lsam_blocks.jsonl`; not in pass 2."""
        step = self._lsam
        if step is not None and step.second_pass.running:
            return
        # A line of the Trainer has the learning rate; a `compute_loss` may log a loss of its own.
        is_line = "loss" in logs and "learning_rate" in logs
        if is_line and step is not None and self._lsam_run is self.state:
            logs.update(step.log.line())
            if self.is_world_process_zero():
                append_row(self._get_output_dir(self._trial), step.log.row(self.state.global_step, self.state.epoch))
            self._lsam_watch.see(logs["loss"], step.log.perturbed, self.state.global_step, self.state.max_steps)
            step.reset_log()
        elif is_line and self.lsam_config.enabled and not self._lsam_reached:
            logger.warning_once(
                f"{type(self).__name__} has a training_step that does not call super().training_step, so training is "
                "plain. Let it call super().training_step for the forward and backward pass."
            )
        super().log(logs, *args, **kwargs)

    def _new_step(self, model: nn.Module, max_steps: int, has_begun: bool = True) -> LSAMStep:
        """An `LSAMStep` for `model`, which may be wrapped, compiled, or both."""
        if is_known := self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            check_hooks(self.model)
        return LSAMStep(
            self.accelerator.unwrap_model(model, keep_torch_compile=False),
            self.lsam_config,
            max_steps,
            self.accelerator.scaler,
            called=model,
            optimized=self._lsam_optimized if is_known else lambda: None,  # DeepSpeed's has parameters of its own
            roots=lambda: self._lsam_roots(model),
            raises=lambda error: self.args.auto_find_batch_size and should_reduce_batch_size(error),
            has_begun=has_begun,
        )

    def _lsam_roots(self, model: nn.Module) -> dict[str, Any]:
        """What a pass may read and change besides the model, by name."""
        return {
            "trainer": self,
            "trainer.state": self.state,
            "trainer.control": vars(self.control),
            "trainer.args": vars(self.args),
            "trainer.lsam_config": vars(self.lsam_config),
            "trainer.callback_handler": self.callback_handler,
            "gradient_state": Attributes(self.accelerator.gradient_state, ("sync_gradients",)),
            "step": Attributes(self.accelerator, ("step",)),
            **{f"param_groups[{i}]": group for i, group in enumerate(getattr(self.optimizer, "param_groups", ()))},
            "": Attributes(model, ("require_forward_param_sync",)),  # whether DDP sends buffers before the next pass
        }

    def _lsam_of_run(self, model: nn.Module) -> LSAMStep | None:
        """The `LSAMStep` of this run, with new settings from the next step on if they fit; `None` if none ever did."""
        former = self._lsam if self._lsam_run is self.state else None
        is_same = former is not None and former.config is self.lsam_config and former.fits(former.config)
        if former is not None and (former.window or is_same):
            return former
        try:
            check_supported(self, self.lsam_config)
            if former is not None and former.fits(self.lsam_config):
                former.config = self.lsam_config
                return former
            step = self._new_step(model, max(self.state.max_steps, 1))
        except (ValueError, NotImplementedError) as error:
            if not self._lsam_reached:
                raise
            logger.warning_once(f"The new settings cannot be used, so the former ones stay: {error}")
            self.lsam_config = LSAMConfig(block_selection="none") if former is None else former.config
            return former
        self._lsam, self._lsam_run = step, self.state
        if former is None:
            self._begin_run(step)
        else:
            step.log.load(former.log.state())
        return step

    def _begin_run(self, step: LSAMStep) -> None:
        """Load the state of the checkpoint that the run resumes from, and prepare what is logged."""
        self._lsam_flops = 0.0
        if self._lsam_checkpoint is not None:
            load_state(step, self._lsam_checkpoint)
        if not self.is_in_train:
            return
        logged = [line for line in self.state.log_history if "loss" in line]
        self._lsam_watch = StuckWatch(logged[0]["loss"] if logged else None)
        if self.is_world_process_zero():
            announce(self.lsam_config, step.candidates, step.costs, step.max_steps)
            # Those after the last log line, since a checkpoint may have been saved between a step and its log line.
            drop_rows_after(self._get_output_dir(self._trial), logged[-1]["step"] if logged else 0)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.lsam_config.enabled and (step := self._lsam_of_run(self.model_wrapped)) is not None:
            save_state(step, output_dir, self.state.global_step, self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._lsam_checkpoint = checkpoint


class LSAMTrainer(LSAMMixin, Trainer):
    """The [`~transformers.Trainer`] with layer-wise SAM; see [`LSAMMixin`] for its arguments and log lines.

    Example:

    ```python
    >>> trainer = LSAMTrainer(model, args, train_dataset=data, lsam_config=LSAMConfig(block_selection="last"))
    ```
    """
