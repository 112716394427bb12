"""Suffix replay: pass 2 returns what blocks returned in pass 1, up to the first perturbed one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from .random_state import RandomState, TorchRandomState


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
    *("is_floating_point", "is_complex", "is_contiguous", "detach", "to"),
}


@dataclass
class Call:
    """
    One call of a block in pass 1: what it returned, and the random state when it did.

    Attributes:
        kept: Whether `output` is what it returned, or a placeholder without memory of its own.
    """

    block: int
    output: Any
    kept: bool
    versions: list[int]
    random_state: RandomState | TorchRandomState


@dataclass
class Recording:
    """
    The calls of one pass in their order, and the random state before it and after it.

    Attributes:
        dropped: Blocks whose outputs are not kept.
    """

    before: RandomState
    after: RandomState
    dropped: frozenset[int] = frozenset()
    calls: list[Call] = field(default_factory=list)
    replayable: bool = True


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
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device):
        self.blocks = list(blocks)
        self.device = device
        # Whether some forward pass drew from Python's or NumPy's generator; from then on each call keeps their states.
        self._draws_on_host = False

    @contextmanager
    def recording(self, keep_calls: bool = True, dropped: frozenset[int] = frozenset()) -> Iterator[Recording]:
        """
        Record the pass that runs inside.

        Args:
            keep_calls: Whether to keep more than the random states.
            dropped: Indices of blocks whose outputs are not worth their memory. A replay that would begin right after
                one of them begins earlier.
        """
        before = RandomState.capture(self.device)
        recording = Recording(before, before, dropped, replayable=keep_calls)
        capture = RandomState.capture if self._draws_on_host else TorchRandomState.capture

        def recorded(block: int, forward: Callable) -> Callable:
            def run(*args, **kwargs):
                output = forward(*args, **kwargs)
                kept = block not in dropped
                detached = recursively_apply(torch.Tensor.detach if kept else _placeholder, output)
                recording.calls.append(Call(block, detached, kept, _versions(detached), capture(self.device)))
                return output

            return run

        with self._forwards(recorded if keep_calls else None):
            yield recording
        recording.after = RandomState.capture(self.device)
        if keep_calls and not self._draws_on_host and not recording.after.same_host_state(before):
            self._draws_on_host = True
            recording.replayable = False

    @contextmanager
    def replaying(self, recording: Recording, perturbed: set[int] | None) -> Iterator[None]:
        """
        Inside, blocks called before the first one of `perturbed` return what they returned in `recording`, or
        [`Dropped`] where that was not kept: only the last of these outputs is meant to be read.

        Args:
            recording: The same batch at the unperturbed weights.
            perturbed: Indices of the blocks that hold a perturbed weight; `None` replays nothing.

        Raises:
            ReplayError: inside, if blocks are called in another order than before or a record was changed in place.
            DroppedError: inside, if an output is read that was not kept.
        """
        recording.before.restore()
        first = 0
        if perturbed is not None and recording.replayable:
            first = next(
                (i for i, call in enumerate(recording.calls) if call.block in perturbed), len(recording.calls)
            )
            while first > 0 and not recording.calls[first - 1].kept:
                first -= 1
        position = 0

        def replayed(block: int, forward: Callable) -> Callable:
            def run(*args, **kwargs):
                nonlocal position
                position += 1
                if position > first:
                    return forward(*self._requiring_grad(block, args), **kwargs)
                call = recording.calls[position - 1]
                if call.block != block:
                    raise ReplayError(f"block {block} was called where block {call.block} was called in pass 1")
                if call.versions != _versions(call.output):
                    raise ReplayError(f"the output of block {block} was changed in place after the block returned it")
                call.random_state.restore()
                return call.output

            return run

        with self._forwards(replayed):
            yield
        if position < first:
            raise ReplayError(f"{position} blocks were called, but {len(recording.calls)} in pass 1")

    def _requiring_grad(self, block: int, args: tuple) -> tuple:
        """`args` such that a reentrant checkpoint, which only looks at its inputs, tracks gradients of the weights."""
        if not getattr(self.blocks[block], "gradient_checkpointing", False):
            return args
        return tuple(
            arg.detach().requires_grad_()
            if isinstance(arg, Tensor) and arg.is_floating_point() and not arg.requires_grad
            else arg
            for arg in args
        )

    @contextmanager
    def _forwards(self, wrap: Callable[[int, Callable], Callable] | None) -> Iterator[None]:
        """Replace what each block runs, on the instance, by `wrap(index, forward)`."""
        if wrap is None:
            yield
            return
        # `forward`, or where `block.compile()` was called what it compiled, so that no wrapper is compiled in.
        names = ["forward" if block._compiled_call_impl is None else "_compiled_call_impl" for block in self.blocks]
        # An instance may have a forward of its own already (accelerate's device hooks): it comes back as it was.
        own = [vars(block).get(name) for block, name in zip(self.blocks, names, strict=True)]
        try:
            for index, (block, name) in enumerate(zip(self.blocks, names, strict=True)):
                setattr(block, name, wrap(index, getattr(block, name)))
            yield
        finally:
            for block, name, forward in zip(self.blocks, names, own, strict=True):
                if forward is None:
                    vars(block).pop(name, None)
                else:
                    setattr(block, name, forward)


def _placeholder(tensor: Tensor) -> Tensor:
    """[`Dropped`], in the shape of `tensor`; what is no floating-point tensor stays."""
    if not tensor.is_floating_point():
        return tensor.detach()
    nan = torch.full((), torch.nan, dtype=tensor.dtype, device=tensor.device)
    return nan.expand(tensor.shape).as_subclass(Dropped)


def _versions(output: Any) -> list[int]:
    """The version counters of all tensors in `output`, which in-place operations count up."""
    versions: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        versions.append(tensor._version)
        return tensor

    recursively_apply(note, output)
    return versions
