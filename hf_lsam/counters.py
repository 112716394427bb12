"""What a trainer counts on itself, once and not twice."""

from collections import deque
from collections.abc import Callable
from numbers import Number
from typing import Any

import numpy as np
from torch import Tensor

_UNCHANGING = (Number, np.generic, str, tuple, type(None))
# Attributes of a Trainer that are no counters, though they may be long lists.
_DATA = {"train_dataset", "eval_dataset"}


class Counters:
    """
    What an object counts on itself, to be put back after a pass that must not count.

    Trainers keep token counters and lists of metrics as attributes and add to them in `compute_loss`. Numbers, strings
    and tuples, tensors without a gradient, arrays, lists, deques, and dictionaries of those are put back; whatever
    else the object holds is left alone.
    """

    def __init__(self, owner: object):
        self.owner = owner
        self.values: dict[str, Any] = {}
        self._undo: list[Callable[[], object]] = []
        seen: set[int] = set()
        for name, value in vars(owner).items():
            if name not in _DATA and isinstance(value, (*_UNCHANGING, Tensor, np.ndarray, list, deque, dict)):
                self.values[name] = value
                self._note(value, seen)

    def restore(self) -> None:
        """Put everything back."""
        vars(self.owner).update(self.values)
        for undo in self._undo:
            undo()

    def _note(self, value: Any, seen: set[int]) -> None:
        """Note the content of `value`, unless it is one that cannot change."""
        if isinstance(value, _UNCHANGING) or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, dict):
            content = dict(value)
            self._undo.append(lambda: _put_entries(value, content))
            for entry in content.values():
                self._note(entry, seen)
        elif isinstance(value, (list, deque)):
            entries = list(value)
            self._undo.append(lambda: _put_items(value, entries))
        elif isinstance(value, Tensor) and not value.requires_grad and not value.is_inference():
            version, copy = value._version, value.clone()
            self._undo.append(lambda: None if value._version == version else value.copy_(copy))
        elif isinstance(value, np.ndarray) and value.flags.writeable:
            array = value.copy()
            self._undo.append(lambda: np.copyto(value, array))


def _put_entries(value: dict, content: dict) -> None:
    """Dictionaries may be of a class that forbids writing, so only what has changed is written."""
    for key, entry in content.items():
        if key not in value or value[key] is not entry:
            value[key] = entry


def _put_items(value: list | deque, entries: list) -> None:
    if len(value) != len(entries) or any(one is not other for one, other in zip(value, entries, strict=True)):
        value.clear()
        value.extend(entries)
