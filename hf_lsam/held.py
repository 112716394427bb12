"""Snapshots of the random states and of objects that a pass may change."""

import random
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from .kinds import LIST, MAPPING, MODULE, SLOTS, TENSOR, Kind, attributes_of, identical, kind_of, put_tensors
from .stamps import stamp_of

logger = logging.get_logger(__name__)


class RandomState(NamedTuple):
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
            return same(self.thing, self.kept) if same else identical(copy(self.thing), self.kept)
        except (RuntimeError, TypeError, ValueError):
            return False


class Snapshot:
    """Copies of objects, and the stamps of tensors and containers that were not copied but are watched for changes."""

    def __init__(self, random: RandomState):
        self.random = random
        self.entries: list[Entry] = []
        self.watched: list[tuple[str, Any, Any]] = []

    def hold(self, name: str, thing: Any, always: bool) -> None:
        """Copy the content of `thing`, if it has a kind and a content."""
        if (kind := kind_of(type(thing))) is not None:  # type: ignore[arg-type]
            try:  # noqa: SIM105, since `suppress` takes as long as most copies
                self.entries.append(Entry(name, thing, kind, kind.copy(thing), always))
            except (LookupError, RuntimeError, TypeError, ValueError):  # an unset variable
                pass

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
