"""Trials of a hyperparameter search that set fields of [`LSAMConfig`] as well as training arguments."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers.trainer_utils import HPSearchBackend


def set_up_trial(trainer: Any, trial: Any, set_up: Callable[[Any], None]) -> None:
    """Set the trial's fields of [`LSAMConfig`] on `trainer`, and the others by the Trainer's own `set_up`."""
    hp_space, is_optuna = trainer.hp_space, trainer.hp_search_backend == HPSearchBackend.OPTUNA
    values = dict(hp_space(trial) if is_optuna else trial)
    own = {name: values.pop(name) for name in list(values) if name in vars(trainer.lsam_config)}
    shared = [name for name in own if hasattr(trainer.args, name)]
    if shared:
        raise ValueError(
            f"The search sets {', '.join(shared)}, which is a field of both LSAMConfig and "
            f"{type(trainer.args).__name__}. Remove it from the search, and set it on one of the two."
        )
    trainer.lsam_config = replace(trainer.lsam_config, **own)
    # The Trainer reads Optuna's values from `hp_space`, and those of other backends from the trial.
    trainer.hp_space = lambda trial: values
    try:
        set_up(trial if is_optuna else values)
    finally:
        trainer.hp_space, trainer._trial = hp_space, trial
