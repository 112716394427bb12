"""Context managers for the length of a pass: replaced methods, and the weights that require a gradient."""

import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from copy import copy, deepcopy
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from .given import is_users_callable
from .kinds import HOOKS, Attributes
from .stamps import version_of
from .structure import Structure

_is_training, _requires_grad, _grad = map(operator.attrgetter, ("training", "requires_grad", "grad"))


class Standin:
    """Replaces a method of an object inside a `with` block: calls go to `run`. Copies get the original method."""

    def __init__(self, owner: Any, name: str, run: Callable[[Callable, tuple, dict], Any]):
        self.owner, self.name, self.copies = owner, name, []  # type: ignore[var-annotated]
        # A method that was already replaced on the instance (accelerate's device hooks) is restored as such.
        self.own = vars(owner).get(name)
        self.__wrapped__ = getattr(owner, name)  # by this name, `inspect.signature` finds it, as `generate` does
        self.run: Callable | None = run

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)

    def __call__(self, *args, **kwargs):
        return self.__wrapped__(*args, **kwargs) if self.run is None else self.run(self.__wrapped__, args, kwargs)

    def __deepcopy__(self, memo: dict):
        self.copies.append(memo.get(id(self.owner)))
        return deepcopy(self.__wrapped__, memo)

    def __reduce__(self):
        # An object that is unpickled has no attributes yet, so this is the method of its class.
        return getattr, (self.owner, self.name)

    def __enter__(self) -> None:
        vars(self.owner)[self.name] = self

    def __exit__(self, *error: object) -> None:
        self.run = None
        if self.own is None:
            for copied in self.copies:
                if copied is not None:
                    vars(copied).pop(self.name, None)
        own = vars(self.owner)
        if own.get(self.name) is not self:
            return  # the pass has replaced it
        if self.own is None:
            del own[self.name]
        else:
            own[self.name] = self.own


@contextmanager
def only_gradients_of(
    parameters: Sequence[Tensor], weights: Iterable[Tensor], foreign: Iterable[Tensor] = ()
) -> Iterator[None]:
    """Inside, only `weights` require gradients, and each `.grad` begins as `None`; afterwards each one is as before.

    All other `parameters` get `requires_grad=False`, since `backward(inputs=...)` gives no gradients under reentrant
    checkpointing, and wrong ones under FSDP2. Parameters that are only in `foreign` still require theirs.
    """
    wanted = set(map(id, weights))  # by id, since there may be thousands, and Tensor.__hash__ is slow
    every = [*parameters, *foreign]
    takes, gradients = [*map(_requires_grad, every)], [*map(_grad, every)]
    try:
        for parameter, requires_grad in zip(parameters, takes, strict=False):
            if requires_grad and id(parameter) not in wanted:
                parameter.requires_grad = False
        _set_gradients(every, itertools.repeat(None))
        yield
    finally:
        # A forward pass may set requires_grad, as PEFT does when it switches adapters: those gradients are dropped.
        for parameter, requires_grad in zip(every, takes, strict=True):
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad = requires_grad
        _set_gradients(every, gradients)


