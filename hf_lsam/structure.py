"""The modules of a model, found again when a module or a weight was added, removed, or replaced."""

import itertools
import operator
from collections.abc import Iterator
from typing import Any

from torch import nn

from .given import is_users_callable
from .shards import sharded_modules


class Structure:
    """The modules of `model` and of its wrapper `called`; a walk through them takes as long as a few blocks."""

    def __init__(self, model: nn.Module, called: nn.Module | None = None):
        self.model, self._called = model, model if called is None else called
        self.version = 0  # how often it was found again
        self._find()

    def look(self) -> int:
        """Find the modules again if they are others now; returns `version`."""
        if any(self._empty) or not all(map(operator.is_, self._parts(), self._found)):
            self.version += 1
            self._find()
        return self.version

    def _find(self) -> None:
        self.modules = [*self._called.modules()]
        tables = [module._modules for module in self.modules]
        if not sharded_modules(self.model):  # FSDP2 replaces weights whenever it gathers or frees them
            tables += [module._parameters for module in self.modules]  # type: ignore[misc]
        self._empty, self._filled = [t for t in tables if not t], [t for t in tables if t]
        self._found = [*self._parts()]
        # Whether `model.train()` does nothing but set the modes of all modules.
        self.trains_plainly = not any(is_users_callable(module.train) for module in self.modules)
        self.counts: dict[tuple, int] = {}  # of weights, by the arguments of `num_parameters`

    def _parts(self) -> Iterator[Any]:
        """The modules and weights in the tables, and an object that marks their end."""
        parts = itertools.chain.from_iterable(map(operator.methodcaller("values"), self._filled))
        return itertools.chain(parts, [self])
