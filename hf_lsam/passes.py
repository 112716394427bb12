"""What is in place for the length of a pass: methods that others stand in for, and which weights take a gradient."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from .held import Attributes


class Standin:
    """What an object has for a method, inside of a `with` block: `run` gets its calls. Copies do not have it."""

    def __init__(self, owner: Any, name: str, run: Callable[[Callable, tuple, dict], Any]):
        self.owner, self.name, self.copies = owner, name, []  # type: ignore[var-annotated]
        # It may have one of its own already (accelerate's device hooks): that comes back as it was.
        self.own = vars(owner).get(name)
        self.method = getattr(owner, name)
        self.run: Callable | None = run

    def __call__(self, *args, **kwargs):
        return self.method(*args, **kwargs) if self.run is None else self.run(self.method, args, kwargs)

    def __deepcopy__(self, memo: dict):
        self.copies.append(memo.get(id(self.owner)))
        return deepcopy(self.method, memo)

    def __reduce__(self):
        # In a pickle, whose objects are without attributes when this is called: that of the class.
        return getattr, (self.owner, self.name)

    def __enter__(self) -> None:
        vars(self.owner)[self.name] = self

    def __exit__(self, *error: object) -> None:
        self.run = None
        if self.own is not None:
            vars(self.owner)[self.name] = self.own
            return
        for owner in (self.owner, *self.copies):
            if owner is not None:
                vars(owner).pop(self.name, None)


@contextmanager
def only_gradients_of(
    parameters: Sequence[Tensor], weights: Iterable[Tensor], foreign: Iterable[Tensor] = ()
) -> Iterator[None]:
    """
    Inside, backward gives gradients to `weights` only, starting from none; afterwards every `.grad` is what it was.

    All other `parameters` are switched off: `backward(inputs=...)` would give none under reentrant checkpointing, and
    wrong ones under FSDP2. Those that are only `foreign` stay on.
    """
    # Thousands of weights: so by place in memory, since Tensor.__hash__ is slow, and by attribute.
    wanted = set(map(id, weights))
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in (*parameters, *foreign)]
    try:
        for parameter in parameters:
            if parameter.requires_grad and id(parameter) not in wanted:
                parameter.requires_grad = False
        for parameter, _, gradient in before:
            if gradient is not None:
                parameter.grad = None
        yield
    finally:
        # A forward pass may switch others on, as PEFT does where it changes adapters: what they get is dropped.
        for parameter, takes, gradient in before:
            if parameter.requires_grad != takes:
                parameter.requires_grad = takes
            if parameter.grad is not gradient:
                parameter.grad = gradient


def modes_kept(model: nn.Module, modules: Sequence[nn.Module]) -> Standin:
    """Inside, the first `model.train()` leaves out `modules` that all train: to visit them takes as long as blocks."""

    def run(train: Callable, args: tuple, kwargs: dict) -> nn.Module:
        # The first thing that `training_step` does; what follows, such as a pickle of the model, is not to see this.
        standin.__exit__()
        all_train = {module.training for module in modules} == {True}
        return model if all_train and not (args or kwargs) else train(*args, **kwargs)

    standin = Standin(model, "train", run)
    return standin


def backward_if_any(accelerator: Accelerator) -> Standin:
    """Inside, a loss that depends on no selected block (LayerDrop, a text without images) gets no backward pass."""

    def run(backward: Callable, args: tuple, kwargs: dict) -> None:
        loss = args[0] if args else kwargs["loss"]
        if loss.requires_grad:
            backward(*args, **kwargs)

    return Standin(accelerator, "backward", run)


@contextmanager
def buffers_not_sent(model: nn.Module) -> Iterator[None]:
    """Inside, DistributedDataParallel sends no buffers: one process may run a failed pass again, and others not."""
    flag = Attributes(model, ("require_forward_param_sync",))
    own = flag.read()
    try:
        flag.put(dict.fromkeys(own, False))
        yield
    finally:
        flag.put(own)


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
