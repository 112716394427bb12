"""Pass 2 begins with all that pass 1 began with, and leaves all as pass 1 left it: attributes of the trainer."""

import pytest
import torch
from kept import (
    KEPT,
    SHARED,
    Slotted,
    Weighs,
    a_counter,
    a_deque,
    a_list,
    a_set,
    a_torch_generator,
    an_array,
    nested_objects,
)
from kept_of_rows import (
    LATER,
    OF_ROWS,
    a_history_of_each_row,
    a_history_that_gets_more_rows,
    a_list_that_has_grown,
)
from literal_step import WAYS, alike, assert_as_plain, assert_literal, assert_right, flat
from situations import LAST, Net, Situation, follow
from tiny import bert, out_of_reach

from hf_lsam import visitor
from hf_lsam.pass_state import PassState

ALL_KEPT = KEPT | OF_ROWS
# Warnings about a step that is plain because pass 2 does not repeat pass 1.
PLAIN = r"pass 2|second pass|repeat|not perturbed"


def keeping(weight, first_step=0) -> type[Weighs]:
    def begin(self, model):
        make = (ALL_KEPT | SHARED | LATER)[weight]
        if make is not None:
            self.kept = self.other = make()

    own = dict(weight=weight, begin=begin, keeps=("kept", "other", "calls"), calls=0, first_step=first_step)
    return type("Keeping", (Weighs,), own)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("weight", ALL_KEPT, ids=lambda weight: weight.__name__)
def test_what_a_trainer_keeps(weight, way, tmp_path):
    assert_right(keeping(weight), tmp_path, way)


LATE = [(weight, step) for weight in ALL_KEPT for step in (1, 2)]


@pytest.mark.parametrize("way", ["last", "top_k, two"])
@pytest.mark.parametrize(("weight", "first_step"), LATE, ids=lambda part: getattr(part, "__name__", part))
def test_what_a_trainer_begins_to_keep_later(weight, first_step, way, tmp_path):
    """After the first perturbed steps nothing had changed yet."""
    assert_right(keeping(weight, first_step), tmp_path, way, may_skip=PLAIN)


@pytest.mark.parametrize("most_bytes", [2**30, 0])
@pytest.mark.parametrize("weight", LATER, ids=lambda weight: weight.__name__)
def test_what_begins_to_change_beside_other_things(weight, most_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(visitor, "_MOST_BYTES", most_bytes)
    assert_right(keeping(weight), tmp_path, "last", may_skip=PLAIN)


@pytest.mark.parametrize("weight", OF_ROWS, ids=lambda weight: weight.__name__)
def test_very_many_items(weight, tmp_path, monkeypatch):
    """All are looked at in the first steps, and from the first change on."""
    monkeypatch.setattr(visitor, "_MOST_VALUES", 10)
    monkeypatch.setattr(visitor, "_MOST_OTHERS", 10)
    assert_right(keeping(weight), tmp_path, "last")


@pytest.mark.parametrize("weight", [a_history_of_each_row, a_list_that_has_grown])
def test_many_items_are_not_copied_one_by_one(weight, tmp_path, monkeypatch):
    """Containers never are; tensors in the first steps, in which all are copied, and then only new ones."""
    before_pass_1, numbers = PassState.before_pass_1, []

    def counted(self):
        before = before_pass_1(self)
        numbers.append(sum(entry.name.startswith("trainer.kept") for entry in before.entries))
        return before

    monkeypatch.setattr(PassState, "before_pass_1", counted)
    follow(keeping(weight), tmp_path, LAST, max_steps=3)
    are_tensors = weight is a_list_that_has_grown
    assert [number >= 100 for number in numbers] == [are_tensors, are_tensors, False]
    assert numbers[2] < 5


def test_a_history_that_gets_more_rows_in_a_longer_training(tmp_path):
    """Steps 5 to 7 are in a row without a look at everything."""
    mine, plain = (
        follow(keeping(a_history_that_gets_more_rows), tmp_path / name, config, max_steps=7).trainer.kept
        for name, config in (("mine", LAST), ("plain", None))
    )
    assert {row: len(values) for row, values in mine.items()} == {row: len(values) for row, values in plain.items()}
    assert len(plain) == 107


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    "weight", [a_counter, a_deque, a_torch_generator, *SHARED], ids=lambda weight: weight.__name__
)
def test_with_next_to_no_rho_it_is_the_plain_trainer(weight, accumulation, tmp_path):
    assert_as_plain(keeping(weight), tmp_path, accumulation)


@pytest.mark.parametrize("weight", [a_counter, a_deque, nested_objects], ids=lambda weight: weight.__name__)
def test_each_micro_batch_perturbed_by_itself(weight, tmp_path):
    assert_literal(follow(keeping(weight), tmp_path, {**LAST, "sharpness_scope": "micro_batch"}, 2))


