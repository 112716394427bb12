"""The kinds of objects that a pass may change: how each is copied, compared with its copy, and restored."""

import array
import collections
import contextvars
import operator
import random
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .stamps import stamp_of

# Attributes that every module has, or that `compile` sets; and those of them that hold hooks.
_OWN_OF_MODULES = {*vars(nn.Module()), "_compiled_call_impl"}
HOOKS = [name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict)]


class Attributes(NamedTuple):
    """A few attributes of an object whose other attributes are not part of a snapshot."""

    owner: object
    names: tuple[str, ...]

    def read(self) -> dict[str, Any]:
        """Those that are set, by name."""
        return {name: getattr(self.owner, name) for name in self.names if hasattr(self.owner, name)}

    def put(self, kept: dict[str, Any]) -> None:
        """Set them to `kept`; what is missing there is deleted."""
        for name in self.read().keys() - kept.keys():
            delattr(self.owner, name)
        for name, value in kept.items():
            setattr(self.owner, name, value)


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of object: how its content is copied, compared with the copy, and restored."""

    copy: Callable[[Any], Any]
    put: Callable[[Any, Any], object]  # object, copy
    same: Callable[[Any, Any], bool] | None = None  # object, copy; default: whether a new copy holds identical objects


def identical(now: Any, kept: Any) -> bool:
    """Whether two copies hold the same objects."""
    if isinstance(kept, dict):
        return list(now) == list(kept) and all(map(operator.is_, now.values(), kept.values()))
    return all(map(operator.is_, now, kept)) and len(now) == len(kept) if isinstance(kept, list) else now is kept


def _same_mapping(mapping: dict, kept: dict) -> bool:
    return identical(mapping if type(mapping) is dict else dict(mapping), kept)


def _put_mapping(mapping: dict, kept: dict) -> None:
    """Restore what has changed, and nothing else: the class of a mapping may forbid writing."""
    for key in [key for key in mapping if key not in kept]:
        del mapping[key]
    for key, value in kept.items():
        if key not in mapping or mapping[key] is not value:
            mapping[key] = value
        if isinstance(mapping, collections.OrderedDict):
            mapping.move_to_end(key)


def _put_items(items: Any, kept: list) -> None:
    items.clear()
    (items.update if isinstance(items, set) else items.extend)(kept)


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The attributes that a user's class has set, except parameters, buffers and submodules; none for torch's own."""
    is_torchs = type(module).__module__.startswith("torch.")
    return {} if is_torchs else {name: value for name, value in vars(module).items() if name not in _OWN_OF_MODULES}


def _copy_module(module: nn.Module) -> dict[Any, Any]:
    """Its attributes by name, and its hooks by table and key."""
    hooks = {(table, key): hook for table in HOOKS for key, hook in vars(module).get(table, {}).items()}
    return attributes_of(module) | hooks


def _put_module(module: nn.Module, kept: dict[Any, Any]) -> None:
    own, attributes = vars(module), {name: value for name, value in kept.items() if isinstance(name, str)}
    for name in attributes_of(module).keys() - attributes.keys():
        del own[name]
    own.update(attributes)
    for table in HOOKS:
        hooks = [(name[1], hook) for name, hook in kept.items() if name not in attributes and name[0] == table]
        _put_mapping(own.get(table, {}), dict(hooks))


def _copy_class(owner: type) -> dict[str, Any]:
    """The attributes of the class itself, except methods and other descriptors."""
    own = {name: value for name, value in vars(owner).items() if not hasattr(type(value), "__get__")}
    return {name: value for name, value in own.items() if not name.startswith("__")}


def _put_class(owner: type, kept: dict[str, Any]) -> None:
    now = _copy_class(owner)
    for name in now.keys() - kept.keys():
        delattr(owner, name)
    for name, value in kept.items():
        if name not in now or now[name] is not value:
            setattr(owner, name, value)


@torch.no_grad()
def put_tensors(tensors: Sequence[Tensor], kept: Sequence[tuple[Tensor, Tensor, tuple]]) -> None:
    """Restore all of them, changed or not, since a comparison would synchronise with the device."""
    for tensor, (data, copy, _) in zip(tensors, kept, strict=True):
        if tensor.data_ptr() != data.data_ptr():
            tensor.data = data
        if tensor.shape != copy.shape:
            tensor.resize_(copy.shape)
    if tensors:
        torch._foreach_copy_(list(tensors), [copy for _, copy, _ in kept])


MAPPING, LIST = Kind(dict, _put_mapping, _same_mapping), Kind(list, _put_items, identical)
SLOTS = Kind(Attributes.read, Attributes.put)
MODULE = Kind(_copy_module, _put_module)
# The copy includes `.data`, which a pass may assign. Values and stamp are compared: either may change alone.
TENSOR = Kind(
    lambda tensor: (tensor.data, tensor.detach().clone(), stamp_of(tensor)),
    lambda tensor, kept: put_tensors([tensor], [kept]),
    lambda tensor, kept: stamp_of(tensor) == kept[2] and torch.equal(tensor, kept[1]),
)
KINDS: dict[type, Kind] = {
    dict: MAPPING,
    list: LIST,
    collections.deque: LIST,
    set: Kind(list, _put_items, identical),
    bytearray: Kind(bytes, lambda array, kept: array.__setitem__(slice(None), kept), operator.eq),
    array.array: Kind(lambda array: array[:], lambda array, kept: array.__setitem__(slice(None), kept), operator.eq),
    contextvars.ContextVar: Kind(contextvars.ContextVar.get, contextvars.ContextVar.set),
    Attributes: SLOTS,
    type: Kind(_copy_class, _put_class),
    nn.Module: MODULE,
    Tensor: TENSOR,
    np.ndarray: Kind(np.copy, np.copyto, lambda a, kept: a.shape == kept.shape and bool(np.all(a == kept))),
    types.CellType: Kind(lambda c: c.cell_contents, lambda c, kept: setattr(c, "cell_contents", kept)),
    random.Random: Kind(random.Random.getstate, random.Random.setstate),
    torch.Generator: Kind(torch.Generator.get_state, torch.Generator.set_state),
    np.random.RandomState: Kind(np.random.RandomState.get_state, np.random.RandomState.set_state),
    np.random.Generator: Kind(lambda g: g.bit_generator.state, lambda g, s: setattr(g.bit_generator, "state", s)),
}


@lru_cache(1024)
def kind_of(owner: type) -> Kind | None:
    """The kind of objects of a class: its own or that of the first base class that has one, else `None`."""
    return next((KINDS[base] for base in owner.__mro__ if base in KINDS), None)
