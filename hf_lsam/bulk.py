"""What is in large containers, to any depth: it is copied and compared together."""

import collections
import copyreg
import io
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from .given import is_opened, is_used_by_threads, users_among
from .kinds import KINDS, Kind, identical, kind_of
from .stamps import PLAIN, are_plain, differ

# How containers are copied in bulk: the copies equal them.
BULK: dict[type, Callable] = {
    list: list,
    dict: dict,
    set: set,
    collections.deque: collections.deque,
    collections.defaultdict: dict,
    collections.Counter: dict,
}
_FIXED = (tuple, frozenset)


class Bulk:
    """What is in a large container. Containers in it are copied and compared together, since one by one takes 20 times
    as long, and only those that differ from their latest copies are copied again.
    """

    def __init__(self, owner: Any):
        self.owner = owner
        self.changes = False  # whether a pass has changed one of its tensors or others
        self.forget()

    def forget(self) -> None:
        """Let go of what is in it, which is to be found again."""
        self.has_graph = False  # whether one of the tensors in it has the graph of a pass
        self.most = 0.0  # see `contents_of`; 0 if its parts are to be found again
        self.tensors: list[Tensor] = []
        self.others: list[Any] = []
        self._kept = Copies([], [], 0, ([], []), [])

    def look(self, seen: Collection[int], most: float) -> None:
        """Find what is in it, if that may have changed; see `contents_of`."""
        self.read()
        if self.most == most and (type(self.owner) in BULK or isinstance(self.owner, _FIXED)):
            return
        self.most = most
        containers, outer, self.tensors, self.others = contents_of(self.owner, seen, most)
        latest = {id(thing): copy for thing, copy in zip(self._kept.containers, self._kept.copies, strict=True)}
        first = containers[:outer]  # without sets, whose copies may have another order
        ordered = [t for t in first if isinstance(t, dict)], [t for t in first if type(t) in (list, collections.deque)]
        now = Copies(containers, [latest.get(id(thing)) for thing in containers], outer, ordered, [])
        self._kept = now._replace(parts=[*now.parts_now()])

    def read(self) -> "Copies":
        """Copies of the containers as they are now."""
        if not self._kept.are_same():
            now, copies = self._kept, [*self._kept.copies]
            for place, thing, _ in now.changed():
                copies[place] = BULK[type(thing)](thing)
                if place < now.outer or not are_plain(thing.values() if isinstance(thing, dict) else thing):
                    self.most = 0.0
            self._kept = now._replace(copies=copies, parts=[*now.parts_now()])
        return self._kept


class Copies(NamedTuple):
    """Containers, and copies of them."""

    containers: list[Any]
    copies: list[Any]
    outer: int  # of the containers, the first ones, in which there are parts: these have to be the same objects
    ordered: tuple[list[dict], list[Any]]  # the outer ones, except sets
    parts: list[Any]  # what was in these

    def parts_now(self) -> Iterator[Any]:
        """What is in the outer containers."""
        values = map(operator.methodcaller("values"), self.ordered[0])
        return itertools.chain.from_iterable(itertools.chain(values, self.ordered[1]))

    def are_same(self) -> bool:
        """Whether all containers equal their copies."""
        return not differ(self.containers, self.copies) and all(map(operator.is_, self.parts_now(), self.parts))

    def changed(self) -> Iterator[tuple[int, Any, Any]]:
        """The containers that differ from their copies, with their places and copies."""
        for place, (thing, copy) in enumerate(zip(self.containers, self.copies, strict=True)):
            if differ(thing, copy) or (place < self.outer and not identical(BULK[type(thing)](thing), copy)):
                yield place, thing, copy

    def put(self) -> None:
        """Restore the containers that differ from their copies."""
        for _, thing, copy in [*self.changed()]:
            if (kind := kind_of(type(thing))) is not None:  # type: ignore[arg-type]
                kind.put(thing, copy)


KINDS[Bulk] = Kind(Bulk.read, lambda _, kept: kept.put(), lambda _, kept: kept.are_same())


def contents_of(owner: Any, seen: Collection[int], most: float) -> tuple[list[Any], int, list[Tensor], list[Any]]:
    """The containers in `owner`, itself included, and how many of the first ones have parts; its tensors; all else.

    Users' objects are looked into, too: their dictionaries are among the containers. What has its id in `seen` is left
    out, and what is deeper than containers with more than `most` items in total.
    """
    containers: list[Any] = []
    outer = 0
    tensors: list[Tensor] = []
    others: list[Any] = []
    found, seen = [owner], {*seen}
    while found and sum(map(len, found)) <= most:
        containers += [thing for thing in found if type(thing) in BULK]
        values = [*itertools.chain.from_iterable(map(_values_of, found))]
        kinds = {*map(type, values)}
        plain = {kind for kind in kinds if issubclass(kind, PLAIN)}
        if plain == kinds:
            break
        outer = len(containers)
        parts = {id(value): value for value in values if type(value) not in plain and id(value) not in seen}
        seen.update(parts)
        objects = {kind for kind in kinds if _is_all_attributes(kind)}
        others += itertools.chain.from_iterable(users_among(kind.__mro__) for kind in objects)
        found = []
        for part in parts.values():
            if type(part) in BULK or isinstance(part, _FIXED):
                found.append(part)
            elif type(part) in objects and not is_used_by_threads(vars(part)):
                found.append(vars(part))
            else:
                (tensors if isinstance(part, Tensor) else others).append(part)
    return containers, outer, tensors, others


def _values_of(container: Any) -> Iterable[Any]:
    return itertools.chain(container.values(), container) if isinstance(container, dict) else container


@lru_cache(1024)
def _is_all_attributes(kind: type) -> bool:
    """Whether the state of an object of a class is in its attributes, and these are copied."""
    has_kind = any(base in KINDS for base in kind.__mro__) or issubclass(kind, (nn.Module, io.IOBase))
    has_slots = bool(copyreg._slotnames(kind)) or not kind.__dictoffset__  # type: ignore[attr-defined]
    return is_opened(kind) and not (has_kind or has_slots)
