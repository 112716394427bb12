"""Suffix replay: pass 2 returns what blocks returned in pass 1, up to the first perturbed one."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from .held import RandomState, version_of


class ReplayError(RuntimeError):
    """A pass that cannot be replayed from its records; a full pass is needed."""


class DroppedError(ReplayError):
    """Something read the output of a block that was not kept."""


class Dropped(Tensor):
    """
    In the place of a tensor that was not kept: it may be passed on and asked for its kind, as between blocks.

    Whoever would read its values gets a `DroppedError`, and code that passes by this (C++) not a number.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ not in _READ_NO_VALUES:
            raise DroppedError(f"{func.__name__} reads the output of a block that was not kept")
        return super().__torch_function__(func, types, args, kwargs or {})


_READ_NO_VALUES = {
    *("__get__", "dim", "size", "numel", "stride", "get_device"),
    *("is_floating_point", "is_complex", "is_contiguous", "is_inference", "detach", "to"),
}


@dataclass
class Call:
    """
    A call of a block.

    Attributes:
        block: Index of the block; -1 is all that lies outside of the blocks.
        places: How many places of the batch it went through (tokens, pixels).
        has_gradient: Whether a gradient goes through it. A block that runs again in the backward pass, as it does with
            activation checkpointing, has one of the two times only.
        dtype: Of its output.
        output: For a replay, what it returned, or a placeholder without memory of its own; then there are a `state`
            of the random generators and the `versions` of the tensors in it.
        kept: Whether a replay may begin right after it, since its `output` is no placeholder.
    """

    block: int
    places: int
    has_gradient: bool
    dtype: torch.dtype = torch.float32
    output: Any = None
    kept: bool = False
    state: RandomState | None = None
    versions: Sequence[int] = ()


@dataclass
class Recording:
    """
    What one pass called, in its order.

    Attributes:
        models: Calls of the model: names and plain values of their arguments, and the number of tensors returned.
        again: Calls of blocks in the backward pass.
        last: What the last pass over this micro-batch called, replayed calls aside.
    """

    calls: list[Call] = field(default_factory=list)
    models: list[tuple] = field(default_factory=list)
    again: list[Call] = field(default_factory=list)
    last: list[Call] = field(default_factory=list)
    replayable: bool = True
    has_dropped: bool = False

    @property
    def first(self) -> list[Call]:
        """All calls of pass 1."""
        return [*self.calls, *self.again]

    @property
    def heads(self) -> int:
        """How often the model was called."""
        return max(len(self.models), 1)

    def start(self, blocks: Collection[int]) -> int:
        """The place of the first call of one of `blocks`; the number of calls if there is none."""
        return next((place for place, call in enumerate(self.calls) if call.block in blocks), len(self.calls))


