"""Find the blocks of a model, and their trainable parameters."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_peft_available


@dataclass(frozen=True)
class Candidate:
    """What is selected as a unit: a transformer block, a module that `block_pattern` matches, or the whole model.

    Attributes:
        name: Name of the module in the model, or `"all"`.
        parameters: All its parameters, frozen ones included, except those that an earlier candidate shares.
        blocks: Indices of the model's blocks that use one of them; all blocks, for parameters outside of the blocks.
        size: Number of trainable weights that take part in matrix products, so not those of embeddings.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    blocks: frozenset[int]
    size: int

    @property
    def first_block(self) -> int:
        """Index of the first block of the model that uses one of the parameters."""
        return min(self.blocks, default=0)

    @property
    def is_trained(self) -> bool:
        """Whether one of its parameters requires a gradient."""
        return any(parameter.requires_grad for parameter in self.parameters)


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of `model` by name, in the order of `model.named_modules()`.

    These are the outermost `GradientCheckpointingLayer`s of transformers. Left out are those whose class and whose
    list hold less than a tenth of the parameters of the largest class or list (Wav2Vec2's convolutions). A model
    without such layers has as blocks the children of its outermost `ModuleList`s and `Sequential`s that hold modules
    of one class only.
    """
    if marked := dict(_outermost(model, lambda module: isinstance(module, GradientCheckpointingLayer))):
        trained = {name: m for name, m in marked.items() if any(p.requires_grad for p in m.parameters())}
        major = _major(marked) | _major(trained)
        return {name: module for name, module in marked.items() if name in major}
    return {
        f"{name}.{child}".removeprefix("."): module
        for name, container in _outermost(model, _is_homogeneous)
        for child, module in container.named_children()
    }


def find_candidates(
    model: nn.Module, blocks: dict[str, nn.Module], pattern: str | None, may_be_frozen: bool = False
) -> list[Candidate]:
    """What is selected from: `blocks`, or the outermost matches of `pattern`; `ValueError` if too few are trained."""
    named = blocks
    if pattern is not None:
        names = {module: name for name, module in model.named_modules()}
        named = dict(_outermost(model, lambda module: module is not model and re.fullmatch(pattern, names[module])))
    # A parameter outside of the blocks may be used before the first one, so it counts as used by all.
    outside = outside_parameters(model, list(blocks.values()))
    uses = [{*block.parameters(), *outside} for block in blocks.values()]
    multiplied = multiplied_parameters(model)
    candidates: list[Candidate] = []
    taken: set[nn.Parameter] = set()
    for name, module in named.items():
        parameters = tuple(p for p in module.parameters() if p not in taken)
        taken.update(parameters)
        if parameters:
            used_by = frozenset(index for index, used in enumerate(uses) if not used.isdisjoint(parameters))
            size = sum(p.numel() for p in parameters if p.requires_grad and p in multiplied)
            candidates.append(Candidate(name, parameters, used_by, size))
    trained = candidates if may_be_frozen else [candidate for candidate in candidates if candidate.is_trained]
    if pattern is not None and not trained:
        raise ValueError(
            f"block_pattern {pattern!r} matches no module with trainable parameters in {type(model).__name__}. Let it "
            f"match a whole name of model.named_modules(), for instance {_some_names(model)}."
        )
    if pattern is None and len(trained) < 2:
        raise ValueError(
            f"{len(trained) or 'None'} of the {len(blocks)} blocks of {type(model).__name__} can be trained, and "
            "layer-wise perturbation selects from at least 2 (ALBERT shares a single block; prompt and prefix tuning "
            "train vectors outside of the blocks). Train parameters in the blocks, such as LoRA adapters, name other "
            f"modules with block_pattern, for instance {_some_names(model)}, or set block_selection='all'."
        )
    return candidates


def everything(model: nn.Module, blocks: dict[str, nn.Module]) -> list[Candidate]:
    """One candidate that holds every parameter, embeddings and head included (SAM)."""
    size = sum(p.numel() for p in multiplied_parameters(model) if p.requires_grad)
    return [Candidate("all", tuple(model.parameters()), frozenset(range(len(blocks))), size)]


def outside_parameters(model: nn.Module, blocks: Sequence[nn.Module], without=()) -> dict[nn.Parameter, None]:
    """The parameters of modules outside of `blocks`, in order, except those of modules of the class `without`."""
    inside = {module for block in blocks for module in block.modules()}
    outside = [module for module in model.modules() if module not in inside and not isinstance(module, without)]
    return dict.fromkeys(parameter for module in outside for parameter in module.parameters(recurse=False))


def multiplied_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that take part in matrix products: those of all modules but embeddings, which look up rows."""
    return set(outside_parameters(model, [], nn.Embedding))


def idle_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that no pass uses: the originals of modules that PEFT copies and trains (`modules_to_save`)."""
    if not is_peft_available():
        return set()
    from peft.utils import ModulesToSaveWrapper

    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return {parameter for wrapper in wrappers for parameter in wrapper.original_module.parameters()}


def _outermost(module: nn.Module, wanted, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each `wanted` module in `module`, itself included, that is not inside another one."""
    if wanted(module):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _outermost(child, wanted, f"{name}.{child_name}".removeprefix("."))


def _is_homogeneous(module: nn.Module) -> bool:
    """Whether `module` is a list of at least 2 modules, all of one class and with parameters."""
    children = list(module.children())
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) >= 2
    return is_list and len(set(map(type, children))) == 1 and all(map(_size, children))


def _major(modules: dict[str, nn.Module]) -> set[str]:
    """The names of those whose class or list holds more than a tenth of the parameters of the largest one."""
    sizes: Counter[type | str] = Counter()
    for name, module in modules.items():
        sizes[type(module)] += _size(module)
        sizes[name.rpartition(".")[0]] += _size(module)
    least = 0.1 * max(sizes.values(), default=0)
    return {n for n, m in modules.items() if max(sizes[type(m)], sizes[n.rpartition(".")[0]]) > least}


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _some_names(model: nn.Module) -> str:
    """Three names of trainable modules, as examples of a pattern."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "." in name]
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in trained))
    return ", ".join(repr(re.escape(name).replace(r"\_", "_")) for name in names[len(names) // 2 :][:3])
