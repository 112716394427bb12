"""What a pass reads and changes: copied before pass 1, restored before pass 2 and after it."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from transformers.utils import logging

from .given import users_among
from .held import Entry, RandomState, Snapshot
from .kinds import Attributes
from .stamps import changed_in, mark_of, stamp_of
from .structure import Structure
from .visitor import Visitor

logger = logging.get_logger(__name__)

# Attributes of a Trainer and of its state that no pass changes.
_LEFT_OUT = {
    *("args", "accelerator", "deepspeed", "optimizer", "lr_scheduler", "train_dataset", "eval_dataset", "log_history")
}


class PassState(Visitor):
    """Copies and restores what passes read and change, except the trained weights and their gradients.

    That is: the random states; the buffers, frozen weights, and attributes of users' classes in the modules of
    the model; and everything that `roots` refer to (objects by the names that users know), to any depth, the class
    attributes of users' classes and the variables of users' modules that their functions name included. It is not the
    state of libraries, nor that of objects which other threads use.

    What is copied at each step is compared after pass 1, and kept if that has changed it. At the first change of
    something that was not copied but watched, the step is not perturbed, and from then on it is copied.
    """

    def __init__(
        self, structure: Structure, roots: Callable[[], Mapping[str, Any]], is_trained: Callable[[Tensor], bool]
    ):
        super().__init__(structure, is_trained)
        self.roots = roots
        self._window: list[Snapshot] = []  # before each micro-batch of this step, and after the last
        self._unchanged: list[Entry] = []  # the entries of the last snapshot that had not changed after pass 1

    def begin_step(self) -> None:
        """To be called before the first micro-batch of each perturbed step."""
        self.steps += 1
        self._window = []

    def end_step(self) -> None:
        """To be called after each perturbed step: what was copied may refer to the graphs of its passes."""
        for snapshot in self._window:
            snapshot.entries = []
        self._window, self._unchanged = [], []
        for bulk in self._bulks.values():
            if bulk.has_graph:
                bulk.forget()

    def before_pass_1(self) -> Snapshot:
        """The snapshot before pass 1."""
        self._begin()
        roots = self.roots()
        # A root itself may be of a library. Attributes that are left out are skipped wherever they occur.
        objects = {name: root for name, root in roots.items() if not isinstance(root, (Attributes, dict))}
        for root in objects.values():
            out = [value for key, value in vars(root).items() if key in _LEFT_OUT or key.startswith("_lsam")]
            self._seen.update(map(id, [root, *out, *(getattr(value, "optimizer", None) for value in out)]))
        self._visit_model()
        for name, root in roots.items():
            self._hold(name, vars(root) if name in objects else root)
        for name, root in objects.items():
            self._visit_all(name, vars(root).items())
            self._visit_all(name, enumerate(users_among(type(root).__mro__)), "")
        self._forget()
        for name, thing in [named for place, named in self._changing.items() if place not in self._seen]:
            self._hold(name, thing)
        if not self.copies_all:
            self._now.watched += [(n, t, stamp_of(t)) for i, (n, t) in self._of_modules.items() if i not in self._seen]
        return self._now

    def _forget(self) -> None:
        """Drop what is not reached any more, since it may refer to the graph of an earlier pass."""

        def is_reached(place: int) -> bool:
            return place in self._seen or place in self._lasting

        self._changing = {place: named for place, named in self._changing.items() if is_reached(place)}
        self._bulks = {name: bulk for name, bulk in self._bulks.items() if is_reached(id(bulk))}

    def after_pass_1(self, random: RandomState) -> Snapshot:
        """The snapshot after pass 1 of the last micro-batch, of the objects that were copied before it."""
        after = self._window[-1].later(random)
        self._window.append(after)
        return after

    def keep_changes(self, before: Snapshot) -> str | None:
        """After pass 1, reduce `before` to what has changed; returns the name of something changed that it lacks."""
        uncopied = [(name, part) for name, thing, stamp in before.watched for part in changed_in(thing, stamp)]
        self._changing.update((id(thing), (name, thing)) for name, thing in uncopied)
        for bulk in (self._bulks[name] for name, _ in uncopied if name in self._bulks):
            bulk.changes = True
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
            if (bulk := self._bulk_of.get(id(entry.thing))) is not None:
                bulk.changes = True
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
