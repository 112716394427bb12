"""Finds what a pass may change, and copies it: all of it at some steps, and what may have changed at the others."""

import copyreg
import io
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from .bulk import Bulk
from .given import (
    is_opened,
    is_used_by_threads,
    is_users,
    is_users_callable,
    is_users_function,
    parts_of,
    users_among,
    variables_of,
)
from .held import RandomState, Snapshot
from .kinds import HOOKS, Attributes, attributes_of, kind_of
from .shards import compute_device, is_sharded
from .stamps import PLAIN, stamp_of
from .structure import Structure

logger = logging.get_logger(__name__)

_NAMES = (*PLAIN, tuple)
_MOST_BYTES = 2**30  # of the copies of tensors that have not changed so far; further ones are only watched
_SMALL = 1024  # entries of a tensor up to which it is always copied, if it belongs to no module
_LARGE = 64  # items of a container above which it is not visited item by item
# What is in a large container is looked at in every step once it has changed, and before: containers up to this many
# items in total, and objects that are neither containers nor of users' classes up to this many.
_MOST_VALUES, _MOST_OTHERS = 10**5, 1000


class _Traits(NamedTuple):
    """What the objects of a class are, since to ask each one takes twice as long."""

    is_module: bool
    is_tensor: bool
    is_class: bool
    is_held: bool  # whether it has a kind, so that its content is copied
    is_container: bool
    is_opened: bool  # whether its attributes are copied
    is_iterator: bool
    parts: Callable[[Any], Iterable[Any]] | None  # see `parts_of`


@lru_cache(1024)
def _traits_of(kind: type) -> _Traits | None:
    """The traits of a class; `None` if in its objects there is nothing to copy or to visit."""
    traits = _Traits(
        is_module=issubclass(kind, nn.Module),
        is_tensor=issubclass(kind, Tensor),
        is_class=issubclass(kind, type),
        is_held=kind_of(kind) is not None,
        is_container=issubclass(kind, (dict, list, tuple, deque, set, frozenset)),
        is_opened=is_opened(kind),
        is_iterator=issubclass(kind, io.IOBase) or hasattr(kind, "__next__"),
        parts=parts_of(kind),
    )
    return traits if any(traits) and not issubclass(kind, PLAIN) else None


