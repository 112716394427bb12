"""As in `kept.py`, in containers that are large: an item for each row of the data, or many tensors."""

from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import torch
from kept import Holder, Slotted, mean


def rows_of(batch):
    return [total % 100 for total in batch["input_ids"].sum(1).tolist()]


def a_history_of_each_row(self, output, batch):
    for row in rows_of(batch):
        self.kept[row].append(float(output.loss.detach()))
    return sum(sum(self.kept[row]) for row in rows_of(batch)) / 10


def a_history_that_gets_more_rows(self, output, batch):
    new, first = len(self.kept), rows_of(batch)[0]
    self.kept[new].append(float(output.loss.detach()))
    self.kept[new - 100].append(1.0)
    self.kept[first] = [*self.kept[first], 2.0]
    return (sum(self.kept[new - 100]) + sum(self.kept[first]) + new) / 100


def a_history_beside_a_large_tensor(self, output, batch):
    self.kept[rows_of(batch)[0]].append(1.0)
    if self.state.global_step >= 2:
        self.kept["bank"].add_(mean(output))
    return len(self.kept[rows_of(batch)[0]]) / 10 + self.kept["bank"][0].abs().sum()


def a_meter_of_each_row(self, output, batch):
    for row in rows_of(batch):
        self.kept[row].calls += 1
    return sum(self.kept[row].calls for row in rows_of(batch)) / 10


def a_meter_with_slots_of_each_row(self, output, batch):
    return a_meter_of_each_row(self, output, batch)


def a_mean_of_each_row(self, output, batch):
    for row in rows_of(batch):
        self.kept[row].mul_(0.5).add_(mean(output))
    return sum(self.kept[row].abs().sum() for row in rows_of(batch)) / 10


def a_nested_history_of_each_row(self, output, batch):
    for row in rows_of(batch):
        self.kept[row]["losses"].append(float(output.loss.detach()))
    return sum(sum(self.kept[row]["losses"]) for row in rows_of(batch)) / 10


def a_count_of_each_row(self, output, batch):
    for row in rows_of(batch):
        self.kept[row]["rows"] += 1
    return sum(self.kept[row]["rows"] for row in rows_of(batch)) / 10


def a_list_in_a_tuple_of_each_row(self, output, batch):
    for row in rows_of(batch):
        self.kept[row][1].append(1.0)
    return sum(sum(self.kept[row][1]) for row in rows_of(batch)) / 10


def a_list_in_an_object_of_each_row(self, output, batch):
    for row in rows_of(batch):
        self.kept[row].inner.append(1.0)
    return sum(sum(self.kept[row].inner) for row in rows_of(batch)) / 10


def a_set_of_each_row(self, output, batch):
    for row in rows_of(batch):
        self.kept[row].add(self.state.global_step + len(self.kept[row]))
    return sum(sum(self.kept[row]) for row in rows_of(batch)) / 10


def the_last_losses_of_each_row(self, output, batch):
    for row in rows_of(batch):
        self.kept[row].rotate()
        self.kept[row].append(float(output.loss.detach()))
    return sum(self.kept[row][0] for row in rows_of(batch)) / 10


def a_counter_of_each_row(self, output, batch):
    for row in rows_of(batch):
        self.kept[row].update(["calls"])
    return sum(self.kept[row]["calls"] for row in rows_of(batch)) / 10


def rows_in_an_order(self, output, batch):
    for row in rows_of(batch):
        self.kept[row].append(1.0)
        self.kept.move_to_end(row)
    return sum(place * sum(losses) for place, losses in enumerate(self.kept.values())) / 1000


def objects_with_a_number_of_their_class(self, output, batch):
    for row in rows_of(batch):
        type(self.kept[row]).calls += 1
    return type(self.kept[0]).calls / 10


def the_best_row(self, output, batch):
    """Its objects cannot be compared with each other."""
    for row in rows_of(batch):
        self.kept[row] = Incomparable(self.kept[row].loss + 1)
    return sum(self.kept[row].loss for row in rows_of(batch)) / 10


class Incomparable:
    def __init__(self, loss):
        self.loss = loss

    def __eq__(self, other):
        raise ArithmeticError("not to be compared")


class Row(Holder):
    def __repr__(self):
        return f"row {self.number}"


def a_number_of_a_key(self, output, batch):
    key = [*self.kept][rows_of(batch)[0]]
    key.calls += 1
    return key.calls / 10


def an_array_of_each_row(self, output, batch):
    for row in rows_of(batch):
        self.kept[row] += 1
    return sum(float(self.kept[row].sum()) for row in rows_of(batch)) / 10


def new_lists_of_each_row(self, output, batch):
    """One list takes the place of another, and gets an item in the next pass."""
    for row in rows_of(batch):
        self.kept[row]["now"].append(1.0)
        self.kept[row]["now"] = [*self.kept[row]["now"]]
    return sum(sum(self.kept[row]["now"]) for row in rows_of(batch)) / 10


def a_list_that_has_grown(self, output, batch):
    self.kept.append(mean(output))
    return (self.kept[-1] - self.kept[-2]).abs().sum()


float64 = torch.float64
OF_ROWS = {
    a_history_of_each_row: lambda: {row: [] for row in range(100)},
    a_history_that_gets_more_rows: lambda: defaultdict(list, {row: [] for row in range(100)}),
    a_meter_of_each_row: lambda: [Holder(calls=0) for _ in range(100)],
    a_mean_of_each_row: lambda: [torch.zeros(3, dtype=float64) for _ in range(100)],
    a_list_that_has_grown: lambda: [torch.zeros(3, dtype=float64) for _ in range(100)],
    a_nested_history_of_each_row: lambda: {row: {"losses": []} for row in range(100)},
    a_count_of_each_row: lambda: [{"rows": 0} for _ in range(100)],
    a_list_in_a_tuple_of_each_row: lambda: {row: ("losses", []) for row in range(100)},
    a_list_in_an_object_of_each_row: lambda: [Holder(inner=[]) for _ in range(100)],
    a_meter_with_slots_of_each_row: lambda: [Slotted() for _ in range(100)],
    an_array_of_each_row: lambda: [np.zeros(2) for _ in range(100)],
    a_set_of_each_row: lambda: [set() for _ in range(100)],
    the_last_losses_of_each_row: lambda: tuple(deque([0.0, 1.0, 2.0], 3) for _ in range(100)),
    a_counter_of_each_row: lambda: [Counter() for _ in range(100)],
    rows_in_an_order: lambda: OrderedDict((row, []) for row in range(100)),
    objects_with_a_number_of_their_class: lambda: [type("Row", (), {"calls": 0})() for _ in range(100)],
    the_best_row: lambda: [Incomparable(0) for _ in range(100)],
    a_number_of_a_key: lambda: {Row(number=row, calls=0): row for row in range(100)},
    new_lists_of_each_row: lambda: {row: {"now": []} for row in range(100)},
}
# What begins to change in the third step, of which there is no copy then: that step is plain.
LATER = {
    a_history_beside_a_large_tensor: lambda: {
        **{row: [] for row in range(100)},
        "bank": torch.zeros(1000, 3, dtype=float64),
    },
}
