"""Blocks of any make: complex weights, scripted ones, observers, and outputs that are no tensors."""

import warnings
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from literal_step import assert_literal, assert_right
from situations import ALL, BUDGET, LAST, TOP, Block, Net, Situation, follow
from torch import nn

WAYS = ["plain", "last", "last, two", "top_k, two", "budget, two", "all, two"]


def of(block: type[nn.Module], net: type[Net] = Net) -> type[Situation]:
    return type("Blocks", (Situation,), {"new": type("Net", (net,), {"block": block})})


class Spectral(Block):
    """A filter with complex weights, as of spectral layers."""

    def __init__(self, width):
        super().__init__(width)
        self.filter = nn.Parameter(torch.randn(5, width, dtype=torch.complex128))

    def forward(self, x):
        mixed = torch.fft.irfft(torch.fft.rfft(x, dim=1) * self.filter, n=x.shape[1], dim=1)
        return super().forward(x + 0.1 * mixed)


COMPLEX = {
    "plain": None,
    "last": LAST,
    "top_k": TOP,
    "all": ALL,
    "budget": BUDGET,
    "adaptive": {**LAST, "adaptive": True},
    "adaptive, alpha": {**TOP, "adaptive": True},
    "own": {**LAST, "sharpness_scope": "micro_batch"},
}


@pytest.mark.parametrize("way", COMPLEX)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_complex_weights(way, accumulation, tmp_path):
    """The literal step, or a refusal before the first one that names them."""
    begun = []
    situation = type(
        "Complex", (of(Spectral),), {"step": lambda self, model, batch, once: begun.append(1) or once(batch)}
    )
    try:
        run = follow(situation, tmp_path, COMPLEX[way], accumulation)
    except (ValueError, NotImplementedError) as error:
        assert "complex" in str(error) and not begun and way != "plain"
    else:
        assert_literal(run)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "config", [None, {**LAST, "adaptive": True}, {**TOP, "adaptive": True}], ids=["0", "1", "0.5"]
)
def test_the_literal_step_of_adaptive(config, accumulation, tmp_path):
    """What the test above holds complex weights to holds of real ones."""
    assert_literal(follow(Situation, tmp_path, config, accumulation))


class Complexly(Block):
    def forward(self, x):
        return torch.complex(super().forward(x.real), torch.tanh(x.imag) + x.real)


class HandsOnComplex(Net):
    block = Complexly

    def run(self, x):
        return super().run(torch.complex(x, torch.zeros_like(x))).abs()


@pytest.mark.parametrize("way", WAYS)
def test_complex_numbers_between_blocks(way, tmp_path):
    assert_right(type("Between", (Situation,), {"new": HandsOnComplex}), tmp_path, way)


class Scripted(Net):
    """Each block is compiled by TorchScript."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.blocks = nn.ModuleList([torch.jit.script(block) for block in self.blocks])


class Traced(Net):
    """Each block is traced."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            example = torch.randn(4, 8, 8, dtype=torch.float64)
            self.blocks = nn.ModuleList([torch.jit.trace(block, example) for block in self.blocks])


