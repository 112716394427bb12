"""As in `kept.py`, in containers that are large: an item for each row of the data, or many tensors."""

from collections import defaultdict

import torch
from kept import Holder, mean


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


def a_mean_of_each_row(self, output, batch):
    for row in rows_of(batch):
        self.kept[row].mul_(0.5).add_(mean(output))
    return sum(self.kept[row].abs().sum() for row in rows_of(batch)) / 10


def a_nested_history_of_each_row(self, output, batch):
    for row in rows_of(batch):
        self.kept[row]["losses"].append(float(output.loss.detach()))
    return sum(sum(self.kept[row]["losses"]) for row in rows_of(batch)) / 10


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
}
# What begins to change in the third step, of which there is no copy then: that step is plain.
LATER = {
    a_history_beside_a_large_tensor: lambda: {
        **{row: [] for row in range(100)},
        "bank": torch.zeros(1000, 3, dtype=float64),
    },
}
