"""What the tests use and older libraries lack: training arguments of theirs, said as each version says them."""

import os

import transformers
from packaging import version
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

FIELDS = TrainingArguments.__dataclass_fields__.keys()
# Called gradient checkpointing before transformers 5.23.
CHECKPOINTING = min({"activation_checkpointing", "gradient_checkpointing"} & FIELDS)
IS_5 = version.parse(transformers.__version__).major >= 5
# For 12 steps of 4: before transformers 5.0 (its pull request 40691) a Trainer goes on in its first epoch only, and in
# a later one with other examples than the uninterrupted run.
RESUMABLE = 20 if IS_5 else 48
# Trackio keeps what it is told on this machine.
NO_SPACE = {"trackio_static_space_id": False} if "trackio_static_space_id" in FIELDS else {"trackio_space_id": None}
STRATEGY = "train_sampling_strategy"


def with_arguments(kind: type[TrainingArguments], options: dict) -> TrainingArguments:
    """Training arguments of the class `kind`. Before transformers 5.2 none of them sets the order of the examples."""
    # What transformers 4.57 sets for one Trainer holds for all later ones of the process.
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE", "ACCELERATE_MIXED_PRECISION"):
        os.environ.pop(name, None)
    if STRATEGY in FIELDS:
        return kind(**options)
    strategy = options.pop(STRATEGY)
    made = kind(**options, group_by_length=strategy == "group_by_length")
    setattr(made, STRATEGY, strategy)
    return made


_get_train_sampler = Trainer._get_train_sampler


def _in_order(self, train_dataset=None):
    sampler = _get_train_sampler(self, train_dataset)
    is_asked = sampler is not None and getattr(self.args, STRATEGY, "random") == "sequential"
    return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset) if is_asked else sampler


if STRATEGY not in FIELDS:
    Trainer._get_train_sampler = _in_order
