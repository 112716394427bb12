"""What a pass reads and changes: copied before pass 1, restored before pass 2 and after it."""

import concurrent.futures
import copyreg
import io
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from .given import is_opened, is_users, is_users_function, is_users_hook, parts_of, users_among, variables_of
from .held import BULK, HOOKS, Attributes, Entry, Items, RandomState, Snapshot, attributes_of, kind_of
from .shards import compute_device, is_sharded
from .stamps import PLAIN, has_changed, mark_of, stamp_of

logger = logging.get_logger(__name__)

# Attributes of a Trainer and of its state that no pass changes.
_LEFT_OUT = {
    *("args", "accelerator", "deepspeed", "optimizer", "lr_scheduler", "train_dataset", "eval_dataset", "log_history")
}
_NAMES = (*PLAIN, tuple)
# An object with one of these in it is also used by other threads, so it is not restored.
_LOCKS = (threading.Condition, threading.Event, type(threading.Lock()), type(threading.RLock()))
_THREADS = (*_LOCKS, threading.Thread, queue.Queue, concurrent.futures.Executor)
_MOST_BYTES = 2**30  # of the copies of tensors that have not changed so far; further ones are only watched
_SMALL = 1024  # entries of a tensor up to which it is always copied, if it belongs to no module
# Items of a container above which they are visited only if they are other objects than before, or one has changed.
_LARGE = 64


