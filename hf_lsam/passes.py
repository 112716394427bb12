"""What surrounds a second pass: only some weights take a gradient, and nothing is counted twice."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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


class Counters:
    """
    The numbers that an object counts on itself, to be put back after a pass that must not count.

    Trainers keep token counters and lists of metrics as attributes and add to them in `compute_loss`. Numbers, tensors
    without a gradient, lists (by their length) and dictionaries of those are put back; whatever else the object holds
    is left alone.
    """

    def __init__(self, owner: object):
        self.owner = owner
        self.values = {name: _snapshot(value) for name, value in vars(owner).items() if _is_counted(value)}

    def restore(self) -> None:
        """Put the numbers back."""
        for name, snapshot in self.values.items():
            vars(self.owner)[name] = _restored(snapshot)


def _is_counted(value: object) -> bool:
    return isinstance(value, (int, float, list, dict)) or (isinstance(value, Tensor) and not value.requires_grad)


def _snapshot(value):
    if isinstance(value, dict):
        return value, {key: _snapshot(entry) for key, entry in value.items() if _is_counted(entry)}
    if isinstance(value, Tensor):
        return value, value.clone()
    return value, len(value) if isinstance(value, list) else None


def _restored(snapshot):
    """The object of the snapshot, holding what it held."""
    value, content = snapshot
    if isinstance(value, list):
        del value[content:]
    elif isinstance(value, dict):
        for key, entry in content.items():
            value[key] = _restored(entry)
    elif isinstance(value, Tensor):
        value.copy_(content)
    return value
