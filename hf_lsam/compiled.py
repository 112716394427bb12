"""Modules that `torch.compile` has compiled, which recompile if what they see differs between steps."""

import inspect
import types
from collections.abc import Iterable
from typing import Any

from accelerate.utils import is_compiled_module
from torch import Tensor, nn


class CompiledRegions:
    """The compiled modules of a model, and those with a compiled method (`model.forward = torch.compile(...)`).

    All weights of one require gradients together: another subset recompiles it.
    """

    def __init__(self, called: nn.Module):
        compiled: dict[nn.Module, nn.Module] = {}
        for module in called.modules():
            if is_compiled_module(module):
                compiled[module._orig_mod] = module  # type: ignore[index]
            elif module._compiled_call_impl is not None or _has_compiled_method(module):
                compiled.setdefault(module, module)
        self._inside = {inner for module in compiled for inner in module.modules() if inner is not module}
        self._callers = {module: caller for module, caller in compiled.items() if module not in self._inside}
        self._regions = [set(module.parameters()) for module in self._callers]

    def contains_any(self, modules: Iterable[nn.Module]) -> bool:
        """Whether one of `modules` is called inside a compiled one, where its `forward` cannot be replaced."""
        return not self._inside.isdisjoint(modules)

    def caller(self, module: nn.Module) -> nn.Module:
        """The compiled copy of `module` that is called in its place, or `module` itself."""
        return self._callers.get(module, module)

    def whole_regions(self, weights: Iterable[Tensor]) -> set[Tensor]:
        """`weights`, and all trainable weights that are compiled together with one of them."""
        taken = set(weights)
        regions = (region for region in self._regions if not region.isdisjoint(taken))
        return taken.union(*({parameter for parameter in region if parameter.requires_grad} for region in regions))


def _has_compiled_method(module: nn.Module) -> bool:
    methods = [inspect.getattr_static(module, "forward"), *vars(module).values()]
    functions = [method for method in methods if isinstance(method, (types.FunctionType, types.MethodType))]
    return any(_is_compiled(inspect.unwrap(function, stop=_is_compiled)) for function in functions)


def _is_compiled(function: Any) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")
