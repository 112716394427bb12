"""`LSAMTrainer`: the Trainer whose training step perturbs a few blocks."""

from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType, recursively_apply
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer
from transformers.trainer_utils import HPSearchBackend
from transformers.utils import logging

from .composition import check_order, check_repeatable
from .config import LSAMConfig
from .counters import Counters
from .deepspeed import update_held_back
from .distributed import check_supported
from .passes import backward_if_any
from .state import load_state, save_state
from .step import LSAMStep
from .step_log import StuckWatch, append_row, drop_rows_after

if TYPE_CHECKING:
    from transformers import Trainer as _AnyTrainer
else:
    _AnyTrainer = object


logger = logging.get_logger(__name__)


class LSAMMixin(_AnyTrainer):
    """
    Layer-wise SAM for any subclass of [`~transformers.Trainer`]: `class LSAMSFTTrainer(LSAMMixin, SFTTrainer)`.

    Both passes run through the `training_step` of the class that follows, so autocast, loss normalisation and the
    gradient scaler are its own. The loss that is logged is that of pass 1 (with `ascent_gradient="previous"` it is the
    loss at the perturbed weights, the only one there is).

    Each ordinary log line also holds, as means over the perturbed steps since the last line:

    - `lsam/grad_norm`: norm of the plain gradient, over all candidate blocks;
    - `lsam/captured`: share of its square that the selected blocks hold;
    - `lsam/perturbation_norm`: how far the weights were moved;
    - `lsam/first_block`: index of the first block that was perturbed, which is where pass 2 starts;
    - `lsam/overhead`: predicted cost of pass 2 in plain steps, over all steps, perturbed or not;
    - `lsam/active`: share of the steps that were perturbed;
    - `lsam/skipped`: number of perturbations left out, for a gradient that is zero or not finite, or a
      `max_overhead` that no block with a gradient fits.

    `lsam_blocks.jsonl` in the output directory gets one row a log line: `counts`, how often each block was selected,
    and `norms`, its mean gradient norm.

    The `hp_space` of `hyperparameter_search` may return fields of [`LSAMConfig`] beside training arguments: each trial
    sets them on a copy of `lsam_config`, which is itself again after the trial.

    Args:
        lsam_config ([`LSAMConfig`], *optional*):
            The settings; the defaults of [`LSAMConfig`] where not given. Every other argument is the Trainer's.

    Raises:
        TypeError: if `lsam_config` is not a [`LSAMConfig`].
        ValueError: before training, if the settings do not fit the model.
        NotImplementedError: before training, for what is not supported; the message names the way out.
    """

    # The Trainer sets it when a search begins.
    hp_space: Any

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        check_order(cls, LSAMMixin)

    def __init__(self, *args: Any, lsam_config: LSAMConfig | None = None, **kwargs: Any):
        if lsam_config is not None and not isinstance(lsam_config, LSAMConfig):
            raise TypeError(
                f"lsam_config must be an LSAMConfig, but is a {type(lsam_config).__name__}. Make one of a dictionary "
                "by LSAMConfig(**settings)."
            )
        super().__init__(*args, **kwargs)
        self.lsam_config = lsam_config if lsam_config is not None else LSAMConfig()
        self._lsam: LSAMStep | None = None
        # The TrainerState that `_lsam` was made for: each run has its own, so a new one means to find the blocks anew.
        self._lsam_run: Any = None
        self._lsam_checkpoint: str | None = None
        self._lsam_watch = StuckWatch()
        self._lsam_flops = 0.0
        self._lsam_in_pass_2 = False
        # The last batch whose operations were counted, and how many.
        self._lsam_counted: tuple[Any, int] = (None, 0)

    def train(self, *args: Any, **kwargs: Any):
        """Check that the settings are supported and fit the model, then train."""
        self._lsam, self._lsam_run, self._lsam_checkpoint = None, None, None
        own_config = self.lsam_config
        try:
            return super().train(*args, **kwargs)
        finally:
            self.lsam_config = own_config
            self._lsam_counted = (None, 0)

    def _hp_search_setup(self, trial: Any) -> None:
        """
        Give a trial its settings, then check them: `train` calls this with or without a trial.

        The model of `model_init`, the arguments and the accelerator are those of the run only from here on.
        """
        if self.hp_search_backend is None or trial is None:
            super()._hp_search_setup(trial)
        else:
            self._set_up_trial(trial)
        if self.lsam_config.enabled:
            check_repeatable(type(self), LSAMMixin)
            check_supported(self, self.lsam_config)
            self._new_step(self.model, max_steps=1)

    def _set_up_trial(self, trial: Any) -> None:
        """Set the fields of [`LSAMConfig`] here, and let the Trainer set the others on its arguments."""
        hp_space = self.hp_space
        is_optuna = self.hp_search_backend == HPSearchBackend.OPTUNA
        values = dict(hp_space(trial) if is_optuna else trial)
        own = {name: values.pop(name) for name in list(values) if name in vars(self.lsam_config)}
        shared = [name for name in own if hasattr(self.args, name)]
        if shared:
            raise ValueError(
                f"The search sets {', '.join(shared)}, which is a field of both LSAMConfig and "
                f"{type(self.args).__name__}. Leave it out of the search and set it on either one."
            )
        self.lsam_config = replace(self.lsam_config, **own)
        # The Trainer reads Optuna's values from `hp_space`, those of the others from the trial itself.
        if is_optuna:
            self.hp_space = lambda trial: values
            try:
                super()._hp_search_setup(trial)
            finally:
                self.hp_space = hp_space
        else:
            super()._hp_search_setup(values)
            self._trial = trial

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Both passes over a micro-batch, as far as [`LSAMConfig`] asks for them; returns the loss of pass 1."""
        training_step = super().training_step
        if not self.lsam_config.enabled:
            return training_step(model, inputs, num_items_in_batch)
        step = self._lsam_of_run(model)

        # A batch of its own for each pass: a `compute_loss` may pop labels from it, or mask its tokens in place.
        def batch() -> Any:
            return recursively_apply(Tensor.clone, copy(inputs))

        def pass_1() -> Tensor:
            # Micro-batches that are perturbed by their own gradients are averaged over processes by the step.
            own = self.lsam_config.sharpness_scope == "micro_batch" and step.perturbs(self.state.global_step)
            with self.accelerator.no_sync(model) if own else nullcontext():
                return training_step(model, batch(), num_items_in_batch)

        def pass_2() -> Tensor:
            self._lsam_flops += float(self.floating_point_ops(inputs))
            counters = Counters(self), Counters(self.state)
            self._lsam_in_pass_2 = True
            try:
                # Past DistributedDataParallel, which would send buffers on the way: a pass that fails on one process
                # and is run again there would send them once more than the others.
                inner = model.module if isinstance(model, DistributedDataParallel) else model
                # FSDP2 reduces gradients as it shards them; without it there would be none at all.
                sync = nullcontext() if self.accelerator.is_fsdp2 else self.accelerator.no_sync(model)
                with sync, backward_if_any(self.accelerator):
                    return training_step(inner, batch(), num_items_in_batch)
            finally:
                for counter in counters:
                    counter.restore()
                self._lsam_in_pass_2 = False

        held_back: AbstractContextManager[None] = nullcontext()
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            held_back = update_held_back(model, step.read_after(self.state.global_step))
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            # As the Trainer does in each pass: a schedule-free optimizer moves weights here, and never perturbed ones.
            self.optimizer.train()
        with held_back:
            loss = step(pass_1, pass_2, self.state.global_step, self.accelerator.sync_gradients)
        # The Trainer counts pass 1. What pass 2 ran over is counted by the share that it computed.
        self.current_flos += step.overhead * self._lsam_flops
        self._lsam_flops = 0.0
        return loss

    def floating_point_ops(self, inputs: dict[str, Tensor | Any]) -> int:
        """Those of a plain pass. To count them takes a look at each module, so both passes' are counted at once."""
        if self._lsam_counted[0] is not inputs:
            self._lsam_counted = (inputs, super().floating_point_ops(inputs))
        return self._lsam_counted[1]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """
        Add the `lsam/` figures to the lines that report a training loss, and a row to `lsam_blocks.jsonl`.

        What a `compute_loss` logs is logged once: pass 2 is silent, and no callback sees its weights.
        """
        if self._lsam_in_pass_2:
            return
        step = self._lsam
        if "loss" in logs and step is not None and self._lsam_run is self.state:
            logs.update(step.log.line())
            if self.is_world_process_zero():
                append_row(self._get_output_dir(self._trial), step.log.row(self.state.global_step, self.state.epoch))
            self._lsam_watch.see(logs["loss"], step.log.perturbed, self.state.global_step, self.state.max_steps)
            step.reset_log()
        super().log(logs, *args, **kwargs)

    def _new_step(self, model: nn.Module, max_steps: int) -> LSAMStep:
        """The steps on `model`, which may be wrapped, compiled, or both."""
        unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        scaler = self.accelerator.scaler
        return LSAMStep(unwrapped, self.lsam_config, max_steps, scaler, called=model, beside=self._optimized())

    def _optimized(self) -> list[Tensor]:
        """What the optimizer trains: a loss may have parameters of its own (sentence-transformers)."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return [parameter for group in groups for parameter in group["params"]]

    def _lsam_of_run(self, model: nn.Module) -> LSAMStep:
        """
        The steps of this run; at first the blocks are found, and the checkpoint that it resumes is gone on from.

        They are found anew where other parameters are trained than before (gradual unfreezing).
        """
        if self._lsam is not None and self._lsam_run is self.state:
            if not self._lsam.window and not self._lsam.fits(self._optimized()):
                former, self._lsam = self._lsam, self._new_step(model, self.state.max_steps)
                self._lsam.go_on_from(former)
            return self._lsam
        self._lsam = self._new_step(model, self.state.max_steps)
        self._lsam_run = self.state
        self._lsam_flops = 0.0
        if self._lsam_checkpoint is not None:
            load_state(self._lsam, self._lsam_checkpoint)
        self._warn_if_plain(self._lsam)
        logged = [line for line in self.state.log_history if "loss" in line]
        self._lsam_watch = StuckWatch(logged[0]["loss"] if logged else None)
        if self.is_world_process_zero():
            # Not those up to `global_step`: a checkpoint may have been saved between a step and its log line.
            drop_rows_after(self._get_output_dir(self._trial), logged[-1]["step"] if logged else 0)
        return self._lsam

    def _warn_if_plain(self, step: LSAMStep) -> None:
        """Warn if no step of the run will be perturbed. (One pass has nothing to climb in the first one.)"""
        config = self.lsam_config
        first = int(config.ascent_gradient == "previous")
        if not any(step.perturbs(number) for number in range(first, step.max_steps)):
            logger.warning(
                f"No step of the {step.max_steps} of this run is perturbed with perturb_start={config.perturb_start}, "
                f"perturb_end={config.perturb_end}, perturb_interval={config.perturb_interval} and ascent_gradient="
                f"{config.ascent_gradient!r}, so it is plain training. Set them otherwise, or train longer."
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.lsam_config.enabled:
            step = self._lsam_of_run(self.model_wrapped)
            save_state(step, output_dir, self.state.global_step, self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._lsam_checkpoint = checkpoint


class LSAMTrainer(LSAMMixin, Trainer):
    """
    The [`~transformers.Trainer`] with layer-wise SAM: see [`LSAMMixin`] for what it adds.

    Example:

    ```python
    >>> config = LSAMConfig(block_selection="last", perturb_start=0.3)
    >>> trainer = LSAMTrainer(model, args, train_dataset=train_dataset, lsam_config=config)
    >>> trainer.train()
    ```
    """