@pytest.mark.parametrize("weight", [a_list, a_deque, a_set, an_array, nested_objects, a_torch_generator])
def test_what_is_kept_elsewhere_too_stays_the_same_object(weight, tmp_path):
    """A list that a callback or a script holds as well counts once, and goes on to be the trainer's."""
    mine, others = KEPT[weight](), KEPT[weight]()
    begins = [lambda self, model, kept=kept: setattr(self, "kept", kept) for kept in (mine, others)]
    ours, plain = (type("Shared", (keeping(weight),), {"begin": begin}) for begin in begins)
    run = follow(ours, tmp_path, {**LAST, "rho": 1e-9})
    follow(plain, tmp_path)
    assert run.trainer.kept is mine
    assert alike(flat(mine), flat(others), 1e-7)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_what_a_module_keeps_in_an_object_with_slots(accumulation, tmp_path):
    """Each micro-batch begins with what the one before it left, in pass 2, too."""

    class OnTheModel(Situation):
        def begin(self, model):
            model.own = Slotted()

        def loss(self, model, batch, items):
            model.own.calls += 1
            return model(**batch).loss * model.own.calls

    assert_as_plain(OnTheModel, tmp_path, accumulation)


def test_tensors_that_a_model_assigns_anew_are_not_kept(tmp_path):
    class Last(Net):
        def forward(self, input_ids, attention_mask=None, labels=None):
            output = super().forward(input_ids, attention_mask, labels)
            self.loss, self.many = output.loss.detach(), torch.zeros(2000)
            return output

    class Assigned(Situation):
        new = Last

    state = follow(Assigned, tmp_path, LAST, max_steps=15).trainer._lsam.second_pass.state
    kept = [named[1] for named in (*state._of_modules.values(), *state._changing.values())]
    # Those of the last step at which everything was looked at.
    assert sum(isinstance(thing, torch.Tensor) for thing in kept) < 8


@pytest.mark.parametrize("first_call", range(7))
def test_what_a_hook_begins_to_keep_later(first_call, tmp_path):
    class Collector:
        def __init__(self):
            self.calls, self.seen = 0, []

        def __call__(self, module, args, output):
            self.calls += 1
            if self.calls > first_call:
                self.seen.append(self.calls)

    collectors = out_of_reach(own=Collector())

    class Hooked(Situation):
        def begin(self, model):
            model.head.register_forward_hook(collectors.own)

    follow(Hooked, tmp_path, LAST, max_steps=9)
    assert collectors.own.calls == 9 and collectors.own.seen == [*range(first_call + 1, 10)]


TOTAL = 0


class Keeps(Net):
    """A model that begins at some call to keep something: for each label, in its class, and in a global variable."""

    total = 0

    def __init__(self, first_call=0):
        super().__init__()
        self.first_call, self.calls, self.late = first_call, 0, []
        self.meters, self.history = [Slotted() for _ in range(3)], {label: [] for label in range(100)}
        self.counts = [0, 0, 0]

    def forward(self, input_ids, attention_mask=None, labels=None):
        global TOTAL
        self.calls += 1
        if self.calls > self.first_call:
            TOTAL += 1
            Keeps.total += 1
            self.late.append(1)
            self.meters[self.calls % 3].calls += 1
            self.counts[self.calls % 3] += 1
            self.history[self.calls].append(1)
        return super().forward(input_ids, attention_mask, labels)


MODELS = out_of_reach(keeps=Keeps)  # no other way than the model leads to its class


@pytest.mark.parametrize("first_step", range(7))
def test_what_is_attached_to_the_model_of_a_library_later(first_step, tmp_path):
    class Attached(Situation):
        @staticmethod
        def new():
            return bert().double()

        def begin(self, model):
            model.meters, model.calls = [Slotted() for _ in range(3)], 0

        def loss(self, model, batch, items):
            if self.state.global_step >= first_step:
                model.calls += 1
                model.meters[model.calls % 3].calls += 1
            return model(**batch).loss

    model = follow(Attached, tmp_path, LAST, max_steps=9).trainer.model
    assert model.calls == sum(meter.calls for meter in model.meters) == 9 - first_step


@pytest.mark.parametrize("first_call", range(7))
def test_what_a_model_begins_to_keep_later(first_call, tmp_path):
    class Owned(Situation):
        @staticmethod
        def new():
            return MODELS.keeps(first_call)

    global TOTAL
    TOTAL = Keeps.total = 0
    model = follow(Owned, tmp_path, LAST, max_steps=9).trainer.model
    assert model.calls == 9
    counts = [len(model.late), sum(meter.calls for meter in model.meters), sum(model.counts), Keeps.total, TOTAL]
    assert {*counts, sum(map(len, model.history.values()))} == {9 - first_call}
