"""Stamps: values that differ after a change, of things that are too large to copy, or cannot be copied."""

import contextlib
import inspect
import io
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Objects without parts that a pass may change, and containers whose size changes with most changes.
PLAIN = (int, float, complex, str, bytes, type(None), np.generic, torch.dtype, torch.device, torch.Size)
_SIZED = (list, dict, set, deque, bytearray)


def version_of(tensor: Tensor) -> int:
    """The version counter, which in-place operations increase; 0 in inference mode, where there is none."""
    return 0 if tensor.is_inference() else tensor._version


def stamp_of(thing: Any) -> Any:
    """A value from which `has_changed` tells whether a tensor has changed, or one of the items of a container."""
    if isinstance(thing, Tensor):
        return version_of(thing), thing.data_ptr(), thing.shape
    items = [*(thing.values() if isinstance(thing, dict) else thing)]
    return items, _outline_of(items)


def has_changed(thing: Any, stamp: Any) -> bool:
    """Whether a tensor has changed since, except through `.data`, or an item that was in a container.

    Of items that are containers, their sizes are compared, and of objects the values of their attributes.
    """
    if isinstance(thing, Tensor):
        return stamp_of(thing) != stamp
    items, outline = stamp
    return differ(_outline_of(items), outline)


def _outline_of(items: list) -> list | None:
    kinds = {*map(type, items)}
    if all(issubclass(kind, PLAIN) for kind in kinds):
        return None
    if all(issubclass(kind, _SIZED) for kind in kinds):
        return [*map(len, items)]
    return [*map(_sketch, items)]


def _sketch(item: Any) -> Any:
    if isinstance(item, Tensor):
        return version_of(item)
    return len(item) if isinstance(item, _SIZED) else [*getattr(item, "__dict__", {}).values()]


def differ(one: Any, other: Any) -> bool:
    """Whether two values differ; also where that cannot be said, as of tensors with several entries."""
    try:
        return bool(one != other)
    except (RuntimeError, TypeError, ValueError):
        return True


def mark_of(thing: Any) -> Any:
    """A value that differs after most changes of a file, an iterator, or another object that cannot be copied."""
    if inspect.isgenerator(thing):
        frame = thing.gi_frame
        return frame and (frame.f_lasti, *map(id, frame.f_locals.values()))
    if isinstance(thing, io.IOBase):
        # There is no position in a pipe, in a closed file, or while it is iterated over.
        with contextlib.suppress(OSError, ValueError):
            return thing.tell()
        return None
    plain = [value for value in getattr(thing, "__dict__", {}).values() if isinstance(value, (int, float, str))]
    count = repr(thing) if type(thing).__module__ == "itertools" else None
    return plain, count, thing.__length_hint__() if hasattr(type(thing), "__length_hint__") else None
