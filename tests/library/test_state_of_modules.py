"""State in variables of users' modules, and in containers and references of the standard library."""

import sys
import weakref
from array import array
from collections import ChainMap, UserList
from contextvars import ContextVar
from functools import cache
from threading import local
from types import ModuleType

import pytest
import tally
from situations import LAST, Situation, follow
from tiny import out_of_reach

PACKAGE = ModuleType("package")
PACKAGE.tally, tally.PACKAGE = tally, PACKAGE


class InModules(Situation):
    def begin(self, model):
        self.notes = out_of_reach(tally=sys.modules["tally"])

    def counted(self):
        return self.notes.tally.total


class InAModule(InModules):
    """`import settings`, and then `settings.step += 1`, as is usual for settings that all modules share."""

    def loss(self, model, batch, items):
        tally.total += 1
        tally.names.append("pass")
        tally.Settings.step += 1
        return model(**batch).loss

    def counted(self):
        assert tally.total == len(tally.names) == tally.Settings.step
        return tally.total


class InAModuleOfAPackage(InModules):
    def loss(self, model, batch, items):
        PACKAGE.tally.total += 1
        return model(**batch).loss


class InAModuleImportedLate(InModules):
    def loss(self, model, batch, items):
        import tally as imported

        imported.total += 1
        return model(**batch).loss


class InAFunctionOfAModule(InModules):
    def loss(self, model, batch, items):
        tally.count()
        return model(**batch).loss


class BehindACache(Situation):
    """A function whose results are kept, and which is called with a new argument each time."""

    def begin(self, model):
        seen = []

        @cache
        def look_up(key):
            seen.append(key)

        self.look_up, self.notes = look_up, out_of_reach(seen=seen, calls=0)

    def loss(self, model, batch, items):
        self.notes.calls += 1
        self.look_up(self.notes.calls)
        return model(**batch).loss

    def counted(self):
        return len(self.notes.seen)


class Kept(Situation):
    """In an object of the standard library; what it refers to weakly is reached no other way."""

    def begin(self, model):
        self.notes = out_of_reach(owner=Holder())
        self.kept = self.make()

    def loss(self, model, batch, items):
        self.count()
        return model(**batch).loss


class Holder:
    calls = 0


class InAUserList(Kept):
    make = UserList

    def count(self):
        self.kept.append(1)

    def counted(self):
        return len(self.kept)


class InAChainMap(Kept):
    def make(self):
        return ChainMap({"calls": 0}, {"rows": 0})

    def count(self):
        self.kept["calls"] += 1

    def counted(self):
        return self.kept["calls"]


class InAWeakDictionary(Kept):
    def make(self):
        return weakref.WeakKeyDictionary({self.notes.owner: 0})

    def count(self):
        self.kept[self.notes.owner] += 1

    def counted(self):
        return self.kept[self.notes.owner]


class InWhatAWeakSetHolds(Kept):
    def make(self):
        return weakref.WeakSet({self.notes.owner})

    def count(self):
        for owner in self.kept:
            owner.calls += 1

    def counted(self):
        return self.notes.owner.calls


class InWhatASetHolds(InWhatAWeakSetHolds):
    def make(self):
        return {self.notes.owner}


class InAKey(InWhatAWeakSetHolds):
    def make(self):
        return {self.notes.owner: 1}


class BehindAWeakReference(Kept):
    def make(self):
        return weakref.ref(self.notes.owner)

    def count(self):
        self.kept().calls += 1

    def counted(self):
        return self.kept().calls


class Unnamed:
    def __repr__(self):
        raise NotImplementedError


class UnderAKeyWithoutText(Kept):
    def make(self):
        self.key = Unnamed()
        return {self.key: []}

    def count(self):
        self.kept[self.key].append(1)

    def counted(self):
        return len(self.kept[self.key])


class InAnArray(Kept):
    def make(self):
        return array("i", [0])

    def count(self):
        self.kept[0] += 1
        self.kept.append(1)

    def counted(self):
        assert self.kept[0] == len(self.kept) - 1
        return self.kept[0]


class InAContext(Kept):
    def make(self):
        calls = ContextVar("calls")
        calls.set(0)
        return calls

    def count(self):
        self.kept.set(self.kept.get() + 1)

    def counted(self):
        return self.kept.get()


class BesideAnUnsetVariable(UnderAKeyWithoutText):
    """A variable of a context in which it has no value is passed over without a warning."""

    def make(self):
        self.unset = ContextVar("unset")
        return super().make()


class InAThread(Kept):
    def make(self):
        own = local()
        own.calls = 0
        return own

    def count(self):
        self.kept.calls += 1

    def counted(self):
        return self.kept.calls


PLACES = [InAModule, InAModuleOfAPackage, InAModuleImportedLate, InAFunctionOfAModule, BehindACache]
PLACES += [InAUserList, InAChainMap, InAWeakDictionary, InWhatAWeakSetHolds, InWhatASetHolds, InAKey]
PLACES += [BehindAWeakReference, InAnArray, InAContext, InAThread]
PLACES += [UnderAKeyWithoutText, BesideAnUnsetVariable]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("config", [None, LAST], ids=["plain", "last"])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_counted_counts_once(place, config, accumulation, tmp_path):
    tally.begin()
    run = follow(place, tmp_path, config, accumulation, max_steps=6)
    assert run.trainer.counted() == 6 * accumulation
    assert not run.messages
