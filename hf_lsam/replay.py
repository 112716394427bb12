"""Suffix replay: in pass 2, the blocks before the first perturbed one return their outputs of pass 1."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from .held import RandomState
from .passes import Standin
from .stamps import version_of


class ReplayError(RuntimeError):
    """The pass cannot be replayed from its recording; a full pass is needed."""


class DroppedError(ReplayError):
    """The model reads the output of a block that was not kept."""


class Dropped(Tensor):
    """Placeholder of a tensor that was not kept: Python code that reads its values gets a `DroppedError`, C++ NaN."""

    errors: ClassVar[list[ReplayError]] = []  # of the replay that runs, since the pass may catch them

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ not in _READ_NO_VALUES:
            reason = f"{func.__name__} reads the output of a block that was not kept"
            cls.errors.append(DroppedError(reason))
            raise DroppedError(reason)
        return super().__torch_function__(func, types, args, kwargs or {})


_READ_NO_VALUES = {
    *("__get__", "dim", "size", "numel", "stride", "get_device"),
    *("is_floating_point", "is_complex", "is_contiguous", "is_inference", "detach", "to"),
}


@dataclass
class Call:
    """A call of a block."""

    block: int  # index of the block; -1 is everything outside of the blocks
    places: int  # number of tokens (or pixels) of the batch that it is applied to
    has_gradient: bool  # true of one call, if the block runs again in the backward pass (activation checkpointing)
    dtype: torch.dtype = torch.float32  # of the output
    # For a replay: the output, if it is `kept`; otherwise a placeholder, right after which no replay may begin.
    output: Any = None
    kept: bool = False
    state: RandomState | None = None  # of the random generators after the call
    versions: Sequence[int] = ()  # version counters of the tensors in the output


@dataclass
class Recording:
    """The calls of blocks and of the model in one pass, in order."""

    calls: list[Call] = field(default_factory=list)  # in the forward pass
    # Calls of the model: names, classes and plain values of the arguments, and the number of tensors returned.
    models: list[tuple] = field(default_factory=list)
    again: list[Call] = field(default_factory=list)  # in the backward pass
    last: list[Call] = field(default_factory=list)  # in the latest pass over this micro-batch, without replayed calls
    graded: set[int] = field(default_factory=set)  # blocks whose output has a gradient
    has_dropped: bool = False  # whether there are calls whose output is not kept

    @property
    def first(self) -> list[Call]:
        """All calls of pass 1."""
        return [*self.calls, *self.again]

    @property
    def heads(self) -> int:
        """The number of calls of the model, at least 1."""
        return max(len(self.models), 1)

    def start(self, blocks: Collection[int]) -> int:
        """The index of the first call of one of `blocks`; the number of calls if there is none."""
        return next((place for place, call in enumerate(self.calls) if call.block in blocks), len(self.calls))

    def note(self, block: int, output: Any, again: bool) -> Call:
        """Add a call that returned `output`; 4-dimensional outputs have their channels in dimension 1, others last."""
        tensors = [t for t in _tensors(output) if t.dim() > 0 and t.is_floating_point()] or [torch.zeros(1)]
        shape = tensors[0].shape
        places = shape.numel() // max(shape[1 if len(shape) == 4 else -1], 1)
        has_gradient = any(tensor.requires_grad for tensor in tensors) and not (again and block in self.graded)
        if has_gradient:
            self.graded.add(block)
        call = Call(block, places, has_gradient, tensors[0].dtype)
        (self.again if again else self.calls).append(call)
        return call


class Replay:
    """Records the outputs of `blocks` in a pass, and replays them in another one.

    Only the `forward` of blocks is replaced, so masks, position embeddings and cross-attention need no special case,
    and hooks of modules still run. A replayed call sets the random state that the recorded one left, since the model
    may draw random numbers between blocks (T5).
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, model: nn.Module | None = None):
        self.blocks, self.device, self.model = list(blocks), device, model
        self.draws_on_host = False  # whether passes draw from Python's or NumPy's generator, so that states are kept

    @contextmanager
    def recording(
        self, keeps: bool = True, places: Collection[int] | None = None, first_call: Callable | None = None
    ) -> Iterator[Recording]:
        """Record the pass inside; with `keeps`, also the outputs of calls `places` (default: all), for replays."""
        recording, placeholder = Recording(), partial(_placeholder, {})

        def run_block(block: int, forward: Callable, args: tuple, kwargs: dict) -> Any:
            output = forward(*args, **kwargs)
            again, place = _is_backward(), len(recording.calls)
            call = recording.note(block, output, again)
            if keeps and not again:
                call.kept = places is None or place in places
                recording.has_dropped |= not call.kept
                call.output = _map(Tensor.detach if call.kept else placeholder, output)
                call.versions = _versions(call.output) if call.kept else ()
                call.state = RandomState.capture(self.device, self.draws_on_host)
            return output

        def run_model(forward: Callable, args: tuple, kwargs: dict) -> Any:
            place = len(recording.models)
            if place == 0 and first_call is not None:
                first_call()
            recording.models.append(())
            output = forward(*args, **kwargs)

            named = [*enumerate(args), *kwargs.items()]
            kinds = tuple((name, v if isinstance(v, (bool, str, type(None))) else type(v)) for name, v in named)
            recording.models[place] = (kinds, len(_tensors(output)))
            return output

        with self._standing_in(run_block, run_model):
            yield recording
        recording.last = recording.first

    @contextmanager
    def replaying(self, recording: Recording, perturbed: Collection[int] | None) -> Iterator[None]:
        """Inside, blocks called before the first of `perturbed` (`None`: no block) return their recorded outputs, or
        [`Dropped`] if these were not kept, since the model usually reads the last one only. `ReplayError` if blocks
        are called in another order, a recorded output was changed in place, one that was not kept is read, or the
        model returns another number of tensors.
        """
        first = recording.start(perturbed) if perturbed is not None else 0
        while first > 0 and not recording.calls[first - 1].kept:
            first -= 1
        ran, records, models = Recording(), iter(recording.calls[:first]), iter(recording.models if first > 0 else ())
        outer, errors = Dropped.errors, list[ReplayError]()

        def fail(reason: str) -> NoReturn:
            errors.append(ReplayError(reason))
            raise ReplayError(reason)

        def run_block(block: int, forward: Callable, args: tuple, kwargs: dict) -> Any:
            again = _is_backward()
            call = None if again else next(records, None)
            if call is None:
                output = forward(*_requiring_grad(self.blocks[block], args), **kwargs)
                ran.note(block, output, again)
                return output
            if call.block != block:
                fail(f"block {block} was called where block {call.block} was called in pass 1")
            if call.kept and call.versions != _versions(call.output):
                fail(f"the output of block {block} was changed in place after the block returned it")
            if call.state is not None:
                call.state.restore()
            return _map(lambda tensor: tensor, call.output)  # new containers, since a pass may write to them

        def run_model(forward: Callable, args: tuple, kwargs: dict) -> Any:
            recorded = next(models, None)
            output = forward(*args, **kwargs)
            if recorded and (count := len(_tensors(output))) != recorded[1]:
                fail(f"the model returned {count} tensors where it returned {recorded[1]} in pass 1")
            return output

        Dropped.errors = errors
        try:
            with self._standing_in(run_block, run_model):
                yield
        except Exception:
            if not errors:
                raise
        finally:
            Dropped.errors = outer
        if errors:
            raise errors.pop(0)
        if missing := len(list(records)):
            raise ReplayError(f"{first - missing} blocks were called, but {len(recording.calls)} in pass 1")
        recording.last = ran.first

    @contextmanager
    def _standing_in(self, run_block: Callable, run_model: Callable) -> Iterator[None]:
        """Inside, `run_block(index, forward, args, kwargs)` replaces calls of blocks; `run_model`, of the model."""
        standins = [Standin(b, _forward_of(b), partial(run_block, index)) for index, b in enumerate(self.blocks)]
        if self.model is not None:
            standins.append(Standin(self.model, _forward_of(self.model), run_model))
        try:
            for standin in standins:
                standin.__enter__()
            yield
        finally:
            for standin in standins:
                standin.__exit__()