def _set_gradients(parameters: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> None:
    """Set `.grad` of all of them, in one call that Ctrl-C cannot interrupt."""
    deque(map(Tensor.grad.__set__, parameters, gradients), maxlen=0)  # type: ignore[union-attr]


def modes_kept(model: nn.Module, structure: Structure) -> Standin:
    """Inside, the first `model.train()` is skipped if all modules train already: it takes as long as a block."""

    def run(train: Callable, args: tuple, kwargs: dict) -> nn.Module:
        # `training_step` calls this first. What follows, such as pickling the model, must not see the replacement.
        standin.__exit__()
        is_plain = structure.trains_plainly and not (is_users_callable(train) or args or kwargs)
        return model if is_plain and all(map(_is_training, structure.modules)) else train(*args, **kwargs)

    standin = Standin(model, "train", run)
    return standin


def weights_counted_once(model: nn.Module, counts: dict[tuple, int]) -> AbstractContextManager:
    """Inside, `model.num_parameters` looks up in `counts`, since the count walks through all modules."""
    method = getattr(model, "num_parameters", None)
    if method is None or is_users_callable(method):
        return nullcontext()

    def run(count: Callable, args: tuple, kwargs: dict) -> int:
        key = (args, *sorted(kwargs.items()))
        if key not in counts:
            counts[key] = count(*args, **kwargs)
        return counts[key]

    return Standin(model, "num_parameters", run)


class Backward:
    """Stands in for `accelerator.backward` in the passes of a micro-batch.

    `show` is called with each loss of pass 1 before its backward pass. In pass 2, a loss that does not depend on a
    selected block (LayerDrop, a text without images) has no backward pass. `parameters` are those whose gradients a
    `training_step` may change.
    """

    def __init__(self, accelerator: Accelerator, show: Callable[[Tensor], None], parameters: Sequence[Tensor] = ()):
        self.accelerator, self.show, self.parameters = accelerator, show, parameters
        self._left: list[tuple] | None = None  # `_stamps` after the last one of pass 1 that has returned

    def in_pass_1(self) -> Standin:
        """Inside, pass 1 runs."""

        def run(backward: Callable, args: tuple, kwargs: dict) -> None:
            self.show(args[0] if args else kwargs["loss"])
            backward(*args, **kwargs)
            self._left = self._stamps()

        return Standin(self.accelerator, "backward", run)

    def gradients_changed(self) -> bool:
        """Whether gradients are others than the last backward pass of pass 1 has left: clipped, or projected."""
        return self._left is not None and self._left != self._stamps()

    def _stamps(self) -> list[tuple]:
        return [(id(g), version_of(g)) for g in (parameter.grad for parameter in self.parameters) if g is not None]

    @contextmanager
    def in_pass_2(self) -> Iterator[None]:
        """Inside, pass 2 runs; `RuntimeError` if it returns without a backward pass, and pass 1 had one."""
        has_run = False

        def run(backward: Callable, args: tuple, kwargs: dict) -> None:
            nonlocal has_run
            loss = args[0] if args else kwargs["loss"]
            if loss.requires_grad:
                backward(*args, **kwargs)
            has_run = True

        with Standin(self.accelerator, "backward", run):
            yield
        if self._left is not None and not has_run:
            raise RuntimeError("training_step has no backward pass, perhaps since it caught an error")


def outline_of(loss: Tensor) -> tuple[str, ...]:
    """The names of the last 32 operations that `loss` was computed by: they change with what a loss reads."""
    names: list[str] = []
    nodes, seen = deque([loss.grad_fn]), set[Any]()
    while nodes and len(names) < 32:
        node = nodes.popleft()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(node.name())
            nodes.extend(inner for inner, _ in node.next_functions)
    return tuple(names)


def remove_hooks(modules: Iterable[nn.Module], weights: Iterable[Tensor], first: int) -> None:
    """Remove the hooks with numbers from `first` on: code that an error has interrupted did not remove its own."""
    tables = [vars(module).get(table) for module in modules for table in HOOKS]
    for table in filter(None, [*tables, *(weight._backward_hooks for weight in weights)]):
        for number in [number for number in table if number >= first]:
            del table[number]


@contextmanager
def buffers_not_sent(model: nn.Module) -> Iterator[None]:
    """Inside, DistributedDataParallel broadcasts no buffers, since a process may rerun a failed pass alone."""
    flag = Attributes(model, ("require_forward_param_sync",))
    own = flag.read()
    try:
        flag.put(dict.fromkeys(own, False))
        yield
    finally:
        flag.put(own)


def copy_of(batch: Any, memo: dict[int, Any] | None = None) -> Any:
    """A copy of a batch with copies of its tensors, one of each; objects that cannot be copied are shared."""
    memo = {} if memo is None else memo
    if isinstance(batch, Tensor):
        if id(batch) not in memo:
            takes = batch.is_leaf and batch.requires_grad
            memo[id(batch)] = batch.detach().clone().requires_grad_() if takes else batch.clone()
        return memo[id(batch)]
    if type(batch) is dict:
        return {key: copy_of(part, memo) for key, part in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(copy_of(part, memo) for part in batch)
    for way in (lambda: deepcopy(batch, dict(memo)), lambda: copy(batch)):
        with suppress(Exception):  # of users' classes
            return way()
    return batch
