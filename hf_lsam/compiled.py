"""What `torch.compile` asks of a second pass: nothing that differs from step to step may be seen from inside."""

from collections.abc import Iterable

from accelerate.utils import is_compiled_module
from torch import Tensor, nn


class CompiledRegions:
    """Compiled modules. Weights of one are switched on and off together: another set would compile it anew."""

    def __init__(self, called: nn.Module):
        compiled: dict[nn.Module, nn.Module] = {}
        for module in called.modules():
            if is_compiled_module(module):
                compiled[module._orig_mod] = module  # type: ignore[index]
            elif module._compiled_call_impl is not None:
                compiled.setdefault(module, module)
        self._inside = {inner for module in compiled for inner in module.modules() if inner is not module}
        self._callers = {module: caller for module, caller in compiled.items() if module not in self._inside}
        self._regions = [set(module.parameters()) for module in self._callers]

    def hide(self, modules: Iterable[nn.Module]) -> bool:
        """Whether one of `modules` is called from inside of a region, where its calls cannot be replaced."""
        return not self._inside.isdisjoint(modules)

    def caller(self, module: nn.Module) -> nn.Module:
        """What is called in the place of `module`."""
        return self._callers.get(module, module)

    def taken_with(self, weights: Iterable[Tensor]) -> set[Tensor]:
        """`weights`, and every weight that is trained and takes a gradient together with one of them."""
        taken = set(weights)
        regions = (region for region in self._regions if not region.isdisjoint(taken))
        return taken.union(*({parameter for parameter in region if parameter.requires_grad} for region in regions))