class Replay:
    """
    Records passes over `blocks` and replays them.

    The model's own forward runs in either pass and only the blocks' `forward` is replaced, so masks, position
    embeddings, cross-attention and output capture need no special case, and module hooks still run (those of FSDP2
    gather the weights of a replayed block in vain). A replayed call sets the random state that the recorded one left,
    so draws between blocks (T5, DeBERTa-v2) are those of pass 1.

    Args:
        blocks: The model's blocks.
        device: Where the model lives, for its random state.
        model: What the passes call, where its calls are to be compared.

    Attributes:
        draws_on_host: Whether passes draw from Python's or NumPy's generator, so that each call keeps their states.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, model: nn.Module | None = None):
        self.blocks, self.device, self.model = list(blocks), device, model
        self.draws_on_host = False

    @contextmanager
    def recording(
        self,
        keeps: bool = True,
        places: Collection[int] | None = None,
        first_call: Callable[[], None] = lambda: None,
    ) -> Iterator[Recording]:
        """
        Record the pass that runs inside.

        Args:
            keeps: Whether to keep what is needed to replay it.
            places: The calls whose outputs are kept, counted from 0 (default: all). The others are not worth their
                memory: a replay that would begin right after one of them begins earlier.
            first_call: Called before the first call of the model.
        """
        recording = Recording(replayable=keeps)
        graded: set[int] = set()

        def run_block(block: int, forward: Callable, args: tuple, kwargs: dict) -> Any:
            again = _is_backward()
            output = forward(*args, **kwargs)
            call = _call(block, output, graded, again)
            if keeps and not again:
                call.kept = places is None or len(recording.calls) in places
                recording.has_dropped |= not call.kept
                call.output = _map(Tensor.detach if call.kept else _placeholder, output)
                call.versions = _versions(call.output) if call.kept else []
                call.state = RandomState.capture(self.device, self.draws_on_host)
            (recording.again if again else recording.calls).append(call)
            return output

        def run_model(forward: Callable, args: tuple, kwargs: dict) -> Any:
            if not recording.models:
                first_call()
            place = len(recording.models)
            recording.models.append(())
            output = forward(*args, **kwargs)
            recording.models[place] = (_arguments(args, kwargs), len(_tensors(output)))
            return output

        with self._standing_in(run_block, run_model):
            yield recording
        recording.last = recording.first

    @contextmanager
    def replaying(self, recording: Recording, perturbed: Collection[int] | None) -> Iterator[None]:
        """
        Inside, blocks called before the first one of `perturbed` return what they returned in `recording`, or
        [`Dropped`] where that was not kept: only the last of these outputs is meant to be read.

        Args:
            recording: The same batch at the unperturbed weights.
            perturbed: Indices of the blocks that hold a perturbed weight; `None` replays nothing.

        Raises:
            ReplayError: inside, if blocks are called in another order than before, a record was changed in place, or
                the model returns fewer tensors than in pass 1.
            DroppedError: inside, if an output is read that was not kept.
        """
        replays = perturbed is not None and recording.replayable
        first = recording.start(perturbed or ()) if replays else 0
        while first > 0 and not recording.calls[first - 1].kept:
            first -= 1
        position, models = 0, 0
        last: list[Call] = []
        graded: set[int] = set()

        def run_block(block: int, forward: Callable, args: tuple, kwargs: dict) -> Any:
            nonlocal position
            again = _is_backward()
            if again or position >= first:
                position += not again
                output = forward(*_requiring_grad(self.blocks[block], args), **kwargs)
                last.append(_call(block, output, graded, again))
                return output
            call = recording.calls[position]
            position += 1
            if call.block != block:
                raise ReplayError(f"block {block} was called where block {call.block} was called in pass 1")
            if call.kept and call.versions != _versions(call.output):
                raise ReplayError(f"the output of block {block} was changed in place after the block returned it")
            if call.state is not None:
                call.state.restore()
            # Containers of its own for each pass, which may write to them.
            return _map(lambda tensor: tensor, call.output)

        def run_model(forward: Callable, args: tuple, kwargs: dict) -> Any:
            nonlocal models
            place, models = models, models + 1
            output = forward(*args, **kwargs)
            if first > 0 and place < len(recording.models):
                count, wanted = len(_tensors(output)), recording.models[place][1]
                if count != wanted:
                    raise ReplayError(f"the model returned {count} tensors where it returned {wanted} in pass 1")
            return output

        with self._standing_in(run_block, run_model):
            yield
        if position < first:
            raise ReplayError(f"{position} blocks were called, but {len(recording.calls)} in pass 1")
        recording.last = last

    @contextmanager
    def _standing_in(self, run_block: Callable, run_model: Callable) -> Iterator[None]:
        """Inside, `run_block(index, forward, args, kwargs)` runs for each block, and the like for the model."""
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.enter_context(Standin(block, _forward_of(block), partial(run_block, index)))
            if self.model is not None:
                stack.enter_context(Standin(self.model, _forward_of(self.model), run_model))
            yield


class Standin:
    """
    What an instance has in the place of a method of its class, inside of a `with` block: calls go to `run`.

    A copy of the module that is made meanwhile is one of the module and of nothing else.
    """

    def __init__(self, module: nn.Module, name: str, run: Callable[[Callable, tuple, dict], Any]):
        self.module, self.name, self.copies = module, name, []  # type: ignore[var-annotated]
        # An instance may have one of its own already (accelerate's device hooks): it comes back as it was.
        self.own = vars(module).get(name)
        self.method = getattr(module, name)
        self.run: Callable | None = run

    def __call__(self, *args, **kwargs):
        return self.method(*args, **kwargs) if self.run is None else self.run(self.method, args, kwargs)

    def __deepcopy__(self, memo: dict):
        self.copies.append(memo.get(id(self.module)))
        return deepcopy(self.method, memo)

    def __reduce__(self):
        # In a pickle, whose modules are without attributes when this is called: that of the class.
        return getattr, (self.module, self.name)

    def __enter__(self) -> None:
        vars(self.module)[self.name] = self

    def __exit__(self, *error: object) -> None:
        self.run = None
        if self.own is not None:
            vars(self.module)[self.name] = self.own
            return
        for module in (self.module, *self.copies):
            if module is not None:
                vars(module).pop(self.name, None)


def _forward_of(module: nn.Module) -> str:
    """`forward`, or where `block.compile()` was called what it compiled, so that no wrapper is compiled in."""
    return "forward" if module._compiled_call_impl is None else "_compiled_call_impl"


def _is_backward() -> bool:
    """Whether this is called from a backward pass."""
    return torch._C._current_graph_task_id() != -1


def _requiring_grad(block: nn.Module, args: tuple) -> tuple:
    """`args` such that a reentrant checkpoint, which only looks at its inputs, tracks gradients of the weights."""
    if not getattr(block, "gradient_checkpointing", False):
        return args
    return tuple(
        arg.detach().requires_grad_()
        if isinstance(arg, Tensor) and arg.is_floating_point() and not arg.requires_grad
        else arg
        for arg in args
    )


def _map(function: Callable[[Tensor], Any], output: Any) -> Any:
    """`output` with what `function` makes of each tensor in its place."""
    return function(output) if isinstance(output, Tensor) else recursively_apply(function, output)


def _tensors(output: Any) -> list[Tensor]:
    """All tensors in `output`."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _placeholder(tensor: Tensor) -> Tensor:
    """[`Dropped`], in the shape of `tensor`; what is no floating-point tensor stays."""
    if not tensor.is_floating_point():
        return tensor.detach()
    nan = torch.full((), torch.nan, dtype=tensor.dtype, device=tensor.device)
    return nan.expand(tensor.shape).as_subclass(Dropped)


def _versions(output: Any) -> list[int]:
    return [version_of(tensor) for tensor in _tensors(output)]


def _call(block: int, output: Any, graded: set[int], again: bool) -> Call:
    """A call that returned `output`: images have their channels first, all else last."""
    tensors = [t for t in _tensors(output) if t.dim() > 0 and t.is_floating_point()] or [torch.zeros(1)]
    shape = tensors[0].shape
    places = shape.numel() // max(shape[1 if len(shape) == 4 else -1], 1)
    has_gradient = any(tensor.requires_grad for tensor in tensors) and not (again and block in graded)
    if has_gradient:
        graded.add(block)
    return Call(block, places, has_gradient, tensors[0].dtype)


def _arguments(args: tuple, kwargs: dict[str, Any]) -> tuple:
    """Names and kinds of the arguments of a call, and the values of those that are switches."""
    named = [*enumerate(args), *kwargs.items()]
    return tuple((name, v if isinstance(v, (bool, str, type(None))) else type(v)) for name, v in named)
