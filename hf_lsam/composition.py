"""Which Trainer classes the mixin can be combined with."""

import inspect

from transformers import Trainer

# Trainers of trl that sample their training texts from the model, and do not do so in `_prepare_inputs`.
_SAMPLING = {"AsyncDistillationTrainer", "AsyncGRPOTrainer", "GKDTrainer", "OnlineDPOTrainer", "PPOTrainer"}


def check_order(trainer_class: type, mixin: type) -> None:
    """Raise `TypeError` if `mixin` comes after a Trainer, whose methods would take precedence."""
    order = trainer_class.__mro__
    if Trainer in order and order.index(Trainer) < order.index(mixin):
        bases = [base.__name__ for base in trainer_class.__bases__ if base is not mixin]
        raise TypeError(
            f"{trainer_class.__name__} names {mixin.__name__} after a Trainer, whose training_step takes precedence. "
            f"Put it first: class {trainer_class.__name__}({', '.join([mixin.__name__, *bases])})."
        )


def signature_of(trainer_class: type, mixin: type) -> inspect.Signature | None:
    """The signature of the class after `mixin`, plus `lsam_config`; `None` if `trainer_class` defines its own."""
    if trainer_class.__init__ is not mixin.__init__ or not issubclass(trainer_class, Trainer):  # type: ignore[misc]
        return None
    own = inspect.signature(mixin).parameters["lsam_config"]
    _, *theirs = inspect.signature(super(mixin, trainer_class).__init__).parameters.values()  # type: ignore[arg-type]
    rest = [parameter for parameter in theirs if parameter.kind is parameter.VAR_KEYWORD]
    return inspect.Signature([*theirs[: len(theirs) - len(rest)], own, *rest])


def check_repeatable(trainer_class: type, mixin: type) -> None:
    """Raise `NotImplementedError` if each pass may make a batch of its own, as GRPO does by sampling."""
    order = trainer_class.__mro__
    sampling = next((c for c in order if c.__name__ in _SAMPLING and c.__module__.startswith("trl.")), None)
    if sampling is not None:
        raise NotImplementedError(
            f"{sampling.__name__} trains on text that the model generates in each pass, so the second pass would see "
            "another batch. Train without perturbation: LSAMConfig(block_selection='none')."
        )
    # A class that derives from `mixin` overrides the method knowing that there are two passes.
    owner = next(c for c in order if "_prepare_inputs" in vars(c))
    if owner is not Trainer and not issubclass(owner, mixin):
        raise NotImplementedError(
            f"{owner.__name__} overrides _prepare_inputs, so each pass may make a batch of its own, and both need the "
            "same one. Train without perturbation: LSAMConfig(block_selection='none'). If the method returns the same "
            "batch both times and counts nothing, confirm that in your class: "
            "def _prepare_inputs(self, inputs): return super()._prepare_inputs(inputs)."
        )
