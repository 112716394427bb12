"""Things that a pass may change: how each kind of them is copied, compared with its copy, and put back."""

import array
import collections
import contextlib
import inspect
import io
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

logger = logging.get_logger(__name__)

# What every module has, and what is set on one for the length of a pass; of that, tables of hooks.
_OWN_OF_MODULES = {*vars(nn.Module()), "forward", "_compiled_call_impl"}
_HOOKS = [name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict)]


@dataclass(frozen=True)
class RandomState:
    """
    States of torch's generators, on the CPU and on the model's device, and of those of Python and NumPy.

    To read NumPy's takes 50 times as long as torch's: where many are kept, those of the host are left out (`None`).
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
        mine, theirs = ((s[0], s[1][1].tobytes(), s[1][2:]) for s in (self.host, other.host) if s is not None)
        return mine == theirs


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


@dataclass(frozen=True, eq=False)
class Kind:
    """
    A kind of things: how to `copy` what one holds now, and to `put` that back.

    `same`, by default a new copy of the same objects, tells whether it still holds that: a generator's state never is.
    """

    copy: Callable[[Any], Any]
    put: Callable[[Any, Any], object]
    same: Callable[[Any, Any], bool] | None = None


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


def _identical(now: Any, kept: Any) -> bool:
    if isinstance(kept, dict):
        return list(now) == list(kept) and all(map(operator.is_, now.values(), kept.values()))
    return all(map(operator.is_, now, kept)) and len(now) == len(kept) if isinstance(kept, list) else now is kept


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
    """What its class has set, but for parameters, buffers and parts; nothing where that is a class of torch's own."""
    is_torchs = type(module).__module__.startswith("torch.")
    return {} if is_torchs else {name: value for name, value in vars(module).items() if name not in _OWN_OF_MODULES}


def _copy_module(module: nn.Module) -> dict[Any, Any]:
    """Its attributes by name, and its hooks by table and key."""
    hooks = {(table, key): hook for table in _HOOKS for key, hook in vars(module).get(table, {}).items()}
    return attributes_of(module) | hooks


def _put_module(module: nn.Module, kept: dict[Any, Any]) -> None:
    own, attributes = vars(module), {name: value for name, value in kept.items() if isinstance(name, str)}
    for name in attributes_of(module).keys() - attributes.keys():
        del own[name]
    own.update(attributes)
    for table in _HOOKS:
        hooks = [(name[1], hook) for name, hook in kept.items() if name not in attributes and name[0] == table]
        _put_mapping(own.get(table, {}), dict(hooks))


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


MAPPING, LIST, SLOTS = Kind(dict, _put_mapping), Kind(list, _put_items), Kind(Attributes.read, Attributes.put)
MODULE, SLICE = (
    Kind(_copy_module, _put_module),
    Kind(operator.itemgetter(slice(None)), lambda s, kept: s.__setitem__(slice(None), kept)),
)
# The copy of a tensor comes with the memory that it was copied from, to go back to where `.data` was set anew. Through
# `.data`, values change and the version does not. Where a pass writes the same values, another may not.
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
    bytearray: SLICE,
    array.array: SLICE,
    Attributes: SLOTS,
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
    """The kind of `thing` or of what it derives from; `None` for what has none."""
    return KINDS.get(type(thing)) or next((KINDS[base] for base in type(thing).__mro__ if base in KINDS), None)


class Entry(NamedTuple):
    """Something that may change, and what it held; `always`: it is put back without asking whether it changed."""

    name: str
    thing: Any
    kind: Kind
    kept: Any
    always: bool

    def is_same(self) -> bool:
        """Whether it holds that still; not where it cannot be told, as of arrays of arrays."""
        try:
            same, copy = self.kind.same, self.kind.copy
            return same(self.thing, self.kept) if same else _identical(copy(self.thing), self.kept)
        except (RuntimeError, TypeError, ValueError):
            return False


class Snapshot:
    """What can be put back, and tensors that were not copied, each with a stamp that tells whether it changed."""

    def __init__(self, random: RandomState):
        self.random = random
        self.entries: list[Entry] = []
        self.watched: list[tuple[str, Tensor, tuple]] = []

    def hold(self, name: str, thing: Any, always: bool) -> None:
        """Copy `thing`, if it is of a kind and has something to copy: not a closure's variable that is not set."""
        if (kind := kind_of(thing)) is not None:
            with contextlib.suppress(RuntimeError, TypeError, ValueError):
                self.entries.append(Entry(name, thing, kind, kind.copy(thing), always))

    def later(self, random: RandomState) -> "Snapshot":
        """What the same things hold now."""
        now = Snapshot(random)
        for entry in self.entries:
            now.hold(entry.name, entry.thing, entry.always)
        return now

    def take_again(self, tensors: Iterable[Tensor]) -> None:
        """Note some tensors as they are now: buffers that DistributedDataParallel has sent, for instance."""
        wanted = set(map(id, tensors))
        self.entries = [e._replace(kept=e.kind.copy(e.thing)) if id(e.thing) in wanted else e for e in self.entries]
        self.watched = [(n, t, stamp_of(t) if id(t) in wanted else stamp) for n, t, stamp in self.watched]

    def touched(self) -> set[tuple]:
        """What has been set since: names of containers and objects, and keys within; not what was mutated."""
        touched: set[tuple] = set()
        for name, thing, kind, kept, _ in self.entries:
            if kind is LIST:
                touched.update((name, i) for i, item in enumerate(thing) if i >= len(kept) or item is not kept[i])
            elif kind in (MAPPING, SLOTS, MODULE):
                # Hooks of modules have a new key each time.
                now = attributes_of(thing) if kind is MODULE else kind.copy(thing)
                touched.update((name, key) for key in now if key not in kept or now[key] is not kept[key])
        return touched

    def put(self, host: bool = True) -> None:
        """Put everything back, the states of Python's and NumPy's generators if `host`."""
        tensors = [entry for entry in self.entries if entry.kind is TENSOR]
        put_tensors([entry.thing for entry in tensors], [entry.kept for entry in tensors])
        for entry in self.entries:
            if entry.kind is not TENSOR and not entry.is_same():
                try:
                    entry.kind.put(entry.thing, entry.kept)
                except (AttributeError, TypeError, ValueError, RuntimeError) as error:
                    logger.warning_once(f"{entry.name} changes in both passes, since it cannot be put back: {error}.")
        self.random.restore(host)
