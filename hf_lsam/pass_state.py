"""What a pass reads and what it leaves: noted before pass 1, put back before pass 2, and after it."""

import concurrent.futures
import contextlib
import functools
import io
import queue
import sys
import threading
import types
import weakref
from collections import UserDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset
from transformers.utils import logging

from .held import (
    ARRAY,
    LIST,
    MAPPING,
    MODULE,
    SLOTS,
    TENSOR,
    Attributes,
    Kind,
    RandomState,
    attributes_of,
    kind_of,
    mark_of,
    put_tensors,
    stamp_of,
)
from .shards import compute_device, is_sharded

logger = logging.get_logger(__name__)

# Objects of these are not opened: no user counts in them.
_LIBRARIES = {
    *sys.stdlib_module_names,
    *("accelerate", "datasets", "evaluate", "hf_lsam", "huggingface_hub", "matplotlib", "numpy", "pandas", "PIL"),
    *("pyarrow", "scipy", "sklearn", "tokenizers", "torch", "tqdm", "transformers", "wandb"),
}
# What a Trainer and its state hold that no pass changes.
_LEFT_OUT = {"args", "accelerator", "optimizer", "lr_scheduler", "train_dataset", "eval_dataset", "log_history"}
_PLAIN = (int, float, complex, str, bytes, type(None), np.generic, torch.dtype, torch.device, torch.Size, type)
# An object that holds one of these is used by other threads, too: it is not to be put back.
_LOCKS = (threading.Condition, threading.Event, type(threading.Lock()), type(threading.RLock()))
_THREADS = (*_LOCKS, threading.Thread, queue.Queue, concurrent.futures.Executor)
# Tensors are copied, to see whether they change, up to so many bytes together; the others are watched.
_MOST_BYTES = 2**30
# A tensor of up to so many entries is always copied, if it is no module's.
_SMALL = 1024
# What lies in a container of more than these is visited only where it is not what was in it before.
_LARGE = 64


class Entry(NamedTuple):
    """Something that may change, and what it held; `always` tells whether it is noted at every step."""

    name: str
    thing: Any
    kind: Kind
    kept: Any
    always: bool

    def is_same(self) -> bool:
        """Whether it holds that still; not where it cannot be told, as of arrays of arrays."""
        try:
            return self.kind.same(self.thing, self.kept)
        except (RuntimeError, TypeError, ValueError):
            return False


class Snapshot:
    """What can be put back, and tensors that were not copied, each with a stamp that tells whether it changed."""

    def __init__(self, random: RandomState):
        self.random = random
        self.entries: list[Entry] = []
        self.watched: list[tuple[str, Tensor, tuple]] = []

    def hold(self, name: str, thing: Any, kind: Kind, always: bool) -> None:
        """Copy `thing`, unless it has nothing to copy, as a closure's variable that is not set."""
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            self.entries.append(Entry(name, thing, kind, kind.copy(thing), always))

    def later(self, random: RandomState) -> "Snapshot":
        """What the same things hold now."""
        now = Snapshot(random)
        for entry in self.entries:
            now.hold(entry.name, entry.thing, entry.kind, entry.always)
        return now

    def take_again(self, tensors: Iterable[Tensor]) -> None:
        """Note some tensors as they are now: buffers that DistributedDataParallel has sent, for instance."""
        wanted = set(map(id, tensors))
        self.entries = [e._replace(kept=e.kind.copy(e.thing)) if id(e.thing) in wanted else e for e in self.entries]
        self.watched = [(n, t, stamp_of(t) if id(t) in wanted else stamp) for n, t, stamp in self.watched]

    def touched(self) -> set[tuple]:
        """What has been set since: names of containers and objects, and keys within; not what was mutated."""
        pairs: list[tuple[str, dict, dict]] = []
        for name, thing, kind, kept, _ in self.entries:
            if kind in (MAPPING, SLOTS):
                pairs.append((name, kind.copy(thing), kept))
            elif kind is LIST:
                pairs.append((name, dict(enumerate(thing)), dict(enumerate(kept))))
            elif kind is MODULE:
                # Hooks have a new key each time.
                tables = [table for table in kept if "hooks" not in table]
                pairs += [(f"{name} {table}", kind.copy(thing).get(table, {}), kept[table]) for table in tables]
        return {(n, key) for n, now, kept in pairs for key in now if key not in kept or now[key] is not kept[key]}

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


