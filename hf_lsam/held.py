"""Snapshots of objects that a pass may change: how each kind is copied, compared with its copy, and restored."""

import array
import collections
import contextlib
import contextvars
import operator
import random
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

from .stamps import differ, stamp_of

logger = logging.get_logger(__name__)

# Attributes that every module has, or that `compile` sets; and those of them that hold hooks.
_OWN_OF_MODULES = {*vars(nn.Module()), "_compiled_call_impl"}
HOOKS = [name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict)]


@dataclass(frozen=True)
class RandomState:
    """States of the random generators: torch's, on the CPU and on the model's device, and Python's and NumPy's."""

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None
    host: tuple | None  # Python's and NumPy's; `None` where many are kept, since reading them takes 50 times as long

    @classmethod
    def capture(cls, device: torch.device, host: bool = True) -> "RandomState":
        """The current states; `device` is that of the model, `host` includes Python's and NumPy's."""
        accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        own = (random.getstate(), np.random.get_state()) if host else None
        return cls(device, torch.get_rng_state(), accelerator, own)

    def restore(self, host: bool = True) -> None:
        """Set the generators to the captured states, Python's and NumPy's only if `host`."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)
        if host and self.host is not None:
            random.setstate(self.host[0])
            np.random.set_state(self.host[1])

    def same_host_state(self, other: "RandomState") -> bool:
        """Whether the states of Python's and NumPy's generators equal those of `other`."""
        mine, theirs = ((s[0], s[1][1].tobytes(), s[1][2:]) for s in (self.host, other.host) if s is not None)
        return mine == theirs


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


# How containers are copied in bulk: the copies equal them.
BULK: dict[type, Callable] = {
    list: list,
    dict: dict,
    set: set,
    collections.deque: collections.deque,
    collections.defaultdict: dict,
    collections.Counter: dict,
}


class Items:
    """The containers in a large container. They are copied and compared in bulk, since one by one takes 20 times as
    long, and only those that differ from their latest copies are copied again.
    """

    def __init__(self, owner: Any):
        self.owner = owner
        self._latest: tuple[list, list] = ([], [])

    def read(self) -> tuple[list, list]:
        """All of them, and their copies."""
        values = self.owner.values() if isinstance(self.owner, dict) else self.owner
        items, (former, copies) = [item for item in values if type(item) in BULK], self._latest
        if len(items) != len(former) or not all(map(operator.is_, items, former)):
            copies = items
        pairs = zip(items, copies, strict=True)
        copies = [BULK[type(item)](item) if item is copy or differ(item, copy) else copy for item, copy in pairs]
        self._latest = items, copies
        return self._latest

    def put(self, kept: tuple[list, list]) -> None:
        """Restore those that have changed."""
        for item, copy in zip(*kept, strict=True):
            if differ(item, copy) and (kind := kind_of(item)) is not None:
                kind.put(item, copy)

    def same(self, kept: tuple[list, list]) -> bool:
        """Whether all equal their copies."""
        return kept[0] == kept[1]


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of object: how its content is copied, compared with the copy, and restored."""

    copy: Callable[[Any], Any]
    put: Callable[[Any, Any], object]  # object, copy
    same: Callable[[Any, Any], bool] | None = None  # object, copy; default: whether a new copy holds identical objects


def _identical(now: Any, kept: Any) -> bool:
    if isinstance(kept, dict):
        return list(now) == list(kept) and all(map(operator.is_, now.values(), kept.values()))
    return all(map(operator.is_, now, kept)) and len(now) == len(kept) if isinstance(kept, list) else now is kept


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


MAPPING, LIST, SLOTS = Kind(dict, _put_mapping), Kind(list, _put_items), Kind(Attributes.read, Attributes.put)
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
    set: Kind(list, _put_items),
    bytearray: Kind(bytes, lambda array, kept: array.__setitem__(slice(None), kept), operator.eq),
    array.array: Kind(lambda array: array[:], lambda array, kept: array.__setitem__(slice(None), kept), operator.eq),
    contextvars.ContextVar: Kind(contextvars.ContextVar.get, contextvars.ContextVar.set),
    Attributes: SLOTS,
    Items: Kind(Items.read, Items.put, Items.same),
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


def kind_of(thing: Any) -> Kind | None:
    """The kind of the class of `thing` or of the first base class that has one, else `None`."""
    return KINDS.get(type(thing)) or next((KINDS[base] for base in type(thing).__mro__ if base in KINDS), None)


class Entry(NamedTuple):
    """An object and the copy of its content; `always`: it stays in the snapshot whether or not pass 1 changes it."""

    name: str
    thing: Any
    kind: Kind
    kept: Any
    always: bool

    def is_same(self) -> bool:
        """Whether the content is unchanged; `False` where the comparison fails, as for arrays of arrays."""
        try:
            same, copy = self.kind.same, self.kind.copy
            return same(self.thing, self.kept) if same else _identical(copy(self.thing), self.kept)
        except (RuntimeError, TypeError, ValueError):
            return False


class Snapshot:
    """Copies of objects, and the stamps of tensors and containers that were not copied but are watched for changes."""

    def __init__(self, random: RandomState):
        self.random = random
        self.entries: list[Entry] = []
        self.watched: list[tuple[str, Any, Any]] = []

    def hold(self, name: str, thing: Any, always: bool) -> None:
        """Copy the content of `thing`, if it has a kind and a content; an unset variable has none."""
        if (kind := kind_of(thing)) is not None:
            with contextlib.suppress(LookupError, RuntimeError, TypeError, ValueError):
                self.entries.append(Entry(name, thing, kind, kind.copy(thing), always))

    def later(self, random: RandomState) -> "Snapshot":
        """A snapshot of the same objects as they are now."""
        now = Snapshot(random)
        for entry in self.entries:
            now.hold(entry.name, entry.thing, entry.always)
        return now

    def refresh(self, tensors: Iterable[Tensor]) -> None:
        """Copy `tensors` again, such as buffers that DistributedDataParallel has broadcast."""
        wanted = set(map(id, tensors))
        self.entries = [e._replace(kept=e.kind.copy(e.thing)) if id(e.thing) in wanted else e for e in self.entries]
        self.watched = [(n, t, stamp_of(t) if id(t) in wanted else stamp) for n, t, stamp in self.watched]

    def assigned(self) -> set[tuple]:
        """The names and keys of items and attributes that were assigned since; not objects that were mutated."""
        assigned: set[tuple] = set()
        for name, thing, kind, kept, _ in self.entries:
            if kind is LIST:
                assigned.update((name, i) for i, item in enumerate(thing) if i >= len(kept) or item is not kept[i])
            elif kind in (MAPPING, SLOTS, MODULE):
                # Hooks of modules are left out, since each registration has a new key.
                now = attributes_of(thing) if kind is MODULE else kind.copy(thing)
                assigned.update((name, key) for key in now if key not in kept or now[key] is not kept[key])
        return assigned

    def put(self, host: bool = True) -> None:
        """Restore everything; the states of Python's and NumPy's generators only if `host`."""
        tensors = [entry for entry in self.entries if entry.kind is TENSOR]
        put_tensors([entry.thing for entry in tensors], [entry.kept for entry in tensors])
        for entry in self.entries:
            if entry.kind is not TENSOR and not entry.is_same():
                try:
                    entry.kind.put(entry.thing, entry.kept)
                except (AttributeError, TypeError, ValueError, RuntimeError) as error:
                    what = f"{entry.name} cannot be restored after pass 1, so both passes change it"
                    logger.warning_once(f"{what}: {error}.")
        self.random.restore(host)
