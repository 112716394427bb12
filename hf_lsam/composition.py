"""Which Trainers layer-wise SAM can be put on."""

import inspect

from transformers import Trainer

# Trainers of trl that train on what the model itself has just written, elsewhere than in `_prepare_inputs`.
_SAMPLING = {"AsyncDistillationTrainer", "AsyncGRPOTrainer", "GKDTrainer", "OnlineDPOTrainer", "PPOTrainer"}


def check_order(trainer_class: type, mixin: type) -> None:
    """Raise `TypeError` if `mixin` comes after the Trainer, whose methods would then be called instead of its own."""
    order = trainer_class.__mro__
    if Trainer in order and order.index(Trainer) < order.index(mixin):
        bases = [base.__name__ for base in trainer_class.__bases__ if base is not mixin]
        raise TypeError(
            f"{trainer_class.__name__} names {mixin.__name__} after a Trainer, whose training_step would be called "
            f"instead. Put it first: class {trainer_class.__name__}({', '.join([mixin.__name__, *bases])})."
        )


def signature_of(trainer_class: type, mixin: type) -> inspect.Signature | None:
    """The arguments of the class after `mixin`, and `lsam_config`; `None` where `trainer_class` has its own."""
    if trainer_class.__init__ is not mixin.__init__ or not issubclass(trainer_class, Trainer):  # type: ignore[misc]
        return None
    own = inspect.signature(mixin).parameters["lsam_config"]
    _, *theirs = inspect.signature(super(mixin, trainer_class).__init__).parameters.values()  # type: ignore[arg-type]
    rest = [parameter for parameter in theirs if parameter.kind is parameter.VAR_KEYWORD]
    return inspect.Signature([*theirs[: len(theirs) - len(rest)], own, *rest])


def check_repeatable(trainer_class: type, mixin: type) -> None:
    """Raise `NotImplementedError` if `training_step` makes its own batch, as GRPO's does by sampling."""
    order = trainer_class.__mro__
    sampling = next((c for c in order if c.__name__ in _SAMPLING and c.__module__.startswith("trl.")), None)
    if sampling is not None:
        raise NotImplementedError(
            f"{sampling.__name__} trains on what the model writes during training: a second pass would have another "
            "batch. Train it plainly with LSAMConfig(block_selection='none')."
        )
    # What a class that derives from `mixin` overrides is its author's own choice, made for two passes.
    owner = next(c for c in order if "_prepare_inputs" in vars(c))
    if owner is not Trainer and not issubclass(owner, mixin):
        raise NotImplementedError(
            f"{owner.__name__} overrides _prepare_inputs, so each pass may make its own batch, and both need the same "
            "one. Train it plainly with LSAMConfig(block_selection='none'). If it keeps no count and its batch stays, "
            "say so in your class: def _prepare_inputs(self, inputs): return super()._prepare_inputs(inputs)."
        )