class Visitor:
    """Visits the modules of a model and other objects, to any depth, and copies what it finds into a snapshot.

    A copy of everything at each step would be too slow, so the class learns what changes. At perturbed steps 1, 2, 4,
    8, ..., and after a change of the modules, everything is copied. At the others, it copies only what changed before
    or is new, what other objects than modules and users' modules refer to, small tensors, and the tables of a module's
    tensors. Other tensors are watched by their version counters. What is in large containers is copied in bulk, up to
    `_MOST_VALUES` and `_MOST_OTHERS`.
    """

    def __init__(self, structure: Structure, is_trained: Callable[[Tensor], bool]):
        self.structure, self.is_trained = structure, is_trained
        self.device = compute_device(next(structure.model.parameters()))
        self.steps = 0  # number of perturbed steps, this one included
        self.foreign: list[Tensor] = []  # parameters that another optimizer trains, such as those of a critic
        self._changing: dict[int, tuple[str, Any]] = {}  # by id: what is copied at every step
        self._known: dict[int, weakref.ref] = {}  # by id: modules that were visited, and tensors that did not change
        self._bulks: dict[str, Bulk] = {}  # by name of a large container: what is in it
        self._of_modules: dict[int, tuple[str, Tensor]] = {}  # by id: names and tensors of modules
        self._lasting: set[int] = set()  # ids of what was found in modules, and may not be visited in this step
        self._users_modules: list[tuple[str, nn.Module]] = []  # with names: of users' classes, and outermost ones
        self._users_hooks: list[tuple[str, Any]] = []  # names and hooks of modules
        self._unheld: dict[str, Any] = {}  # by name: objects that cannot be copied
        self._version = structure.version  # at the last visit
        self.copies_all = True  # whether the last snapshot has everything

    def _begin(self) -> None:
        """Begin a snapshot."""
        self._now, self._seen, self._bytes = Snapshot(RandomState.capture(self.device)), set[int](), 0
        former, self._version = self._version, self.structure.look()
        self.copies_all = self.steps & (self.steps - 1) == 0 or self._version != former
        self._within: Bulk | None = None  # the large container that is visited
        self._bulk_of: dict[int, Bulk] = {}  # by id of what was copied: the large container it is in
        if self.copies_all:
            self._known, self._of_modules, self._unheld, self.foreign = {}, {}, {}, []
            self._users_modules, self._users_hooks, self._lasting = [], [], set()

    def _visit_model(self) -> None:
        self._in_model, self._in_module = True, False
        self._visit("model", self.structure.model)
        self._in_model = False
        if not self.copies_all:
            for name, module in self._users_modules:
                self._hold(name, vars(module))  # all attributes, since to leave some out takes 5 times as long
                self._visit_attributes(name, module)
            self._visit_all("", self._users_hooks, "{}")

    def _hold(self, name: str, thing: Any, always: bool = False) -> None:
        """Copy `thing`; a tensor, or what is in a module or a large container, is kept only if pass 1 changes it."""
        self._seen.add(id(thing))
        if self._in_module:
            self._lasting.add(id(thing))
        if self._within is not None:
            self._bulk_of[id(thing)] = self._within
        is_compared = self._in_module or self._within is not None or isinstance(thing, (Tensor, np.ndarray, Bulk))
        is_compared = is_compared and id(thing) not in self._changing
        self._now.hold(name, thing, always or not is_compared)

    def _visit_all(self, name: str, parts: Iterable[tuple[Any, Any]], place: str = ".{}") -> None:
        """Visit `parts`, pairs of a key and an object, whose name is `name` and the key, formatted by `place`."""
        for key, part in parts:
            if isinstance(part, PLAIN) or id(part) in self._seen:
                continue
            # Not the text of other keys: that of a tensor takes long, and synchronises with its device.
            part_name = name + place.format(key if isinstance(key, _NAMES) else type(key))
            try:
                self._visit(part_name, part)
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                # Code of the object may run when its attributes are read; its errors must not end the training.
                logger.warning_once(f"{part_name} cannot be read, so it is not restored after pass 2: {error}.")

    def _visit(self, name: str, thing: Any) -> None:
        """Copy `thing`, and visit what it refers to."""
        of = _traits_of(type(thing))  # type: ignore[arg-type]
        if of is None:
            return
        if of.is_module:
            if not self._is_known(thing):
                self._visit_module(name, thing)
            return
        if of.is_tensor and not thing.is_leaf:
            if self._within is not None:
                self._within.has_graph = True
            return
        self._seen.add(id(thing))
        if of.is_tensor:
            self._visit_tensor(name, thing)
            return
        if of.is_class:
            if is_users(thing.__module__):
                self._hold(name, thing)
                self._visit_all(name, [(k, value) for k, value in vars(thing).items() if not k.startswith("__")])
            return
        if is_users_function(thing):
            for variables in variables_of(thing):
                self._hold("globals", variables)
                self._visit_all("", variables.read().items(), "{}")
        if of.is_held and (not isinstance(thing, np.ndarray) or thing.size <= _SMALL or self._is_due(thing)):
            self._hold(name, thing)
        if of.is_container:
            self._visit_items(name, thing)
        if of.is_opened:
            self._visit_object(name, thing)
        elif of.parts is not None:
            self._visit_all(name, enumerate(of.parts(thing)), "")
        if of.is_iterator and not of.is_held:
            self._unheld[name] = thing

    def _visit_object(self, name: str, thing: Any) -> None:
        """Copy and visit the attributes of an object, and those of its users' classes."""
        own = getattr(thing, "__dict__", {})
        if is_used_by_threads(own):
            self._unheld[name] = thing
            return
        slots = Attributes(thing, tuple(copyreg._slotnames(type(thing))))  # type: ignore[attr-defined]
        for held in [slots] * bool(slots.names) + [own] * hasattr(thing, "__dict__"):
            self._hold(name, held)
        self._visit_all(name, [*slots.read().items(), *own.items()])
        self._visit_all(name, enumerate(users_among(type(thing).__mro__)), "")

    def _visit_items(self, name: str, thing: Any) -> None:
        """Visit the items of a container, and its keys."""
        if len(thing) > _LARGE:
            self._visit_many(name, thing)
            return
        items: Iterable = thing.items() if isinstance(thing, dict) else enumerate(thing)
        self._visit_all(name, [*items], "[{!r}]")
        self._visit_all(name, enumerate(thing if isinstance(thing, dict) else ()), " key {}")

    def _visit_many(self, name: str, owner: Any) -> None:
        """Copy the containers and objects in a large container in bulk, watch its tensors, and visit all else."""
        bulk = self._bulks.get(name)
        if bulk is None or bulk.owner is not owner:
            bulk = self._bulks[name] = Bulk(owner)
        former = {*map(id, bulk.tensors)}
        copies_all = self.copies_all or bulk.changes
        bulk.look(self._seen, math.inf if copies_all or id(bulk) in self._changing else _MOST_VALUES)
        self._hold(name, bulk)
        outer, self._within = self._within, bulk
        if copies_all or len(bulk.others) <= _MOST_OTHERS:
            self._visit_all(name, enumerate(bulk.others), " item {}")
        watched = [] if copies_all else [tensor for tensor in bulk.tensors if id(tensor) in former]
        copied = bulk.tensors if copies_all else [tensor for tensor in bulk.tensors if id(tensor) not in former]
        self._now.watched.append((name, watched, stamp_of(watched)))
        self._visit_all(name, enumerate(copied), " tensor {}")
        self._within = outer

    def _visit_module(self, name: str, module: nn.Module) -> None:
        """Visit its tensors, its submodules, and the attributes that a user's class has set."""
        self._known[id(module)] = weakref.ref(module)
        outer, self._in_module = self._in_module, True
        self._visit_all(name, [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)])
        self._visit_all(name, module.named_children())
        if not isinstance(module, torch.jit.ScriptModule):
            self._hold_table(f"{name}._buffers", module._buffers, bool(module._buffers))
            weights = [weight for weight in module._parameters.values() if weight is not None]
            if not is_sharded(weights):  # FSDP2 changes the table whenever it gathers or frees the weights
                self._hold_table(f"{name}._parameters", module._parameters, not all(map(self.is_trained, weights)))
            if is_users(type(module).__module__) or not outer:
                self._users_modules.append((name, module))
            self._hold(name, module)
            self._visit_attributes(name, module)
            tables = [*(vars(module).get(table) for table in HOOKS), *(weight._backward_hooks for weight in weights)]
            hooks = [hook for table in tables if table for hook in table.values() if is_users_callable(hook)]
            self._users_hooks += [(f"{name} hook {place}", hook) for place, hook in enumerate(hooks)]
            self._visit_all(name, enumerate(hooks), " hook {}")
        self._in_module = outer

    def _visit_attributes(self, name: str, module: nn.Module) -> None:
        self._visit_all(name, attributes_of(module).items())
        self._visit_all(name, enumerate(users_among(type(module).__mro__)), "")

    def _hold_table(self, name: str, table: dict, always: bool) -> None:
        if always:
            self._changing[id(table)] = (name, table)
        self._hold(name, table)

    def _visit_tensor(self, name: str, tensor: Tensor) -> None:
        if self.is_trained(tensor) or isinstance(tensor, DTensor):
            return
        # The entries of an expanded tensor share memory, so they cannot be written.
        if (
            tensor.is_meta
            or tensor.is_sparse
            or tensor.is_inference()
            or (0 in tensor.stride() and tensor.numel() > 1)
        ):
            return
        if tensor.requires_grad:
            self.foreign.append(tensor)
        is_small = tensor.numel() <= _SMALL and not (self._in_model and isinstance(tensor, nn.Parameter))
        if self._in_module:
            self._of_modules[id(tensor)] = (name, tensor)
            self._lasting.add(id(tensor))
            if is_small:
                self._changing[id(tensor)] = (name, tensor)
        if is_small or self._is_due(tensor):
            # A small one is restored without a comparison, which would synchronise with the device.
            self._hold(name, tensor, always=is_small and not self.copies_all)
        else:
            self._now.watched.append((name, tensor, stamp_of(tensor)))

    def _is_due(self, thing: Tensor | np.ndarray) -> bool:
        """Whether a large tensor or array is to be copied: if it has changed before, or is new."""
        if id(thing) in self._changing:
            return True
        self._bytes += thing.nbytes
        return self._bytes <= _MOST_BYTES and not self._is_known(thing)

    def _is_known(self, thing: Any) -> bool:
        return id(thing) in self._known and self._known[id(thing)]() is thing