class PassState:
    """
    Holds what passes read and leave, but for the weights that are trained and their gradients.

    That is the random states; of the model, and of other modules, the buffers, the weights that are not trained, and
    the attributes that users' classes set; whatever else lies in `roots`, to any depth: attributes of users' objects,
    containers, arrays, tensors, generators, optimizers. Not what libraries keep, and not what other threads use too.

    To copy all of it takes time and memory, so what changes is learnt. At the 1st, 2nd, 4th, 8th, ... step everything
    is copied, and compared after pass 1. At the others that is done with what was seen to change and what is new.
    Containers of `roots`, small tensors, and which tensors a module has are always noted; version counters tell of
    changes of the other tensors.

    Args:
        roots: What to look through, by the names that a user knows.
        is_trained: Whether the optimizer trains a parameter, be it frozen for now or not.

    Attributes:
        steps: How many steps were begun, this one included.
        foreign: Parameters that somebody else trains, as those of a critic: their gradients are put back, too.
    """

    def __init__(self, model: nn.Module, roots: Callable[[], Mapping[str, Any]], is_trained: Callable[[Tensor], bool]):
        self.model, self.roots, self.is_trained = model, roots, is_trained
        self.device = compute_device(next(model.parameters()))
        self.steps = 0
        self.foreign: list[Tensor] = []
        # What the micro-batches of this step began with, and what the last one left.
        self._window: list[Snapshot] = []
        self._changing: dict[int, tuple[str, Any, Kind]] = {}
        self._unchanged: dict[int, weakref.ref] = {}
        self._contents: dict[str, list[int]] = {}
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        # Of all modules: their tensors by name, and what is always noted, which is where they lie and the small ones.
        self._module_tensors: list[tuple[str, Tensor]] = []
        self._always: list[tuple[str, Any, Kind]] = []
        # What the last look has copied and has not seen to change.
        self._looked: list[Entry] = []
        self._unheld: dict[str, Any] = {}
        self._told: set[str] = set()

    def begin_step(self) -> None:
        """To be called before the first micro-batch of a step that is to be perturbed."""
        self.steps += 1
        self._window = []

    @property
    def looks(self) -> bool:
        """Whether everything is copied in this step."""
        return self.steps & (self.steps - 1) == 0

    def before_pass_1(self) -> Snapshot:
        """What there is before pass 1."""
        return self._snapshot(self.looks)

    def after_pass_1(self, random: RandomState) -> Snapshot:
        """What pass 1 has left, of all that its last micro-batch began with. (What is new, pass 2 makes anew.)"""
        after = self._window[-1].later(random)
        self._window.append(after)
        return after

    def learn(self, before: Snapshot) -> str | None:
        """
        After pass 1, leave in `before` only what changed, and what is always noted.

        Returns:
            The name of something that changed and was not copied, if there is any. From now on it is.
        """
        unseen = None
        for name, tensor, stamp in before.watched:
            if stamp_of(tensor) != stamp:
                unseen = unseen or name
                self._changing[id(tensor)] = (name, tensor, TENSOR)
        kept, self._looked = [], []
        for entry in before.entries:
            thing = entry.thing
            if not entry.always and id(thing) not in self._changing:
                if entry.is_same():
                    if isinstance(thing, (Tensor, np.ndarray)):
                        self._unchanged[id(thing)] = weakref.ref(thing)
                    self._looked.append(entry)
                    continue
                self._note_change(entry)
            kept.append(entry)
        before.entries, before.watched = kept, []
        self._window.append(before)
        return unseen

    def settle(self) -> None:
        """After pass 2, put back what only pass 2 changed: a teacher that was its student at first."""
        changed = [entry for entry in self._looked if not entry.is_same()]
        for entry in changed:
            self._looked.remove(entry)
            entry.kind.put(entry.thing, entry.kept)
            self._note_change(entry)

    def _note_change(self, entry: Entry) -> None:
        """It is held from now on. Before the former micro-batches of this step it was what it was before this one."""
        self._changing[id(entry.thing)] = entry[:3]
        for former in self._window:
            former.entries.append(entry)

    def marks(self) -> dict[str, Any]:
        """What can be seen of things that are not held."""
        return {name: mark_of(thing) for name, thing in self._unheld.items()}

    def tell_changes(self, marks: dict[str, Any]) -> None:
        """Warn of things that are not held and have changed since `marks`, once by each name."""
        for name, thing in self._unheld.items():
            if name in marks and name not in self._told and mark_of(thing) != marks[name]:
                self._told.add(name)
                logger.warning(
                    f"{name} changes in pass 2 as it did in pass 1, and a {type(thing).__name__} cannot be put back. "
                    "Change it in pass 1 only: if not trainer.in_second_pass."
                )

    def _snapshot(self, look: bool) -> Snapshot:
        """With `look` of everything."""
        self._in_module, self._bytes = False, 0
        self._now = Snapshot(RandomState.capture(self.device))
        self._seen: set[int] = set()
        if look:
            self._unchanged, self._contents, self._modules = {}, {}, weakref.WeakSet()
            self.foreign, self._unheld, self._module_tensors, self._always = [], {}, [], []
        self._in_model = True
        self._visit("model", self.model)
        self._in_model = False
        for name, root in self.roots().items():
            if isinstance(root, Attributes):
                self._hold(name, root, SLOTS)
            else:
                # The object itself may be of a library. What is left out is so wherever else it lies, too.
                out = [value for key, value in vars(root).items() if key in _LEFT_OUT]
                self._seen.update(map(id, [root, *out, *(getattr(value, "optimizer", None) for value in out)]))
                self._hold(name, vars(root), MAPPING)
                own = {k: v for k, v in vars(root).items() if k not in _LEFT_OUT and not k.startswith("_lsam")}
                self._visit_all((f"{name}.{key}", value) for key, value in own.items())
        for name, thing, kind in self._always:
            if id(thing) not in self._seen:
                self._hold(name, thing, kind, always=True)
        if look:
            self._changing = {place: entry for place, entry in self._changing.items() if place in self._seen}
        else:
            for name, thing, kind in list(self._changing.values()):
                if id(thing) not in self._seen:
                    self._hold(name, thing, kind)
            watched = [(n, t) for n, t in self._module_tensors if id(t) not in self._seen]
            self._now.watched += [(name, tensor, stamp_of(tensor)) for name, tensor in watched]
        return self._now

    def _hold(self, name: str, thing: Any, kind: Kind, always: bool = False) -> None:
        self._seen.add(id(thing))
        always = always or not (self._in_module or isinstance(thing, (Tensor, np.ndarray, nn.Module)))
        self._now.hold(name, thing, kind, always)

    def _visit_all(self, named: Iterable[tuple[str, Any]]) -> None:
        for name, thing in named:
            if not isinstance(thing, _PLAIN) and id(thing) not in self._seen:
                try:
                    self._visit(name, thing)
                except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                    # Another's object may do as it likes when it is looked at, which must end no training.
                    logger.warning_once(f"{name} cannot be looked at, and is not put back after pass 2: {error}.")

    def _visit(self, name: str, thing: Any) -> None:
        """Hold `thing`, and visit what lies in it."""
        if isinstance(thing, Tensor):
            self._visit_tensor(name, thing)
            return
        if isinstance(thing, nn.Module):
            self._visit_module(name, thing)
            return
        self._seen.add(id(thing))
        if isinstance(thing, np.ndarray):
            if self._is_due(thing, thing.size):
                self._hold(name, thing, ARRAY)
            return
        if (kind := kind_of(thing)) is not None:
            self._hold(name, thing, kind)
        if isinstance(thing, (dict, list, tuple, deque)):
            values = thing.values() if isinstance(thing, dict) else thing
            if len(thing) > _LARGE:
                content = [id(thing), *map(id, values)]
                if self._contents.get(name) == content:
                    return
                self._contents[name] = content
            keys = list(thing) if isinstance(thing, dict) else range(len(thing))
            self._visit_all((f"{name}[{key!r}]", value) for key, value in zip(keys, list(values), strict=True))
        if _is_opened(thing):
            self._visit_object(name, thing)
        else:
            self._visit_all((name, part) for part in _parts(thing))
        if kind is None and (isinstance(thing, io.IOBase) or hasattr(thing, "__next__")):
            self._unheld[name] = thing

    def _visit_object(self, name: str, thing: Any) -> None:
        attributes = getattr(thing, "__dict__", {})
        if any(isinstance(value, _THREADS) for value in attributes.values()):
            self._unheld[name] = thing
            return
        slots = Attributes(thing, tuple(s for c in type(thing).__mro__ for s in vars(c).get("__slots__", ())))
        if slots.names:
            self._hold(name, slots, SLOTS)
        if attributes:
            self._hold(name, attributes, MAPPING)
        self._visit_all((f"{name}.{key}", value) for key, value in [*slots.read().items(), *attributes.items()])

    def _visit_module(self, name: str, module: nn.Module) -> None:
        """All of a module, if it is time to look or it was not seen before."""
        if module in self._modules or id(module) in self._seen:
            return
        outer, self._in_module = self._in_module, True
        for part_name, part in module.named_modules(prefix=name):
            if id(part) in self._seen:
                continue
            self._modules.add(part)
            self._seen.add(id(part))
            tensors = [*part.named_buffers(recurse=False), *part.named_parameters(recurse=False)]
            untrained = [(k, t) for k, t in tensors if not self.is_trained(t)]
            noted = [pair for pair in untrained if pair[0] in part._buffers or not self._in_model]
            small = [(k, t) for k, t in noted if t.numel() <= _SMALL and id(t) not in self._seen]
            self._always += [(f"{part_name}.{key}", tensor, TENSOR) for key, tensor in small]
            self._visit_all((f"{part_name}.{key}", tensor) for key, tensor in tensors)
            if isinstance(part, torch.jit.ScriptModule):
                continue
            has_untrained = any(key in part._parameters for key, _ in untrained)
            tables = [part._parameters] if has_untrained and not is_sharded(part._parameters.values()) else []
            tables += [part._buffers] if part._buffers else []
            self._always += [(part_name, table, MAPPING) for table in tables]
            self._hold(part_name, part, MODULE)
            if not type(part).__module__.startswith("torch."):
                self._visit_all((f"{part_name}.{key}", value) for key, value in attributes_of(part).items())
        self._in_module = outer

    def _visit_tensor(self, name: str, tensor: Tensor) -> None:
        self._seen.add(id(tensor))
        if not tensor.is_leaf or self.is_trained(tensor):
            return
        if isinstance(tensor, DTensor) or tensor.is_meta or tensor.is_sparse or tensor.is_inference():
            return
        if 0 in tensor.stride() and tensor.numel() > 1:
            # Expanded: its entries share memory, and cannot be written.
            return
        if self._in_module:
            self._module_tensors.append((name, tensor))
        if tensor.requires_grad:
            self.foreign.append(tensor)
        if self._is_due(tensor, tensor.numel()):
            # A small one that is no module's is put back unseen: to compare it would be to wait for the device.
            self._hold(name, tensor, TENSOR, not self._in_module and not self.looks and tensor.numel() <= _SMALL)
        else:
            self._now.watched.append((name, tensor, stamp_of(tensor)))

    def _is_due(self, thing: Tensor | np.ndarray, entries: int) -> bool:
        """Whether a tensor or array is to be copied: if it changes, is small, or was not seen before."""
        if id(thing) in self._changing:
            return True
        self._bytes += thing.nbytes
        is_new = self._unchanged.get(id(thing), lambda: None)() is not thing
        return (entries <= _SMALL and not self._in_module) or (is_new and self._bytes <= _MOST_BYTES)


def _is_opened(thing: Any) -> bool:
    """Whether it is an object of a user's class, whose attributes are held."""
    if isinstance(thing, (Optimizer, LRScheduler, types.SimpleNamespace)):
        return True
    package = type(thing).__module__.partition(".")[0]
    return package not in _LIBRARIES and not isinstance(thing, (type, types.ModuleType, Dataset))


def _parts(thing: Any) -> Iterable[Any]:
    """What lies in a function, or another thing without attributes of its own."""
    if isinstance(thing, types.FunctionType):
        return (*(thing.__closure__ or ()), *(thing.__defaults__ or ()))
    if isinstance(thing, types.MethodType):
        return (thing.__self__,)
    if isinstance(thing, types.CellType):
        return (thing.cell_contents,) if thing != types.CellType() else ()
    if isinstance(thing, functools.partial):
        return (thing.func, *thing.args, *thing.keywords.values())
    if isinstance(thing, UserDict):
        return (thing.data,)
    return ()
