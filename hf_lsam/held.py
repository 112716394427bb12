"""Things that a pass may change: how each kind of them is copied, compared with its copy, and put back."""

import collections
import contextlib
import inspect
import io
import operator
import random
import types
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# What every module has, and what is set on one for the length of a pass; of that, what passes may change.
_OWN_OF_MODULES = {*vars(nn.Module()), "forward", "_compiled_call_impl"}
_TABLES = {name for name, value in vars(nn.Module()).items() if isinstance(value, dict)} - {"_modules"}


@dataclass(frozen=True)
class RandomState:
    """
    States of torch's generators, on the CPU and on the model's device, and of those of Python and NumPy.

    SpecAugment and BigBird's random attention draw from NumPy inside the forward pass. Reading Python's and NumPy's
    takes about 50 microseconds, torch's one, so where many states are kept they are left out (`None`).
    """

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None
    host: tuple | None

    @classmethod
    def capture(cls, device: torch.device, host: bool = True) -> "RandomState":
        """The states now; `device` is where the model lives, `host` asks for Python's and NumPy's, too."""
        accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        own = (random.getstate(), np.random.get_state()) if host else None
        return cls(device, torch.get_rng_state(), accelerator, own)

    def restore(self, host: bool = True) -> None:
        """Set every generator to the captured state, those of Python and NumPy if `host`."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)
        if host and self.host is not None:
            random.setstate(self.host[0])
            np.random.set_state(self.host[1])

    def same_host_state(self, other: "RandomState") -> bool:
        """Whether Python's and NumPy's generators stand where they stood at `other`."""
        mine, theirs = self.host or ((), ()), other.host or ((), ())
        return mine[0] == theirs[0] and all(map(np.array_equal, mine[1], theirs[1]))


class Attributes(NamedTuple):
    """A few attributes of an object, of which nothing else is held."""

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


class Kind(NamedTuple):
    """A kind of things: `copy` what one holds now, tell whether it still holds the `same`, and `put` that back."""

    copy: Callable[[Any], Any]
    same: Callable[[Any, Any], bool]
    put: Callable[[Any, Any], object]


def version_of(tensor: Tensor) -> int:
    """Its version counter, which operations in place count up; a tensor of inference mode has none."""
    return 0 if tensor.is_inference() else tensor._version


def stamp_of(tensor: Tensor) -> tuple:
    """Another one where the tensor was changed, but for changes through `.data`."""
    return version_of(tensor), tensor.data_ptr(), tensor.shape


def mark_of(thing: Any) -> Any:
    """What can be seen of a file, an iterator or another object that is not held: another one where it changed."""
    if inspect.isgenerator(thing):
        frame = thing.gi_frame
        return frame and (frame.f_lasti, *map(id, frame.f_locals.values()))
    if isinstance(thing, io.IOBase):
        # Closed, a pipe, or a file that is being iterated over.
        with contextlib.suppress(OSError, ValueError):
            return thing.tell()
        return None
    plain = [value for value in getattr(thing, "__dict__", {}).values() if isinstance(value, (int, float, str))]
    count = repr(thing) if type(thing).__module__ == "itertools" else None
    return plain, count, thing.__length_hint__() if hasattr(thing, "__length_hint__") else None


def _same(items: Collection, kept: Collection) -> bool:
    return len(items) == len(kept) and all(map(operator.is_, items, kept))


def _same_mapping(mapping: dict, kept: dict) -> bool:
    return list(mapping) == list(kept) and _same(mapping.values(), kept.values())


def _put_mapping(mapping: dict, kept: dict) -> None:
    """Mappings may be of a class that forbids writing, so only what has changed is written."""
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
    """The attributes that the class of `module` has set, without its parameters, buffers and parts."""
    return {name: value for name, value in vars(module).items() if name not in _OWN_OF_MODULES}


def _tables_of(module: nn.Module) -> dict[str, dict]:
    """Its attributes, buffers, weights and hooks; those of a class of torch's own are not for others to put back."""
    is_users = not type(module).__module__.startswith("torch.")
    tables = {name: table for name, table in vars(module).items() if name in _TABLES}
    if any(isinstance(parameter, DTensor) for parameter in module._parameters.values()):
        # FSDP2 changes them as it gathers weights and lets go of them.
        del tables["_parameters"]
    return {"": attributes_of(module) if is_users else {}, **tables}


def _same_module(module: nn.Module, kept: dict[str, dict]) -> bool:
    return all(_same_mapping(table, kept[name]) for name, table in _tables_of(module).items() if name in kept)


def _put_module(module: nn.Module, kept: dict[str, dict]) -> None:
    tables = _tables_of(module)
    for name in tables.keys() & kept.keys() - {""}:
        _put_mapping(tables[name], kept[name])
    for name in tables[""].keys() - kept[""].keys():
        del vars(module)[name]
    vars(module).update(kept[""])


def _same_tensor(tensor: Tensor, kept: tuple[Tensor, Tensor, tuple]) -> bool:
    # Through `.data`, values change and the version does not. Where a pass writes the same values, another may not.
    return stamp_of(tensor) == kept[2] and torch.equal(tensor, kept[1])


@torch.no_grad()
def put_tensors(tensors: Sequence[Tensor], kept: Sequence[tuple[Tensor, Tensor, tuple]]) -> None:
    """Put all of them back, changed or not: to compare them would be to wait for the device."""
    for tensor, (data, copy, _) in zip(tensors, kept, strict=True):
        if tensor.data_ptr() != data.data_ptr():
            tensor.data = data
        if tensor.shape != copy.shape:
            tensor.resize_(copy.shape)
    if tensors:
        torch._foreach_copy_(list(tensors), [copy for _, copy, _ in kept])


def _never(thing: Any, kept: Any) -> bool:
    return False


MAPPING = Kind(dict, _same_mapping, _put_mapping)
LIST = Kind(list, _same, _put_items)
SET = Kind(list, lambda items, kept: items == set(kept), _put_items)
SLOTS = Kind(Attributes.read, lambda slots, kept: _same_mapping(slots.read(), kept), Attributes.put)
CELL = Kind(
    lambda c: c.cell_contents,
    lambda c, kept: c.cell_contents is kept,
    lambda c, kept: setattr(c, "cell_contents", kept),
)
MODULE = Kind(lambda m: {name: dict(table) for name, table in _tables_of(m).items()}, _same_module, _put_module)
# The copy of a tensor comes with the memory that it was copied from, to go back to where `.data` was set anew.
TENSOR = Kind(
    lambda t: (t.data, t.detach().clone(), stamp_of(t)), _same_tensor, lambda t, kept: put_tensors([t], [kept])
)
ARRAY = Kind(np.copy, lambda array, kept: array.shape == kept.shape and bool(np.all(array == kept)), np.copyto)
KINDS: dict[type, Kind] = {
    dict: MAPPING,
    list: LIST,
    collections.deque: LIST,
    set: SET,
    Attributes: SLOTS,
    types.CellType: CELL,
    np.ndarray: ARRAY,
    random.Random: Kind(random.Random.getstate, _never, random.Random.setstate),
    torch.Generator: Kind(torch.Generator.get_state, _never, torch.Generator.set_state),
    np.random.RandomState: Kind(np.random.RandomState.get_state, _never, np.random.RandomState.set_state),
    np.random.Generator: Kind(
        lambda g: g.bit_generator.state, _never, lambda g, s: setattr(g.bit_generator, "state", s)
    ),
}


def kind_of(thing: Any) -> Kind | None:
    """The kind of `thing` or of what it derives from; `None` for what has none."""
    return next((KINDS[base] for base in type(thing).__mro__ if base in KINDS), None)
