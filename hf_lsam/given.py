"""What is read from users' objects: the parameters of an optimizer, and the variables of a loss function."""

import types
import weakref
from collections.abc import Collection
from typing import Any

from torch import Tensor

from .held import Attributes


class Optimized:
    """The parameters of `owner.optimizer`: the same object until the optimizer or the size of a group changes."""

    def __init__(self, owner: Any):
        self.owner = owner
        self._of: tuple[weakref.ref, list[int]] | None = None
        self._parameters: Collection[Tensor] = ()

    def __call__(self) -> Collection[Tensor] | None:
        """The parameters in the groups, or `None` without an optimizer; cached as long as the groups are the same."""
        if self.owner.optimizer is None:
            return None
        groups = self.owner.optimizer.param_groups
        of = (weakref.ref(self.owner.optimizer), [len(group["params"]) for group in groups])
        if self._of != of:
            every = {parameter: None for group in groups for parameter in group["params"]}
            self._of, self._parameters = of, every.keys()
        return self._parameters


class _Variables:
    """An object whose attributes are the global variables of a function."""


def loop_roots(loop: Any) -> dict[str, Any]:
    """What the `compute_loss` of a loop may read and change: the objects that it holds, and the globals it names."""
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
