"""What surrounds a second pass: only some weights take a gradient."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from .replay import Standin


@contextmanager
def only_gradients_of(
    parameters: Iterable[Tensor], weights: Iterable[Tensor], foreign: Iterable[Tensor] = ()
) -> Iterator[None]:
    """
    Inside, backward gives gradients to `weights` only, starting from none; afterwards every `.grad` is what it was.

    All other `parameters` are switched off: `backward(inputs=...)` would give none, and no error, under reentrant
    activation checkpointing, and wrong ones under FSDP2. Of the `foreign` ones only `.grad` is touched.
    """
    # Thousands of weights: so by place in memory, since Tensor.__hash__ is slow, and by attribute.
    wanted = set(map(id, weights))
    flags = [(parameter, parameter.requires_grad) for parameter in parameters]
    # A forward pass may switch others on again, as PEFT does where it changes adapters: what they get is dropped.
    gradients = [
        (p, p.grad) for p in (*parameters, *foreign) if p.requires_grad or p.grad is not None or id(p) in wanted
    ]
    try:
        for parameter, takes in flags:
            if takes and id(parameter) not in wanted:
                parameter.requires_grad = False
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, takes in flags:
            if parameter.requires_grad != takes:
                parameter.requires_grad = takes
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def modes_kept(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, `model.train()` goes through no `modules` where all of them train: it takes as long as some blocks."""

    def run(train: Callable, args: tuple, kwargs: dict) -> nn.Module:
        all_train = {module.training for module in modules} == {True}
        return model if all_train and not (args or kwargs) else train(*args, **kwargs)

    with Standin(model, "train", run):
        yield


@contextmanager
def backward_if_any(accelerator: Accelerator) -> Iterator[None]:
    """Inside, a loss that depends on no selected block (LayerDrop, a text without images) gets no backward pass."""
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


@contextmanager
def buffers_not_sent(model: nn.Module) -> Iterator[None]:
    """Inside, DistributedDataParallel sends no buffers: one process may run a failed pass again, and others not."""
    sends = getattr(model, "require_forward_param_sync", False)
    try:
        if sends:
            model.require_forward_param_sync = False  # type: ignore[assignment]
        yield
    finally:
        if sends:
            model.require_forward_param_sync = sends  # type: ignore[assignment]


def copy_of(batch: Any) -> Any:
    """A copy of a batch, down to its tensors; what cannot be copied is shared."""
    if isinstance(batch, Tensor):
        return batch.clone()
    if type(batch) is dict:
        return {key: copy_of(part) for key, part in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(map(copy_of, batch))
    if isinstance(batch, (int, float, str, type(None))):
        return batch
    try:
        return deepcopy(batch)
    except (TypeError, RuntimeError, NotImplementedError):
        return copy(batch)