class PassState:
    """Copies and restores what passes read and change, except the trained weights and their gradients.

    That is: the random states; the buffers, frozen weights, and attributes of users' classes in the modules of
    `model`; and everything that `roots` refer to (objects by the names that users know), to any depth, the class
    attributes of users' classes and the variables of users' modules that their functions name included. It is not the
    state of libraries, nor that of objects which other threads use.

    A copy of everything at each step would be too slow, so the class learns what changes. At perturbed steps 1, 2, 4,
    8, ... everything is copied, and compared after pass 1. At the others, it copies only what changed before or is
    new, what `roots` and users' modules refer to, small tensors, and the tables of a module's tensors. Other tensors
    are watched by their version counters, and large containers by the sizes and attributes of their items: at the
    first change of one the step is not perturbed, and from then on it is copied.
    """

    def __init__(self, model: nn.Module, roots: Callable[[], Mapping[str, Any]], is_trained: Callable[[Tensor], bool]):
        self.model, self.roots, self.is_trained = model, roots, is_trained
        self.device = compute_device(next(model.parameters()))
        self.steps = 0  # number of perturbed steps, this one included
        self.foreign: list[Tensor] = []  # parameters that another optimizer trains, such as those of a critic
        self._window: list[Snapshot] = []  # before each micro-batch of this step, and after the last
        self._changing: dict[int, tuple[str, Any]] = {}  # by id: what is copied at every step
        self._known: dict[int, weakref.ref] = {}  # by id: modules that were visited, and tensors that did not change
        self._contents: dict[str, set[int]] = {}  # by name: ids of large containers and of their items
        self._in_bulk: dict[int, Items] = {}  # by id of a large container: its items, where these have no parts
        self._of_modules: list[tuple[str, Tensor]] = []  # names and tensors of modules
        self._users_modules: list[
            tuple[str, nn.Module]
        ] = []  # names and modules: of users' classes, and outermost ones
        self._users_hooks: list[tuple[str, Any]] = []  # names and hooks of modules
        self._within: tuple[str, Any] | None = None  # the large container that is visited
        self._container_of: dict[int, tuple[str, Any]] = {}  # by id of what was copied: the large container it is in
        self._unheld: dict[str, Any] = {}  # by name: objects that cannot be copied
        self._unchanged: list[Entry] = []  # the entries of the last snapshot that had not changed after pass 1

    def begin_step(self) -> None:
        """To be called before the first micro-batch of each perturbed step."""
        self.steps += 1
        self._window = []

    @property
    def copies_all(self) -> bool:
        """Whether everything is copied at this step: the 1st, 2nd, 4th, 8th, ..."""
        return self.steps & (self.steps - 1) == 0

    def before_pass_1(self) -> Snapshot:
        """The snapshot before pass 1."""
        self._now, self._seen, self._bytes = Snapshot(RandomState.capture(self.device)), set[int](), 0
        self._container_of = {}
        if self.copies_all:
            self._known, self._contents, self._of_modules, self._unheld, self.foreign = {}, {}, [], {}, []
            self._users_modules, self._users_hooks, self._in_bulk = [], [], {}
        roots = self.roots()
        # A root itself may be of a library. Attributes that are left out are skipped wherever they occur.
        objects = {name: root for name, root in roots.items() if not isinstance(root, (Attributes, dict))}
        for root in objects.values():
            out = [value for key, value in vars(root).items() if key in _LEFT_OUT or key.startswith("_lsam")]
            self._seen.update(map(id, [root, *out, *(getattr(value, "optimizer", None) for value in out)]))
        self._in_model, self._in_module = True, False
        self._visit("model", self.model)
        self._in_model = False
        if not self.copies_all:
            for name, module in self._users_modules:
                self._visit_attributes(name, module)
            self._visit_all("", self._users_hooks, "{}")
        for name, root in roots.items():
            self._hold(name, vars(root) if name in objects else root)
        for name, root in objects.items():
            self._visit_all(name, vars(root).items())
            self._visit_all(name, enumerate(users_among(type(root).__mro__)), "")
        if self.copies_all:
            held = {id(entry.thing) for entry in self._now.entries}
            self._changing = {place: named for place, named in self._changing.items() if place in held}
        else:
            for name, thing in [named for place, named in self._changing.items() if place not in self._seen]:
                self._hold(name, thing)
            self._now.watched += [(n, t, stamp_of(t)) for n, t in self._of_modules if id(t) not in self._seen]
        return self._now

    def after_pass_1(self, random: RandomState) -> Snapshot:
        """The snapshot after pass 1 of the last micro-batch, of the objects that were copied before it."""
        after = self._window[-1].later(random)
        self._window.append(after)
        return after

    def keep_changes(self, before: Snapshot) -> str | None:
        """After pass 1, reduce `before` to what has changed; returns the name of something changed that it lacks."""
        uncopied = [(name, thing) for name, thing, stamp in before.watched if has_changed(thing, stamp)]
        self._changing.update((id(thing), (name, thing)) for name, thing in uncopied)
        always = [entry for entry in before.entries if entry.always]
        before.entries = always + self._changed([entry for entry in before.entries if not entry.always])
        before.watched = []
        self._window.append(before)
        return uncopied[0][0] if uncopied else None

    def undo_pass_2(self) -> None:
        """After pass 2, restore what pass 1 had not changed, such as a teacher that was equal to its student."""
        for entry in self._changed(self._unchanged):
            entry.kind.put(entry.thing, entry.kept)

    def _changed(self, entries: list[Entry]) -> list[Entry]:
        """The entries that have changed, which are copied at every step from now on."""
        changed, self._unchanged = [], []
        for entry in entries:
            if entry.is_same():
                self._unchanged.append(entry)
                if isinstance(entry.thing, (Tensor, np.ndarray)):
                    self._known[id(entry.thing)] = weakref.ref(entry.thing)
                continue
            changed.append(entry)
            self._changing[id(entry.thing)] = entry[:2]
            container = self._container_of.get(id(entry.thing))
            while container is not None:
                self._changing[id(container[1])] = container
                container = self._container_of.get(id(container[1]))
            for former in self._window:  # before the earlier micro-batches of this step it was the same, if not held
                former.entries.insert(0, entry)
        return changed

    def marks(self) -> dict[str, Any]:
        """The marks of the objects that cannot be copied, by name."""
        return {name: mark_of(thing) for name, thing in self._unheld.items()}

    def warn_of_changes(self, marks: dict[str, Any]) -> None:
        """Warn of objects that cannot be copied and have changed since `marks`, once for each."""
        for name, thing in self._unheld.items():
            if name in marks and mark_of(thing) != marks[name]:
                owner = next(iter(self.roots()), "trainer")  # what has `in_second_pass`: a Trainer, or an `LSAM`
                what = f"{name} changes in pass 2 as it did in pass 1, and a {type(thing).__name__} cannot be restored"
                logger.warning_once(f"{what}. Change it in pass 1 only: if not {owner}.in_second_pass.")

    def _hold(self, name: str, thing: Any, always: bool = False) -> None:
        """Copy `thing`; a tensor, or what is in a module or a large container, is kept only if pass 1 changes it."""
        self._seen.add(id(thing))
        if self._within is not None:
            self._container_of[id(thing)] = self._within
        is_compared = self._in_module or self._within is not None or isinstance(thing, (Tensor, np.ndarray))
        is_compared = is_compared and id(thing) not in self._changing
        self._now.hold(name, thing, always or not is_compared)

    def _visit_all(self, name: str, parts: Iterable[tuple[Any, Any]], place: str = ".{}") -> None:
        """Visit `parts`, pairs of a key and an object, whose name is `name` and the key, formatted by `place`."""
        for key, part in parts:
            if not isinstance(part, PLAIN) and id(part) not in self._seen:
                # Not the text of other keys: that of a tensor takes long, and synchronises with its device.
                part_name = name + place.format(key if isinstance(key, _NAMES) else type(key))
                try:
                    self._visit(part_name, part)
                except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                    # Code of the object may run when its attributes are read; its errors must not end the training.
                    logger.warning_once(f"{part_name} cannot be read, so it is not restored after pass 2: {error}.")

    def _visit(self, name: str, thing: Any) -> None:
        """Copy `thing`, and visit what it refers to."""
        if isinstance(thing, nn.Module):
            if not self._is_known(thing):
                self._visit_module(name, thing)
            return
        self._seen.add(id(thing))
        if isinstance(thing, Tensor):
            self._visit_tensor(name, thing)
            return
        if isinstance(thing, type):
            if is_users(thing.__module__):
                self._hold(name, thing)
                self._visit_all(name, [(k, value) for k, value in vars(thing).items() if not k.startswith("__")])
            return
        if is_users_function(thing):
            for variables in variables_of(thing):
                self._hold("globals", variables)
                self._visit_all("", variables.read().items(), "{}")
        is_held = kind_of(thing) is not None
        if is_held and (not isinstance(thing, np.ndarray) or thing.size <= _SMALL or self._is_due(thing)):
            self._hold(name, thing)
        if isinstance(thing, (dict, list, tuple, deque, set, frozenset)):
            self._visit_items(name, thing)
        own = getattr(thing, "__dict__", {})
        if not is_opened(thing):
            self._visit_all(name, enumerate(parts_of(thing)), "")
        elif any(isinstance(value, _THREADS) for value in own.values()):
            self._unheld[name] = thing
        else:
            slots = Attributes(thing, tuple(copyreg._slotnames(type(thing))))  # type: ignore[attr-defined]
            for held in [slots] * bool(slots.names) + [own] * hasattr(thing, "__dict__"):
                self._hold(name, held)
            self._visit_all(name, [*slots.read().items(), *own.items()])
            self._visit_all(name, enumerate(users_among(type(thing).__mro__)), "")
        if not is_held and (isinstance(thing, io.IOBase) or hasattr(type(thing), "__next__")):
            self._unheld[name] = thing

    def _visit_items(self, name: str, thing: Any) -> None:
        """Visit the items of a container, and its keys; of a large one, those that are new or may have changed."""
        places = thing if isinstance(thing, dict) else ()
        items: Iterable = thing.items() if isinstance(thing, dict) else enumerate(thing)
        if len(thing) <= _LARGE:
            self._visit_all(name, [*items], "[{!r}]")
            self._visit_all(name, enumerate(places), " key {}")
            return
        values = [*(thing.values() if isinstance(thing, dict) else thing)]
        former, self._contents[name] = self._contents.get(name, set()), {id(thing), *map(id, values)}
        if id(thing) not in former:
            former = set()
        elif id(thing) not in self._changing:
            self._now.watched.append((name, thing, stamp_of(thing)))
        elif id(thing) in self._in_bulk:
            self._hold(name, self._in_bulk[id(thing)])
        else:
            former = set()
        outer, self._within, number = self._within, (name, thing), len(self._now.entries)
        self._visit_all(name, [(key, item) for key, item in items if id(item) not in former], "[{!r}]")
        if not former:
            self._visit_all(name, enumerate(places), " key {}")
            with_parts = [item for item in values if not isinstance(item, PLAIN)]
            if len(self._now.entries) - number == sum(type(item) in BULK for item in with_parts) == len(with_parts):
                self._in_bulk[id(thing)] = Items(thing)  # nothing else is in them
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
            self._visit_attributes(name, module)
            tables = [*(vars(module).get(table) for table in HOOKS), *(weight._backward_hooks for weight in weights)]
            hooks = [hook for table in tables if table for hook in table.values() if is_users_hook(hook)]
            self._users_hooks += [(f"{name} hook {place}", hook) for place, hook in enumerate(hooks)]
            self._visit_all(name, enumerate(hooks), " hook {}")
        self._in_module = outer

    def _visit_attributes(self, name: str, module: nn.Module) -> None:
        outer, self._in_module = self._in_module, True
        self._hold(name, module)
        self._visit_all(name, attributes_of(module).items())
        self._visit_all(name, enumerate(users_among(type(module).__mro__)), "")
        self._in_module = outer

    def _hold_table(self, name: str, table: dict, always: bool) -> None:
        if always:
            self._changing[id(table)] = (name, table)
        self._hold(name, table)

    def _visit_tensor(self, name: str, tensor: Tensor) -> None:
        if not tensor.is_leaf or self.is_trained(tensor) or isinstance(tensor, DTensor):
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
            self._of_modules.append((name, tensor))
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
