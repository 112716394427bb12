"""Situations that users bring about: a tiny net, a Trainer that does more than train, and what is seen of its runs."""

import logging
import re
import warnings
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from tiny import VOCABULARY, Examples, arguments, block_rows
from torch import nn
from torch.utils.data import default_collate
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging as hf_logging

from hf_lsam import LSAMConfig, LSAMMixin

LAST = dict(block_selection="last", num_perturbed_blocks=2, rho=0.5)
TOP = dict(block_selection="top_k", num_perturbed_blocks=2, rho=0.5, alpha=0.5)
ALL = dict(block_selection="all", rho=0.5)
BUDGET = dict(block_selection="budget", num_perturbed_blocks=None, max_overhead=0.6, rho=0.5)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Embedding, blocks, mean over the positions, head; in float64."""

    block = Block

    def __init__(self, blocks: int = 4, width: int = 8):
        super().__init__()
        set_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList([self.block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, 3)
        self.double()

    def run(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.run(self.embedding(input_ids)).mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Situation:
    """
    What a user's Trainer does; written once, for the Trainer and for the literal step.

    Attributes:
        keeps: Names of the attributes in which it keeps something from pass to pass.
        scaled: Whether its loss is that of the micro-batch's share of a step already, and no mean.
        in_order: Whether blocks are called in the order in which they are registered.
        optimizer_of: Makes the optimizer of a model, where that is not the Trainer's.
    """

    keeps: tuple[str, ...] = ()
    scaled, in_order = False, True
    optimizer_of = None
    data, train_data = Examples(48), None
    collate = staticmethod(default_collate)
    new = Net

    def begin(self, model):
        """Set the attributes, once."""

    def attach(self, model):
        """Set hooks on the model; done to that of the literal step, too."""

    def loss(self, model, batch, items):
        """The loss of a micro-batch."""
        return model(**batch).loss

    def step(self, model, batch, once):
        """The training step; `once(batch)` runs a loss forward and backward."""
        return once(batch)


def trainer_class(situation: type[Situation], ours: bool) -> type[Trainer]:
    """The user's Trainer, or with `LSAMMixin` before it."""

    class Users(situation, Trainer):
        model_accepts_loss_kwargs = property(lambda self: self.scaled, lambda self, value: None)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = self.loss(model, inputs, num_items_in_batch)
            return (loss, None) if return_outputs else loss

        def training_step(self, model, inputs, num_items_in_batch=None):
            once = super().training_step
            return self.step(model, inputs, lambda batch: once(model, batch, num_items_in_batch))

    return type("LSAMUsers", (LSAMMixin, Users), {}) if ours else Users


class Log(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@contextmanager
def hearing():
    """The warnings that the library gives inside, those that are given once included."""
    hf_logging.warning_once.cache_clear()
    log, logger = Log(), logging.getLogger("hf_lsam")
    logger.addHandler(log)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield log.messages
        log.messages += [str(warning.message) for warning in caught if "hf_lsam" in warning.filename]
    finally:
        logger.removeHandler(log)


def told(messages: list[str], pattern: str) -> list[str]:
    """Those of the messages in which the expression is found."""
    return [message for message in messages if re.search(pattern, message, re.IGNORECASE)]


class Recorder(TrainerCallback):
    """What each step began with, and the gradients that the optimizer got."""

    def __init__(self):
        self.starts: list[dict] = []
        self.gradients: list[dict] = []
        self.trainer = None

    def start(self) -> dict:
        trainer, named = self.trainer, list(self.trainer.model.named_parameters())
        kept = {name: getattr(trainer, name) for name in trainer.keeps if name in vars(trainer)}
        kept["accelerator"] = SimpleNamespace(step=trainer.accelerator.step, sync_gradients=True)
        steps = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
        return {
            "model": tensors(trainer.model),
            "kept": deepcopy(kept),
            "frozen": [name for name, weight in named if not weight.requires_grad],
            "optimized": [name for name, weight in named if id(weight) in steps],
            "config": deepcopy(getattr(trainer, "lsam_config", LSAMConfig(block_selection="none"))),
        }

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == len(self.starts):
            self.starts.append(self.start())

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@dataclass
class Run:
    """A run that has ended: its trainer, and what was seen of it."""

    situation: type[Situation]
    trainer: Trainer
    starts: list[dict]
    gradients: list[dict]
    messages: list[str] = field(default_factory=list)
    # By the step, what was written on the blocks.
    rows: dict[int, dict] = field(default_factory=dict)

    @property
    def lines(self) -> list[dict]:
        return [line for line in self.trainer.state.log_history if "loss" in line]


def make(
    situation: type[Situation], folder, config: dict | None = None, model=None, callbacks=(), **options
) -> Trainer:
    """A trainer of the situation: the plain one, or with `config` layer-wise SAM."""
    own = {} if config is None else {"lsam_config": LSAMConfig(**config)}
    model = situation.new() if model is None else model
    if situation.optimizer_of is not None:
        optimizer = situation.optimizer_of(model)
        own["optimizers"] = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    sgd = dict(optim="sgd", learning_rate=0.1, max_grad_norm=0.0, logging_steps=1, remove_unused_columns=False)
    data = dict(train_dataset=situation.train_data or situation.data, data_collator=situation.collate)
    options = arguments(folder, **{**sgd, **options})
    trainer = trainer_class(situation, config is not None)(model, options, callbacks=list(callbacks), **data, **own)
    trainer.remove_callback(PrinterCallback)
    trainer.begin(trainer.model)
    trainer.attach(trainer.model)
    return trainer


def follow(situation: type[Situation], folder, config: dict | None = None, accumulation: int = 1, **options) -> Run:
    """Train, and note what each step began with."""
    recorder = Recorder()
    callbacks = [*options.pop("callbacks", ()), recorder]
    with hearing() as messages:
        options["gradient_accumulation_steps"] = accumulation
        trainer = recorder.trainer = make(situation, folder, config, callbacks=callbacks, **options)
        trainer.train()
    written = block_rows(folder) if (folder / "lsam_blocks.jsonl").exists() else []
    rows = {row["step"] - 1: row for row in written}
    return Run(situation, trainer, [*recorder.starts, recorder.start()], recorder.gradients, messages, rows)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all weights and buffers, by name."""
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def put(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Write weights; set buffers anew, whatever their shapes, and those that are not there to `None`."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            for own, buffer in module.named_buffers(recurse=False):
                buffer.copy_(values[f"{name}.{own}"])
            continue
        for own in module._buffers:
            value = values.get(f"{name}.{own}".removeprefix("."))
            module._buffers[own] = None if value is None else value.clone()
    for name, weight in model.named_parameters():
        weight.data.copy_(values[name])
