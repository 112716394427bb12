"""What users hand over: an optimizer, and a function that computes a loss."""

import types
import weakref
from collections.abc import Collection
from typing import Any

from torch import Tensor

from .held import Attributes


class Optimized:
    """What is in the groups of `owner.optimizer`: the same object until that is another one, or has more in them."""

    def __init__(self, owner: Any):
        self.owner = owner
        self._of: tuple[weakref.ref, list[int]] | None = None
        self._parameters: Collection[Tensor] = ()

    def __call__(self) -> Collection[Tensor] | None:
        """The parameters, if there is an optimizer; the groups are gone through only where they have changed."""
        if self.owner.optimizer is None:
            return None
        groups = self.owner.optimizer.param_groups
        of = (weakref.ref(self.owner.optimizer), [len(group["params"]) for group in groups])
        if self._of != of:
            every = {parameter: None for group in groups for parameter in group["params"]}
            self._of, self._parameters = of, every.keys()
        return self._parameters


class _Variables:
    """Has a function's global variables for its attributes."""


def loop_roots(loop: Any) -> dict[str, Any]:
    """What a loop's `compute_loss` may read and change: what it holds, and the global variables that it names."""
    function = getattr(loop.compute_loss, "func", loop.compute_loss)
    function = getattr(function, "__func__", function)
    owner, names, parts = _Variables(), set[str](), [function]
    owner.__dict__ = getattr(function, "__globals__", {})
    while parts:
        part = parts.pop()
        code = part.__code__ if isinstance(part, types.FunctionType) else part
        if isinstance(code, types.CodeType):
            new = {*code.co_names} & vars(owner).keys() - names
            names |= new
            parts += [*code.co_consts, *(vars(owner)[name] for name in new)]
    named = Attributes(owner, tuple(names))
    return {"lsam": loop, "globals": named, "loss": types.SimpleNamespace(**named.read())}
