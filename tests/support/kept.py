"""What users' trainers keep from pass to pass, and the weight of a second part of the loss that depends on it."""

from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from situations import Situation
from torch import nn


class Weighs(Situation):
    """The loss has a second part, whose weight depends on what the trainer keeps."""

    first_step = 0

    def weight(self, output, batch):
        raise NotImplementedError

    def loss(self, model, batch, items):
        output = model(**batch)
        if self.state.global_step < self.first_step:
            return output.loss
        return output.loss + self.weight(output, batch) * output.logits.square().mean()


class Holder:
    def __init__(self, **attributes):
        vars(self).update(attributes)


@dataclass
class Progress:
    rows: int = 0
    losses: list = field(default_factory=list)


class Slotted:
    __slots__ = ("calls", "mean")

    def __init__(self):
        self.calls, self.mean = 0, torch.zeros(3, dtype=torch.float64)


class SlottedPrivately:
    __slots__ = "__calls"

    def __init__(self):
        self.__calls = 0

    def count(self):
        self.__calls += 1
        return self.__calls


class Annealer:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.calls / 10


class Values(nn.Module):
    """A metric of a library that keeps all values, as `torchmetrics.CatMetric` does."""

    __module__ = "evaluate.metrics"

    def __init__(self):
        super().__init__()
        self.values, self.updates = [], 0

    def forward(self, value):
        self.values.append(float(value))
        self.updates += 1
        return sum(self.values) / self.updates


def mean(output):
    return output.logits.detach().mean(0)


def a_counter(self, output, batch):
    self.kept += 1
    return self.kept % 2


def a_list(self, output, batch):
    self.kept.append(float(output.loss.detach()))
    return sum(self.kept[-3:])


def a_deque(self, output, batch):
    self.kept.append(output.logits.detach())
    return torch.stack(list(self.kept)).mean(0).abs().sum()


def a_dictionary_of_tensors(self, output, batch):
    self.kept["mean"].mul_(0.5).add_(mean(output))
    self.kept["deep"]["last"] = mean(output) + self.kept["deep"]["last"]
    return (self.kept["mean"] * self.kept["deep"]["last"]).sum()


def an_array(self, output, batch):
    self.kept *= 0.5
    self.kept += mean(output).numpy()
    return float(np.abs(self.kept).sum())


def a_tensor_assigned_anew(self, output, batch):
    self.kept = torch.cat([output.logits.detach(), self.kept])[:10]
    return self.kept.abs().sum() / 10


def a_tensor_written_through_data(self, output, batch):
    self.kept.data = 0.5 * self.kept.data + mean(output)
    self.kept.data.add_(1)
    return self.kept.abs().sum() / 10


def nested_objects(self, output, batch):
    self.kept.inner.values.append(float(output.loss.detach()))
    self.kept.inner.total += 1
    self.kept.deep["inner"].mean.add_(mean(output))
    return self.kept.inner.total * sum(self.kept.inner.values) / 10 + self.kept.deep["inner"].mean.abs().sum()


def a_schedule(self, output, batch):
    return self.kept()


def a_dataclass(self, output, batch):
    self.kept.rows += len(batch["labels"])
    self.kept.losses.append(float(output.loss.detach()))
    return self.kept.rows / 10 + sum(self.kept.losses)


def an_object_with_slots(self, output, batch):
    self.kept.calls += 1
    self.kept.mean += mean(output)
    return self.kept.calls / 10 + self.kept.mean.abs().sum()


def an_object_with_a_private_slot(self, output, batch):
    return self.kept.count() / 10


def a_set(self, output, batch):
    self.kept.update(batch["input_ids"][:, 0].tolist())
    return len(self.kept) / 10


def a_bag(self, output, batch):
    self.kept["tokens"].update(batch["input_ids"].flatten().tolist())
    return max(self.kept["tokens"].values()) / 10


def an_order(self, output, batch):
    self.kept.move_to_end(next(iter(self.kept)))
    return self.kept[next(iter(self.kept))]


def a_numpy_generator(self, output, batch):
    return float(self.kept.uniform())


def a_torch_generator(self, output, batch):
    return torch.rand((), generator=self.kept)


def a_python_generator(self, output, batch):
    return self.kept.random()


def a_metric_module(self, output, batch):
    self.kept(output.logits.detach())
    return self.kept.running_mean.abs().sum()


def a_metric_of_a_library(self, output, batch):
    return self.kept(output.loss.detach())


def an_attribute_made_later(self, output, batch):
    self.kept = mean(output) if not hasattr(self, "kept") else 0.5 * self.kept + mean(output)
    return self.kept.abs().sum()


def an_attribute_that_goes(self, output, batch):
    if not hasattr(self, "kept"):
        return 0.5
    del self.kept
    return 2.0


def two_names_for_one_list(self, output, batch):
    self.kept.append(1.0)
    assert self.kept is self.other
    return len(self.other) / 10


def an_attribute_of_the_class(self, output, batch):
    self.calls += 1
    return self.calls / 10


def an_object_whose_class_begins_at_zero(self, output, batch):
    self.kept.calls += 1
    return self.kept.calls / 10


def a_dictionary_with_attributes(self, output, batch):
    self.kept.calls = getattr(self.kept, "calls", 0) + 1
    self.kept["rows"] = self.kept.get("rows", 0) + len(batch["labels"])
    return self.kept.calls / 10 + self.kept["rows"] / 40


def bytes_that_grow(self, output, batch):
    self.kept.append(1)
    return len(self.kept) / 10


def a_function_that_counts(self, output, batch):
    return self.kept() / 10


float64 = torch.float64
# What the trainer keeps at first (`None`: nothing), and the weight that the loss has by it.
KEPT = {
    a_counter: lambda: 0,
    a_list: list,
    a_deque: lambda: deque(maxlen=3),
    a_dictionary_of_tensors: lambda: {
        "mean": torch.zeros(3, dtype=float64),
        "deep": {"last": torch.ones(3, dtype=float64)},
    },
    an_array: lambda: np.zeros(3),
    a_tensor_assigned_anew: lambda: torch.zeros(0, 3, dtype=float64),
    a_tensor_written_through_data: lambda: torch.zeros(3, dtype=float64),
    nested_objects: lambda: Holder(inner=Holder(total=0, values=[]), deep={"inner": Slotted()}),
    a_schedule: Annealer,
    a_dataclass: Progress,
    an_object_with_slots: Slotted,
    an_object_with_a_private_slot: SlottedPrivately,
    a_set: set,
    a_bag: lambda: defaultdict(Counter),
    an_order: lambda: OrderedDict(first=0.1, second=1.0, third=3.0),
    a_numpy_generator: lambda: np.random.default_rng(0),
    a_torch_generator: lambda: torch.Generator().manual_seed(0),
    a_python_generator: lambda: Random(0),
    a_metric_module: lambda: nn.BatchNorm1d(3, dtype=float64),
    a_metric_of_a_library: Values,
    an_attribute_made_later: None,
    an_attribute_that_goes: lambda: True,
    two_names_for_one_list: list,
    an_attribute_of_the_class: None,
    an_object_whose_class_begins_at_zero: type("Calls", (), {"calls": 0}),
    a_dictionary_with_attributes: type("Mapping", (dict,), {}),
    bytes_that_grow: bytearray,
}


def counting():
    """A function that counts its calls in its own attribute, and in a default."""

    def count(memo=[0]):  # noqa: B006
        count.calls += 1
        memo[0] += 1
        return count.calls + memo[0]

    count.calls = 0
    return count


# What the literal step, which copies all that it begins with, would share with the run.
SHARED = {
    a_function_that_counts: counting,
}