class Normed(Block):
    def __init__(self, width):
        super().__init__(width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        y = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return y + self.down(torch.tanh(self.up(y)))


class ScriptedNorms(Scripted):
    """The same with running statistics."""

    block = Normed


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("net", [Scripted, Traced, ScriptedNorms], ids=lambda net: net.__name__)
def test_scripted_blocks(net, way, tmp_path):
    # The Trainer's own optimizer does not get at the weights of scripted modules.
    own = {"new": net, "optimizer_of": staticmethod(lambda model: torch.optim.SGD(model.parameters(), lr=0.1))}
    assert_right(type("Scripts", (Situation,), own), tmp_path, way)


class Observed(Block):
    """An observer of torch.ao, whose buffers are empty at first, sets the scale of what the block returns."""

    def __init__(self, width):
        super().__init__(width)
        observers = pytest.importorskip("torch.ao.quantization.observer")
        self.observer = observers.PerChannelMinMaxObserver(ch_axis=2).double()

    def forward(self, x):
        y = super().forward(x)
        if self.training:
            self.observer(y.detach())
        return y / (1 + self.observer.max_val.abs())


class Rounds(Block):
    """Fake quantisation: rounded forward, as it is backward, with a range that follows the data."""

    def __init__(self, width):
        super().__init__(width)
        self.register_buffer("range", torch.tensor([]))

    def forward(self, x):
        y = super().forward(x)
        if self.training:
            seen = y.detach().abs().amax((0, 1))
            if self.range.numel() == 0:
                self.range.resize_(seen.shape).copy_(seen)
            else:
                self.range.copy_(torch.maximum(0.9 * self.range, seen))
        width = self.range / 8
        return y + (torch.round(y / width) * width - y).detach()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("block", [Observed, Rounds], ids=lambda block: block.__name__)
def test_observers(block, way, tmp_path):
    assert_right(of(block), tmp_path, way)


@dataclass
class State:
    hidden: torch.Tensor
    depth: int = 0


class Plain:
    def __init__(self, hidden):
        self.hidden = hidden


Pair = namedtuple("Pair", ["hidden", "other"])


def writes_to_a_dictionary(block, state):
    state["hidden"] = block(state["hidden"])
    return state


def returns_a_dictionary(block, state):
    return {"hidden": block(state["hidden"]), "depth": state.get("depth", 0) + 1}


def writes_to_a_list(block, state):
    state.append(block(state[-1]))
    return state


def returns_a_tuple(block, state):
    return block(state[0]), None, len(state)


def returns_a_named_tuple(block, state):
    return Pair(block(state[0]), state[0].detach())


def returns_a_dataclass(block, state):
    return State(block(state.hidden), state.depth + 1)


def writes_to_a_dataclass(block, state):
    state.hidden, state.depth = block(state.hidden), state.depth + 1
    return state


def returns_an_object(block, state):
    return Plain(block(state.hidden))


def writes_to_an_object(block, state):
    state.hidden = block(state.hidden)
    return state


def writes_and_returns_nothing(block, state):
    state["hidden"] = block(state["hidden"])


def returns_nested(block, state):
    return {"deep": [{"hidden": block(state["deep"][0]["hidden"])}, None]}


def writes_in_place(block, state):
    return block(state).mul_(1.1)


def gets_and_gives_a_pair(block, state):
    hidden, residual = state
    residual = hidden + residual
    return block(residual) - residual, residual


# How a block hands on, what the first one gets, what the model reads at last, and what the model does in between.
HANDS = {
    writes_to_a_dictionary: (lambda x: {"hidden": x}, lambda state: state["hidden"]),
    returns_a_dictionary: (lambda x: {"hidden": x}, lambda state: state["hidden"] * state["depth"]),
    writes_to_a_list: (lambda x: [x], lambda state: sum(state)),
    returns_a_tuple: (lambda x: (x,), lambda state: state[0]),
    returns_a_named_tuple: (lambda x: Pair(x, x), lambda state: state.hidden + state.other),
    returns_a_dataclass: (State, lambda state: state.hidden * state.depth),
    writes_to_a_dataclass: (State, lambda state: state.hidden * state.depth),
    returns_an_object: (Plain, lambda state: state.hidden),
    writes_to_an_object: (Plain, lambda state: state.hidden),
    writes_and_returns_nothing: (lambda x: {"hidden": x}, lambda state: state["hidden"]),
    returns_nested: (lambda x: {"deep": [{"hidden": x}]}, lambda state: state["deep"][0]["hidden"]),
    writes_in_place: (lambda x: x, lambda state: state),
    gets_and_gives_a_pair: (lambda x: (x, 0 * x), lambda state: state[0] + state[1]),
}


def scaled(state):
    """The model writes to what the block returned."""
    if isinstance(state, dict) and "hidden" in state:
        state["hidden"] = state["hidden"] * 1.1
    elif isinstance(state, torch.Tensor):
        state.add_(0.1)
    elif isinstance(state, (State, Plain)):
        state.hidden = state.hidden * 1.1
    return state


def handing(hand, between) -> type[Situation]:
    class Hands(Block):
        def forward(self, state):
            return hand(super().forward, state)

    class HandsNet(Net):
        block = Hands

        def run(self, x):
            begin, end = HANDS[hand]
            state = begin(x)
            for block in self.blocks:
                given = block(state)
                state = between(state if given is None else given)
            return end(state)

    return type("Handing", (Situation,), {"new": HandsNet})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("between", [lambda state: state, scaled], ids=["handed on", "written to"])
@pytest.mark.parametrize("hand", HANDS, ids=lambda hand: hand.__name__)
def test_what_blocks_hand_on(hand, between, way, tmp_path):
    assert_right(handing(hand, between), tmp_path, way)