def _forward_of(module: nn.Module) -> str:
    """`forward`, or after `block.compile()` the compiled call, so that the replacement is not compiled."""
    return "forward" if module._compiled_call_impl is None else "_compiled_call_impl"


def _is_backward() -> bool:
    """Whether this runs within a backward pass."""
    return torch._C._current_graph_task_id() != -1


def _requiring_grad(block: nn.Module, args: tuple) -> tuple:
    """`args` requiring gradients: a reentrant checkpoint computes those of weights only if its inputs do."""
    if not getattr(block, "gradient_checkpointing", False):
        return args
    frozen = [isinstance(arg, Tensor) and arg.is_floating_point() and not arg.requires_grad for arg in args]
    return tuple(a.detach().requires_grad_() if is_frozen else a for a, is_frozen in zip(args, frozen, strict=True))


def _map(function: Callable[[Tensor], Any], output: Any) -> Any:
    """`output` with `function` applied to each tensor."""
    return function(output) if isinstance(output, Tensor) else recursively_apply(function, output)


def _tensors(output: Any) -> list[Tensor]:
    """All tensors in `output`."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _placeholder(made: dict[tuple, Tensor], tensor: Tensor) -> Tensor:
    """A [`Dropped`] in place of a floating-point `tensor`; `made` caches them by shape and kind."""
    if not tensor.is_floating_point():
        return tensor.detach()
    key = (tensor.shape, tensor.dtype, tensor.device, tensor.is_inference())
    if key not in made:
        nan = torch.full((), torch.nan, dtype=tensor.dtype, device=tensor.device)
        made[key] = nan.expand(tensor.shape).as_subclass(Dropped)
    return made[key]


def _versions(output: Any) -> list[int]:
    return [version_of(tensor) for tensor in _tensors(output)]
