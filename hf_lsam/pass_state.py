"""What a pass reads and what it leaves: noted before pass 1, put back before pass 2, and after it."""

import concurrent.futures
import functools
import io
import queue
import sys
import threading
import types
import weakref
from collections import UserDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset
from transformers.utils import logging

from .held import Attributes, Entry, RandomState, Snapshot, attributes_of, kind_of, mark_of, stamp_of
from .shards import compute_device, is_sharded

logger = logging.get_logger(__name__)

# Objects of these are not opened: no user counts in them.
_LIBRARIES = {
    *sys.stdlib_module_names,
    *("accelerate", "datasets", "deepspeed", "evaluate", "hf_lsam", "huggingface_hub", "matplotlib", "numpy"),
    *("pandas", "PIL", "pyarrow", "scipy", "sklearn", "tokenizers", "torch", "tqdm", "transformers", "wandb"),
}
# What a Trainer and its state hold that no pass changes.
_LEFT_OUT = {
    *("args", "accelerator", "deepspeed", "optimizer", "lr_scheduler", "train_dataset", "eval_dataset", "log_history")
}
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


class PassState:
    """
    Holds what passes read and leave, but for the weights that are trained and their gradients.

    That is the random states; of modules, the buffers, the weights that are not trained, and the attributes that
    users' classes set; whatever else lies in `roots`, by the names that a user knows, to any depth. Not what libraries
    keep, and not what other threads use too.

    To copy all of it takes time and memory, so what changes is learnt. At the 1st, 2nd, 4th, 8th, ... step everything
    is copied, and compared after pass 1. At the others that is done with what was seen to change and what is new.
    Containers of `roots`, small tensors, and which tensors a module has are always noted; version counters tell of
    changes of the other tensors.
    """

    def __init__(self, model: nn.Module, roots: Callable[[], Mapping[str, Any]], is_trained: Callable[[Tensor], bool]):
        self.model, self.roots, self.is_trained = model, roots, is_trained
        self.device = compute_device(next(model.parameters()))
        self.steps = 0  # that were begun, this one included
        self.foreign: list[Tensor] = []  # parameters that others train, as those of a critic
        # What the micro-batches of this step began with, and what the last one left.
        self._window: list[Snapshot] = []
        self._attributes: dict[tuple, Attributes] = {}
        # By their ids: what is copied at every step; modules that were visited, and tensors that did not change.
        self._changing: dict[int, tuple[str, Any]] = {}
        self._known: dict[int, weakref.ref] = {}
        # What lay in large containers, tensors of modules, things that cannot be held: by name.
        self._contents: dict[str, list[int]] = {}
        self._of_modules: list[tuple[str, Tensor]] = []
        self._unheld: dict[str, Any] = {}
        # What the last snapshot has copied and has not been seen to change.
        self._looked: list[Entry] = []

    def begin_step(self) -> None:
        """To be called before the first micro-batch of a step that is to be perturbed."""
        self.steps += 1
        self._window, self._attributes = [], {}

    @property
    def looks(self) -> bool:
        """Whether everything is copied in this step."""
        return self.steps & (self.steps - 1) == 0

    def before_pass_1(self) -> Snapshot:
        """What there is before pass 1."""
        self._now, self._seen, self._bytes = Snapshot(RandomState.capture(self.device)), set[int](), 0
        if self.looks:
            self._known, self._contents, self._of_modules, self._unheld, self.foreign = {}, {}, [], {}, []
        self._in_model, self._in_module = True, False
        self._visit("model", self.model)
        self._in_model = False
        for name, root in self.roots().items():
            if isinstance(root, Attributes):
                self._hold(name, root)
                continue
            # The object itself may be of a library. What is left out is so wherever else it lies, too.
            own = vars(root)
            out = [own[key] for key in _LEFT_OUT & own.keys()]
            self._seen.update(map(id, [root, *out, *(getattr(value, "optimizer", None) for value in out)]))
            self._hold(name, own)
            self._visit_class(type(root))
            self._visit_all(name, [(key, value) for key, value in own.items() if not key.startswith("_lsam")])
        if self.looks:
            held = {id(entry.thing) for entry in self._now.entries}
            self._changing = {place: named for place, named in self._changing.items() if place in held}
        else:
            for name, thing in [named for place, named in self._changing.items() if place not in self._seen]:
                self._hold(name, thing)
            self._now.watched += [(n, t, stamp_of(t)) for n, t in self._of_modules if id(t) not in self._seen]
        return self._now

    def after_pass_1(self, random: RandomState) -> Snapshot:
        """What pass 1 has left, of all that its last micro-batch began with. (What is new, pass 2 makes anew.)"""
        after = self._window[-1].later(random)
        self._window.append(after)
        return after

    def learn(self, before: Snapshot) -> str | None:
        """After pass 1, leave in `before` what changed or always counts; returns the name of what it lacks."""
        unseen = [(name, tensor) for name, tensor, stamp in before.watched if stamp_of(tensor) != stamp]
        self._changing.update((id(tensor), (name, tensor)) for name, tensor in unseen)
        always = [entry for entry in before.entries if entry.always]
        before.entries = always + self._changed([entry for entry in before.entries if not entry.always])
        before.watched = []
        self._window.append(before)
        return unseen[0][0] if unseen else None

    def settle(self) -> None:
        """After pass 2, put back what only pass 2 changed: a teacher that was its student at first."""
        for entry in self._changed(self._looked):
            entry.kind.put(entry.thing, entry.kept)

    def _changed(self, entries: list[Entry]) -> list[Entry]:
        """Those that have changed, which are held from now on; the others are known not to."""
        changed, self._looked = [], []
        for entry in entries:
            if entry.is_same():
                self._looked.append(entry)
                if isinstance(entry.thing, (Tensor, np.ndarray)):
                    self._known[id(entry.thing)] = weakref.ref(entry.thing)
                continue
            changed.append(entry)
            self._changing[id(entry.thing)] = entry[:2]
            # Before the former micro-batches of this step it was what it was before this one.
            for former in self._window:
                former.entries.append(entry)
        return changed

    def marks(self) -> dict[str, Any]:
        """What can be seen of things that are not held."""
        return {name: mark_of(thing) for name, thing in self._unheld.items()}

    def tell_changes(self, marks: dict[str, Any]) -> None:
        """Warn of things that are not held and have changed since `marks`, once by each name."""
        for name, thing in self._unheld.items():
            if name in marks and mark_of(thing) != marks[name]:
                logger.warning_once(
                    f"{name} changes in pass 2 as it did in pass 1, and a {type(thing).__name__} cannot be put back. "
                    "Change it in pass 1 only: if not trainer.in_second_pass."
                )

    def _hold(self, name: str, thing: Any, always: bool = False) -> None:
        """Copy `thing`. What lies in a module, and tensors, are compared after pass 1, unless known to change."""
        if isinstance(thing, Attributes):  # the same one in all micro-batches of a step
            thing = self._attributes.setdefault((id(thing.owner), thing.names), thing)
        self._seen.add(id(thing))
        is_compared = (self._in_module or isinstance(thing, (Tensor, np.ndarray))) and id(thing) not in self._changing
        self._now.hold(name, thing, always or not is_compared)

    def _visit_all(self, name: str, parts: Iterable[tuple[Any, Any]], place: str = ".{}") -> None:
        """Visit parts of what has this name, each given with its key, which is added to the name as `place` says."""
        for key, part in parts:
            if not isinstance(part, _PLAIN) and id(part) not in self._seen:
                part_name = name + place.format(key)
                try:
                    self._visit(part_name, part)
                except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                    # Another's object may do as it likes when it is looked at, which must end no training.
                    logger.warning_once(f"{part_name} cannot be looked at, and is not put back after pass 2: {error}.")

    def _visit(self, name: str, thing: Any) -> None:
        """Hold `thing`, and visit what lies in it."""
        if isinstance(thing, nn.Module):
            if not self._is_known(thing):
                self._visit_module(name, thing)
            return
        self._seen.add(id(thing))
        if isinstance(thing, Tensor):
            self._visit_tensor(name, thing)
            return
        is_held = kind_of(thing) is not None
        if is_held and (not isinstance(thing, np.ndarray) or thing.size <= _SMALL or self._is_due(thing)):
            self._hold(name, thing)
        if isinstance(thing, (dict, list, tuple, deque)):
            items = dict(thing if isinstance(thing, dict) else enumerate(thing))
            if len(thing) > _LARGE:
                content = [id(thing), *map(id, items.values())]
                if self._contents.get(name) == content:
                    return
                self._contents[name] = content
            self._visit_all(name, items.items(), "[{!r}]")
        own = getattr(thing, "__dict__", {})
        if not _is_opened(thing):
            self._visit_all(name, enumerate(_parts(thing)), "")
        elif any(isinstance(value, _THREADS) for value in own.values()):
            self._unheld[name] = thing
        else:
            slots = Attributes(thing, tuple(s for c in type(thing).__mro__ for s in vars(c).get("__slots__", ())))
            for held in [slots] * bool(slots.names) + [own] * hasattr(thing, "__dict__"):
                self._hold(name, held)
            self._visit_class(type(thing))
            self._visit_all(name, [*slots.read().items(), *own.items()])
        if not is_held and (isinstance(thing, io.IOBase) or hasattr(thing, "__next__")):
            self._unheld[name] = thing

    def _visit_class(self, kind: type) -> None:
        """What a user's class holds for all of its objects, such as a counter."""
        for part in kind.__mro__:
            if not (self._is_known(part) or part.__module__.partition(".")[0] in _LIBRARIES):
                self._known[id(part)] = weakref.ref(part)
                own = {name: v for name, v in vars(part).items() if name[:2] != "__" and not hasattr(v, "__get__")}
                outer, self._in_module = self._in_module, True
                self._hold(part.__qualname__, Attributes(part, tuple(own)))
                self._visit_all(part.__qualname__, own.items())
                self._in_module = outer

    def _visit_module(self, name: str, module: nn.Module) -> None:
        """Its tensors, its parts, and what a user's class has set on it."""
        self._known[id(module)] = weakref.ref(module)
        self._visit_class(type(module))
        outer, self._in_module = self._in_module, True
        self._visit_all(name, [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)])
        self._visit_all(name, module.named_children())
        if not isinstance(module, torch.jit.ScriptModule):
            self._hold(name, module)
            self._hold_table(f"{name}._buffers", module._buffers, bool(module._buffers))
            weights = [weight for weight in module._parameters.values() if weight is not None]
            # FSDP2 changes the table as it gathers weights and lets go of them.
            if not is_sharded(weights):
                self._hold_table(f"{name}._parameters", module._parameters, not all(map(self.is_trained, weights)))
            self._visit_all(name, attributes_of(module).items())
        self._in_module = outer

    def _hold_table(self, name: str, table: dict, is_noted: bool) -> None:
        if is_noted:
            self._changing[id(table)] = (name, table)
        self._hold(name, table)

    def _visit_tensor(self, name: str, tensor: Tensor) -> None:
        if not tensor.is_leaf or self.is_trained(tensor) or isinstance(tensor, DTensor):
            return
        # The entries of an expanded one share memory, and cannot be written.
        is_written = not (tensor.is_meta or tensor.is_sparse or tensor.is_inference())
        if not is_written or (0 in tensor.stride() and tensor.numel() > 1):
            return
        if tensor.requires_grad:
            self.foreign.append(tensor)
        is_small = tensor.numel() <= _SMALL and not (self._in_model and isinstance(tensor, nn.Parameter))
        if self._in_module:
            self._of_modules.append((name, tensor))
            if is_small:
                self._changing[id(tensor)] = (name, tensor)
        if is_small or self._is_due(tensor):
            # A small one that is no module's is put back unseen: to compare it would be to wait for the device.
            self._hold(name, tensor, always=is_small and not self.looks)
        else:
            self._now.watched.append((name, tensor, stamp_of(tensor)))

    def _is_due(self, thing: Tensor | np.ndarray) -> bool:
        """Whether a large tensor or array is to be copied: if it changes, or was not seen before."""
        if id(thing) in self._changing:
            return True
        self._bytes += thing.nbytes
        return self._bytes <= _MOST_BYTES and not self._is_known(thing)

    def _is_known(self, thing: Any) -> bool:
        return id(thing) in self._known and self._known[id(thing)]() is thing


def _is_opened(thing: Any) -> bool:
    """Whether it is an object of a user's class, whose attributes are held."""
    if isinstance(thing, (Optimizer, LRScheduler, types.SimpleNamespace)):
        return True
    package = type(thing).__module__.partition(".")[0]
    return package not in _LIBRARIES and not isinstance(thing, (type, types.ModuleType, Dataset))


def _parts(thing: Any) -> Iterable[Any]:
    """What lies in a function, or another thing without attributes of its own."""
    if isinstance(thing, types.FunctionType):
        given = (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values())
        return (*(thing.__closure__ or ()), *given, vars(thing))
    if isinstance(thing, types.MethodType):
        return (thing.__self__,)
    if isinstance(thing, types.CellType):
        return (thing.cell_contents,) if thing != types.CellType() else ()
    if isinstance(thing, functools.partial):
        return (thing.func, *thing.args, *thing.keywords.values())
    if isinstance(thing, UserDict):
        return (thing.data,)
    return ()
