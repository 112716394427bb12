"""What is in large containers: two passes leave it as one, whatever it is, and from whatever step on it changes."""

import threading
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
from kept import Holder, Slotted

from hf_lsam import visitor
from hf_lsam.bulk import Bulk
from hf_lsam.held import RandomState
from hf_lsam.pass_state import PassState
from hf_lsam.structure import Structure

ROWS = 100


class Meter:
    calls = 0


class Lists(Holder):
    pass


class SlottedToo(Slotted):
    own = 0


class Named(dict):
    own = 0


def an_equal_list_takes_the_place(kept, step):
    """It is another object, so that what is appended to it is not in the first one."""
    rows = [row for row in kept if row["now"] is row["first"]]
    rows[0]["now"] = [*rows[0]["now"]]


def an_object_in_a_list_that_had_none(kept, step):
    kept[step // 2].append({"calls": 0})
    kept[step // 2][0]["calls"] += 1


def a_row_of_an_ordered_dictionary(kept, step):
    kept[step + 1000] = []
    kept.get(step + 999, []).append(1)


def the_number_of_a_class(kept, step):
    type(kept[0]).calls += 1


def a_key(kept, step):
    next(iter(kept)).calls += 1


def a_set(kept, step):
    kept[3]["seen"].add(step)


def the_end_of_a_chain(kept, step):
    kept[5].inner[0]["deep"][1][2].add(step)


def a_list_that_two_rows_share(kept, step):
    kept[0].inner.append(kept[1].inner[-1] + 1)


def a_slot(kept, step):
    kept[7].calls += step


def a_slot_beside_attributes(kept, step):
    kept[7].calls += step
    kept[7].own = step


def an_item_of_a_users_dictionary(kept, step):
    kept[7]["calls"] = step
    kept[7].own = step


def arrays(kept, step):
    kept[step % 3] += 1


def a_deque(kept, step):
    kept[1].append(step)


def no_row_any_more(kept, step):
    kept.pop()


def circle():
    rows = [Holder(calls=0, others=None) for _ in range(ROWS)]
    for row in rows:
        row.others = rows
    return rows


def in_a_circle(kept, step):
    kept[step].others[step + 1].calls += 1


SHARED = [0]
CASES = {
    an_equal_list_takes_the_place: lambda: [(lambda first: {"first": first, "now": first})([]) for _ in range(ROWS)],
    an_object_in_a_list_that_had_none: lambda: [[] for _ in range(ROWS)],
    a_row_of_an_ordered_dictionary: lambda: OrderedDict((row, []) for row in range(ROWS)),
    the_number_of_a_class: lambda: (lambda kind: [kind() for _ in range(ROWS)])(type("Row", (Meter,), {"calls": 0})),
    a_key: lambda: {Holder(calls=0): row for row in range(ROWS)},
    a_set: lambda: [{"seen": set(), "other": []} for _ in range(ROWS)],
    the_end_of_a_chain: lambda: [Lists(inner=({"deep": [0, (1, 2, {0})]},)) for _ in range(ROWS)],
    a_list_that_two_rows_share: lambda: (lambda shared: [Lists(inner=shared) for _ in range(ROWS)])([0]),
    a_slot: lambda: [Slotted() for _ in range(ROWS)],
    a_slot_beside_attributes: lambda: [SlottedToo() for _ in range(ROWS)],
    an_item_of_a_users_dictionary: lambda: [Named(calls=0) for _ in range(ROWS)],
    arrays: lambda: [np.zeros(2) for _ in range(ROWS)],
    a_deque: lambda: tuple(deque([0], 3) for _ in range(ROWS)),
    no_row_any_more: lambda: [[] for _ in range(ROWS)],
    in_a_circle: circle,
}


def outline(thing, depth=8):
    """Values, and whether they are the same objects as others."""
    if depth == 0:
        return "..."
    if type(thing) in (dict, OrderedDict):
        return [outline(key, depth - 1) for key in thing], outline([*thing.values()], depth - 1)
    if isinstance(thing, (list, tuple, deque)):
        first = [[other is part for other in thing].index(True) for part in thing]
        return first, [outline(part, depth - 1) for part in thing]
    if isinstance(thing, (Slotted, Named)):
        return thing["calls"] if isinstance(thing, Named) else thing.calls, getattr(thing, "own", None)
    if isinstance(thing, (np.ndarray, set)):
        return sorted(thing)
    if hasattr(thing, "__dict__"):
        return getattr(type(thing), "calls", None), outline(vars(thing), depth - 1)
    return thing


def state_of(kept):
    return PassState(
        Structure(torch.nn.Linear(2, 2)), lambda: {"owner": Holder(kept=kept)}, lambda tensor: tensor.requires_grad
    )


def two_passes(state, change):
    """A perturbed step in which both passes make the change; returns the names of what was copied."""
    state.begin_step()
    before = state.before_pass_1()
    copied = [entry.name for entry in before.entries]
    change()
    assert state.keep_changes(before) is None
    after = state.after_pass_1(RandomState.capture(state.device))
    before.put()
    change()
    state.undo_pass_2()
    after.put()
    return copied


@pytest.mark.parametrize("first_step", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_two_passes_leave_it_as_one(change, first_step):
    ours, plain = CASES[change](), CASES[change]()
    state = state_of(ours)
    for step in range(1, 9):
        if step < first_step:
            two_passes(state, lambda: None)
            continue
        two_passes(state, lambda step=step: change(ours, step))
        change(plain, step)
        assert outline(ours) == outline(plain)


def test_what_has_not_changed_is_looked_at_up_to_a_limit(monkeypatch):
    """Then only in steps 1, 2, 4, 8, ..., and in all steps once it has changed."""
    monkeypatch.setattr(visitor, "_MOST_VALUES", 2 * ROWS)
    monkeypatch.setattr(visitor, "_MOST_OTHERS", ROWS)
    kept = [{"loss": 0, "losses": [0, 1, 2]} for _ in range(ROWS)]
    state = state_of(kept)

    def looked_at():
        two_passes(state, lambda: None)
        return len(state._bulks["owner.kept"].read().containers)

    assert [looked_at() for _ in range(5)] == [201, 201, 101, 201, 101]
    two_passes(state, lambda: kept[0].update(loss=1))
    assert looked_at() == 201


def test_objects_of_libraries_are_looked_at_up_to_a_number(monkeypatch):
    monkeypatch.setattr(visitor, "_MOST_OTHERS", ROWS)
    few, many = ([np.zeros(2) for _ in range(number)] for number in (ROWS, ROWS + 1))
    for arrays, numbers in ((few, [ROWS] * 3), (many, [ROWS + 1, ROWS + 1, 0])):
        state = state_of(arrays)
        copied = [two_passes(state, lambda: None) for _ in range(3)]
        assert [sum(" item " in name for name in names) for names in copied] == numbers


def test_tensors_are_copied_in_the_first_steps_and_when_they_are_new():
    kept = [torch.zeros(3) for _ in range(ROWS)]
    state = state_of(kept)
    numbers = []
    for _ in range(7):
        copied = two_passes(state, lambda: kept.append(torch.ones(3)))
        numbers.append(sum(" tensor " in name for name in copied))
    assert numbers == [100, 101, 1, 103, 1, 1, 1] and len(kept) == 107


def test_what_other_threads_use_is_left_alone():
    class Shared:
        def __init__(self):
            self.lock, self.calls = threading.Lock(), 0

    kept = [Shared() for _ in range(ROWS)]
    state = state_of(kept)

    def change():
        kept[0].calls += 1

    for _ in range(3):
        two_passes(state, change)
    assert kept[0].calls == 6


def test_what_refers_to_the_trainer_does_not_lead_to_what_is_left_out():
    trainer = Holder(optimizer=Holder(moments=[torch.zeros(3)]), rows=None)
    trainer.rows = [Holder(trainer=trainer) for _ in range(ROWS)]
    state = PassState(Structure(torch.nn.Linear(2, 2)), lambda: {"trainer": trainer}, lambda tensor: False)
    two_passes(state, lambda: None)
    containers = state._bulks["trainer.rows"].read().containers
    assert len(containers) == ROWS + 1 and not any(thing is vars(trainer) for thing in containers)


def test_a_list_that_is_assigned_anew_takes_the_place_of_the_former_one():
    owner, lengths = Holder(kept=[[] for _ in range(ROWS)]), []
    state = PassState(Structure(torch.nn.Linear(2, 2)), lambda: {"owner": owner}, lambda tensor: True)

    def change():
        lengths.append(len(owner.kept[3]))
        owner.kept[3].append(1)
        owner.kept = [[*row] for row in owner.kept]

    for _ in range(7):
        two_passes(state, change)
    assert lengths == sorted([*range(7)] * 2) and len(state._bulks) == 1
    assert sum(isinstance(thing, Bulk) for _, thing in state._changing.values()) <= 1


def test_lists_that_are_gone_are_not_kept():
    owner = Holder(kept={})
    state = PassState(Structure(torch.nn.Linear(2, 2)), lambda: {"owner": owner}, lambda tensor: True)
    for step in range(7):
        owner.kept = {step: [[] for _ in range(ROWS)]}
        two_passes(state, lambda step=step: owner.kept[step][0].append(1))
        assert owner.kept[step][0] == [1] and len(state._bulks) == 1
