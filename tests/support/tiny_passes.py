"""The steps of a run, each by itself: what the equations say of it at the very weights that its passes were at."""

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from tiny import blocks_of
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_lsam import LSAMConfig, reference

Tensors = dict[str, Tensor]


@dataclass
class Step:
    """The weights that a step began with, weights and batch of each of its passes, and what the optimizer got."""

    start: Tensors
    passes: list[tuple[Tensors, dict]] = field(default_factory=list)
    gradient: Tensors = field(default_factory=dict)


class Steps(TrainerCallback):
    """Notes the steps; a trainer's `compute_loss` has to note each pass here."""

    def __init__(self, model: nn.Module):
        self.model, self.noted = model, []
        # As something that other threads use, it is not put back after pass 2.
        self.lock = threading.Lock()

    def _parameters(self) -> Tensors:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def note_pass(self, batch: dict) -> None:
        self.noted[-1].passes.append((self._parameters(), dict(batch)))

    def on_step_begin(self, *args, **kwargs):
        self.noted.append(Step(self._parameters()))

    def on_optimizer_step(self, *args, **kwargs):
        gradients = {name: p.grad for name, p in self.model.named_parameters()}
        self.noted[-1].gradient = {name: slope.clone() for name, slope in gradients.items() if slope is not None}


class Noting:
    """For classes such as `class Noted(Noting, LSAMTrainer)`: notes its steps."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = Steps(self.model)
        self.add_callback(self.steps)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.steps.note_pass(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)


def length(tensors: Tensors) -> float:
    return reference.norm(list(tensors.values()))


def distance(left: Tensors, right: Tensors) -> float:
    return length({name: left[name].double() - right[name].double() for name in right})


def mean(parts: list[Tensors]) -> Tensors:
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}


def share_of_rounding(model: nn.Module, dtype: torch.dtype) -> float:
    """
    How far a gradient in `dtype` may be from the exact one, as a share of its length.

    Each linear layer rounds what it reads and what it returns, by half an epsilon at most; were all of that to add up,
    it would be an epsilon for each layer.
    """
    return sum(isinstance(module, nn.Linear) for module in model.modules()) * torch.finfo(dtype).eps


class Literally:
    """
    Holds steps, in their order, against the equations: with gradients of `model`, under `autocast`, at the weights
    where the passes were. So no step and no pass builds on the rounding of another.

    `rounding` bounds how far two gradients at the same weights may be apart, as a share of their length.
    """

    def __init__(
        self, model: nn.Module, config: LSAMConfig, rounding: float, autocast: AbstractContextManager | None = None
    ):
        self.model, self.config, self.rounding = model.train(), config, rounding
        self.autocast = autocast or nullcontext()
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.blocks = [[names[parameter] for parameter in block] for block in blocks_of(model)]
        self.previous: Tensors = {}
        self.correction: Tensors = {}
        self.share = 0.0

    def gradient(self, at: Tensors, batch: dict) -> Tensors:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(at[name])
        with self.autocast:
            loss = self.model(**batch).loss
        return dict(zip(at, torch.autograd.grad(loss, [*self.model.parameters()]), strict=True))

    def selected(self, names: set[str], scores: Tensors) -> list[str]:
        """All weights of the blocks that moved, which are those of the largest norms, or next to it."""
        if self.config.block_selection == "all":
            return [*scores]
        sizes = [length({name: scores[name] for name in block}) for block in self.blocks]
        chosen = [bool(names & {*block}) for block in self.blocks]
        smallest = min(size for size, is_chosen in zip(sizes, chosen, strict=True) if is_chosen)
        largest = max(size for size, is_chosen in zip(sizes, chosen, strict=True) if not is_chosen)
        assert sum(chosen) == self.config.num_perturbed_blocks
        assert smallest >= (1 - 2 * self.rounding) * largest
        return [name for block, is_chosen in zip(self.blocks, chosen, strict=True) if is_chosen for name in block]

    def assert_move(self, start: Tensors, moved: Tensors, ascent: Tensors) -> list[str]:
        """Weights moved by rho along the ascent; returns the names of those that were selected."""
        names = {name for name in start if not torch.equal(start[name], moved[name])}
        scale = {name: start[name].abs() if self.config.adaptive else torch.ones(()) for name in start}
        scores = {name: scale[name] * slope for name, slope in ascent.items()}
        selected = self.selected(names, scores)
        assert names <= {*selected}
        size = self.config.rho / length({name: scores[name] for name in selected})
        eps = {name: size * scale[name] * scores[name] for name in selected}
        move = {name: moved[name].double() - start[name].double() for name in selected}
        # The direction and its length are rounded, and so are the weights where they are moved to.
        ulps = torch.finfo(start[selected[0]].dtype).eps * length({name: moved[name] for name in selected})
        assert distance(move, eps) <= 2 * self.rounding * length(eps) + ulps
        return selected

    def assert_step(self, step: Step) -> float:
        """The optimizer got the gradient of the method; returns how far from it."""
        config, plain, moved = self.config, {}, {}
        for at, batch in step.passes:
            micro_batch = batch["input_ids"].numpy().tobytes()
            if any(not torch.equal(at[name], step.start[name]) for name in at):
                moved[micro_batch] = (at, batch)
            elif micro_batch not in plain:
                plain[micro_batch] = self.gradient(step.start, batch)
        own = mean([*plain.values()]) if plain else self.previous
        parts, longest = [], length(own)
        for micro_batch, (at, batch) in moved.items():
            ascent = plain[micro_batch] if config.sharpness_scope == "micro_batch" else own
            selected = self.assert_move(step.start, at, ascent)
            there = self.gradient(at, batch)
            longest = max(longest, length(there))
            mixed = {n: (1 - config.alpha) * ascent[n] + config.alpha * there[n] for n in selected}
            parts.append(there if config.ascent_gradient == "previous" else ascent | mixed)
        expected = mean(parts) if parts else own
        allowed = self.rounding * longest
        if config.reuse_correction and moved:
            along = sum(float((expected[name].double() * own[name].double()).sum()) for name in own)
            self.correction = {name: expected[name] - along / length(own) ** 2 * own[name] for name in own}
            self.share = length(expected) / length(self.correction)
        elif config.reuse_correction:
            factor = config.reuse_correction * length(own) / length(self.correction)
            expected = {name: own[name] + factor * self.correction[name] for name in own}
            # To take the part along one gradient off another rounds by both, and what remains may be shorter.
            allowed *= 1 + config.reuse_correction * (1 + 3 * self.share)
        self.previous = expected
        off = distance(step.gradient, expected)
        assert off <= allowed
        return off
