"""Blocks in any order, and weights that are used in two places: what only moved weights show."""

import numpy as np
import pytest
import torch
from literal_step import assert_right
from situations import ALL, LAST, TOP, Net, Situation, follow, told
from tiny import out_of_reach
from torch import nn


class Ordered(Net):
    """Calls its blocks in an order of its own."""

    order: tuple[int, ...] = ()

    def run(self, x):
        for index in self.order:
            x = self.blocks[index](x)
        return x


class LateFirst(Net):
    """Uses a part of its last block before the first one."""

    def run(self, x):
        return super().run(x + torch.tanh(self.blocks[-1].up(x)))


class Functional(Net):
    """Uses a weight of its last block before the first one, by a function."""

    def run(self, x):
        return super().run(x + torch.tanh(x @ self.blocks[-1].down.weight))


class TiedToTheEmbedding(Net):
    """The last block looks up in the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.blocks[-1].table = nn.Linear(8, 64, bias=False, dtype=torch.float64)
        self.blocks[-1].table.weight = self.embedding.weight
        self.blocks[-1].register_forward_hook(
            lambda block, inputs, output: output + block.table(output).softmax(-1).mean()
        )


class TiedToTheFirst(Net):
    """The last block shares a weight with the first one."""

    def __init__(self):
        super().__init__()
        self.blocks[-1].up.weight = self.blocks[0].up.weight


class TiedToTheHead(Net):
    """The head is a part of the last block, by a function."""

    def __init__(self):
        super().__init__()
        del self.head
        self.head = lambda x: x @ self.blocks[-1].down.weight[:3].T


class Conditions(Net):
    """What the late blocks think of the tokens decides how the early ones run: detached, and so without a gradient."""

    def run(self, x):
        with torch.no_grad():
            gate = super().run(x).mean().sigmoid()
        return super().run(gate * x)


ORDERS = [(3, 0, 1, 2), (3, 2, 1, 0), (0, 1, 2, 3, 0, 1), (0, 3, 1, 2, 3), (1, 3), (2, 2, 2)]


@pytest.mark.parametrize("way", ["plain", "last", "top_k, two", "budget, two", "all, two"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_blocks_in_any_order(order, way, tmp_path):
    net = type("Net", (Ordered,), {"order": order})
    assert_right(type("Orders", (Situation,), {"new": net, "in_order": False}), tmp_path, way)


NETS = [LateFirst, Functional, TiedToTheEmbedding, TiedToTheFirst, TiedToTheHead, Conditions]


@pytest.mark.parametrize("way", ["plain", "last", "last, two", "top_k, two", "budget, two", "all, two"])
@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_what_only_moved_weights_show(net, way, tmp_path):
    """At the weights of pass 1 a replay of the first blocks is right; where the late ones are moved it is not."""
    assert_right(type("Showing", (Situation,), {"new": net}), tmp_path, way)


class Switched(LateFirst):
    """The same where it is asked to."""

    def forward(self, input_ids, attention_mask=None, labels=None, late=False):
        self.late = late
        return super().forward(input_ids, attention_mask, labels)

    def run(self, x):
        return super().run(x) if self.late else Net.run(self, x)


@pytest.mark.parametrize("way", ["last", "last, two"])
@pytest.mark.parametrize("step", [1, 2])
def test_a_model_that_begins_to_use_a_late_block_early(step, way, tmp_path):
    class Switches(Situation):
        new = Switched

        def loss(self, model, batch, items):
            return model(**batch, late=self.state.global_step >= step).loss

    assert_right(Switches, tmp_path, way)


EMBEDDING_AND_HEAD = dict(block_pattern="embedding|head", num_perturbed_blocks=2, rho=0.5)


@pytest.mark.parametrize("config", [LAST, TOP, ALL, EMBEDDING_AND_HEAD], ids=["last", "top_k", "all", "pattern"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_generator_out_of_reach_is_warned_about(config, accumulation, tmp_path):
    """Pass 2 is not right there, and nothing says that it is."""
    notes = out_of_reach(generator=np.random.default_rng(0))

    class Draws(Situation):
        def loss(self, model, batch, items):
            output = model(**batch)
            return output.loss + notes.generator.uniform() * output.logits.square().mean()

    run = follow(Draws, tmp_path, config, accumulation)
    assert told(run.messages, "does not repeat")
    assert not told(run.messages, r"\bright\b")
