"""What surrounds a second pass: only some weights take a gradient, and nothing is counted twice."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def norm_layers(model: nn.Module) -> list[_NormBase]:
    """The layers of `model` that may keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _NormBase)]


@contextmanager
def only_gradients_of(parameters: Iterable[Tensor], weights: Iterable[Tensor]) -> Iterator[None]:
    """
    Inside, backward gives gradients to `weights` only, starting from none; afterwards every `.grad` is what it was.

    Gradients are switched off on all other `parameters`. `backward(inputs=...)` would give none, and no error, under
    reentrant activation checkpointing, and wrong ones under FSDP2. A forward pass may switch them on again, as PEFT
    does where it disables an adapter for a while, so what others get is dropped.
    """
    wanted = set(weights)
    trained = [p for p in parameters if p.requires_grad or p in wanted]
    others = [parameter for parameter in trained if parameter not in wanted]
    gradients = [parameter.grad for parameter in trained]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.grad = None
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient


@contextmanager
def running_statistics_paused(norms: Iterable[_NormBase]) -> Iterator[None]:
    """Inside, batch-norm layers use their batch as in training, but do not update their running statistics."""
    layers = [layer for layer in norms if layer.track_running_stats]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


class Buffers:
    """
    Buffers that forward passes update, such as the vectors of a spectral norm: pass 2 reads what pass 1 read.

    Those that passes are seen to change, by their version counters; at first all of them count as such. What a pass
    changes behind these, through `.data`, is not seen.

    Args:
        model: The model.
        paused: Its layers whose own buffers pass 2 does not change (`running_statistics_paused`).
    """

    def __init__(self, model: nn.Module, paused: Iterable[nn.Module]):
        others = {buffer for layer in paused for buffer in layer.buffers(recurse=False)}
        self.all = [buffer for buffer in model.buffers() if buffer not in others and not buffer.is_inference()]
        self.changed: set[Tensor] | None = None

    @contextmanager
    def noted(self) -> Iterator[dict[Tensor, Tensor]]:
        """Note what pass 1, inside, changes; yields copies of what it reads."""
        copies = self.copies()
        versions = [buffer._version for buffer in self.all]
        yield copies
        pairs = zip(self.all, versions, strict=True)
        self.changed = (self.changed or set()) | {buffer for buffer, version in pairs if buffer._version != version}
        for buffer in copies.keys() - self.changed:
            del copies[buffer]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever is done to them inside, they are afterwards what they were."""
        copies = self.copies()
        try:
            yield
        finally:
            self.put(copies)

    def copies(self) -> dict[Tensor, Tensor]:
        """Copies of those that change, each by its buffer."""
        return {buffer: buffer.clone() for buffer in (self.all if self.changed is None else self.changed)}

    @torch.no_grad()
    def put(self, copies: dict[Tensor, Tensor]) -> None:
        """Write `copies` to their buffers."""
        if copies:
            torch._foreach_copy_(list(copies), list(copies.values()))


@contextmanager
def backward_if_any(accelerator: Accelerator) -> Iterator[None]:
    """
    Inside, the backward pass of a loss that depends on no weight with a gradient is left out: the gradient is zero.

    A micro-batch may do without all selected blocks, by LayerDrop, or a text among images without the vision tower.
    """
    own = vars(accelerator).get("backward")
    backward = accelerator.backward

    def run(loss: Tensor, **kwargs: Any) -> None:
        if loss.requires_grad:
            backward(loss, **kwargs)

    accelerator.backward = run
    try:
        yield
    finally:
        if own is None:
            del accelerator.backward
        else:
            accelerator.backward = own
