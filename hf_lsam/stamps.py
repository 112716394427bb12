"""Stamps: values that differ after a change, of tensors that are too large to copy, and of what cannot be copied."""

import contextlib
import inspect
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Objects without parts that a pass may change.
PLAIN = (int, float, complex, str, bytes, type(None), np.generic, torch.dtype, torch.device, torch.Size)


def are_plain(values: Iterable[Any]) -> bool:
    """Whether none of the values has parts that a pass may change."""
    return all(issubclass(kind, PLAIN) for kind in {*map(type, values)})


def version_of(tensor: Tensor) -> int:
    """The version counter, which in-place operations increase; 0 in inference mode, where there is none."""
    return 0 if tensor.is_inference() else tensor._version


def stamp_of(thing: Any) -> Any:
    """A value from which `changed_in` tells whether a tensor, or one in a list of them, has changed."""
    return [*map(version_of, thing)] if isinstance(thing, list) else (version_of(thing), thing.data_ptr(), thing.shape)


def changed_in(thing: Any, stamp: Any) -> list[Tensor]:
    """The tensors that have changed since: a tensor itself, or those in a list of them, except through `.data`."""
    if not isinstance(thing, list):
        return [thing] * (stamp_of(thing) != stamp)
    return [tensor for tensor, version in zip(thing, stamp, strict=True) if version_of(tensor) != version]


def differ(one: Any, other: Any) -> bool:
    """Whether two values differ; also where that cannot be said, as of tensors with several entries."""
    try:
        return bool(one != other)
    except Exception:  # users' classes may raise any
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
