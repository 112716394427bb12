"""What an optimizer trains."""

from collections.abc import Collection
from typing import Any

from torch import Tensor


class Optimized:
    """What is in the groups of `owner.optimizer`: the same object until that is another one, or has more in them."""

    def __init__(self, owner: Any):
        self.owner = owner
        self._of: tuple[int, list[int]] | None = None
        self._parameters: Collection[Tensor] = ()

    def __call__(self) -> Collection[Tensor]:
        """The parameters; the groups are gone through only where they have changed."""
        groups = self.owner.optimizer.param_groups
        of = (id(self.owner.optimizer), [len(group["params"]) for group in groups])
        if self._of != of:
            every = {parameter: None for group in groups for parameter in group["params"]}
            self._of, self._parameters = of, every.keys()
        return self._parameters
