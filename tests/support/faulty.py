"""A model in which something goes wrong once, and what can be drawn: its shape, the settings, and the fault."""

import copy
import math
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_outputs import ModelOutput

WIDTH, VOCABULARY, STEPS = 4, 8, 3


class Injected(Exception):
    pass


@dataclass
class Fault:
    """What happens once, in a pass over a micro-batch of a step, at a block: an error, or numbers that are no more."""

    kind: str
    step: int
    micro_batch: int
    in_pass: int
    block: int
    where: str
    fired: bool = False
    # Whether the weights were elsewhere when it did.
    moved: bool = False
    now: tuple[int, int, int] = (-1, -1, -1)
    model: nn.Module | None = None
    places: list[int] = field(default_factory=list)
    # As something that other threads use, it is not put back after pass 2.
    lock: Any = field(default_factory=threading.Lock)

    def __deepcopy__(self, memo: dict) -> "Fault":
        copied = memo[id(self)] = replace(self, places=list(self.places), lock=threading.Lock())
        copied.model = copy.deepcopy(self.model, memo)
        return copied

    def visit(self, block: int, output: torch.Tensor) -> torch.Tensor:
        if self.fired or self.block != block or self.now != (self.step, self.micro_batch, self.in_pass):
            return output
        if self.where == "forward":
            return self.strike(output)
        if output.requires_grad:
            output.register_hook(self.strike)
        return output

    def strike(self, tensor: torch.Tensor) -> torch.Tensor:
        self.fired, self.moved = True, self.places != places(self.model)
        if self.kind in ("error", "interrupt"):
            raise Injected if self.kind == "error" else KeyboardInterrupt
        return tensor * {"nan": math.nan, "inf": math.inf}[self.kind]


def places(model: nn.Module) -> list[int]:
    return [p.data_ptr() for p in model.parameters()]


class Block(nn.Module):
    def __init__(self, index: int, dropout: float, fault: Fault):
        super().__init__()
        self.index, self.fault, self.dropout = index, fault, nn.Dropout(dropout)
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.fault.visit(self.index, x + self.dropout(self.down(torch.tanh(self.up(x)))))


class Net(nn.Module):
    def __init__(self, blocks: int, dropout: float, tied: bool, fault: Fault):
        super().__init__()
        self.fault = fault
        fault.model = self
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(index, dropout, fault) for index in range(blocks)])
        self.head = nn.Linear(WIDTH, VOCABULARY)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return ModelOutput(loss=nn.functional.cross_entropy(self.head(x).double().flatten(0, 1), tokens.flatten()))


@dataclass
class Case:
    seed: int
    dtype: torch.dtype
    blocks: int
    dropout: float
    tied: bool
    frozen: list[str]
    config: dict[str, Any]
    accumulation: int
    optimizer_fails: bool
    checked: bool
    fault: Fault


@st.composite
def cases(draw, kind: str) -> Case:
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    blocks, accumulation = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    selection = pick("top_k", "last", "budget", "all")
    method = pick("two passes", "two passes", "one pass", "looksam")
    config = {"block_selection": selection, "rho": 10.0 ** draw(st.integers(-3, 1))}
    if selection != "all":
        config["num_perturbed_blocks"] = pick(1, 2, None)
    if selection == "budget":
        config["max_overhead"] = pick(0.9, 1.5)
    if method == "one pass":
        config["ascent_gradient"] = "previous"
    elif method == "looksam":
        config |= {"perturb_interval": 2, "reuse_correction": 0.7}
    else:
        config |= {"alpha": pick(1.0, 0.3), "sharpness_scope": pick("batch", "micro_batch")}
        config["perturb_interval"] = pick(1, 1, 2)
    config["adaptive"] = pick(False, False, True)
    # Of the blocks only single weights, so that each of them stays a candidate.
    names = ["embedding.weight", "head.bias", *(f"blocks.{index}.up.bias" for index in range(blocks))]
    fault = Fault(
        kind=kind,
        step=draw(st.integers(0, STEPS - 1)),
        micro_batch=draw(st.integers(0, accumulation - 1)),
        in_pass=1 if method == "one pass" else pick(2, 2, 1),
        block=draw(st.integers(0, blocks - 1)),
        where=pick("forward", "backward"),
    )
    return Case(
        seed=draw(st.integers(0, 99)),
        dtype=pick(torch.float64, torch.float32, torch.bfloat16),
        blocks=blocks,
        dropout=pick(0.3, 0.3, 0.0),
        tied=draw(st.booleans()),
        frozen=draw(st.lists(st.sampled_from(names), unique=True, max_size=3)),
        config=config,
        accumulation=accumulation,
        optimizer_fails=draw(st.booleans()),
        checked=draw(st.booleans()),
        fault=fault,
    )


def tokens(case: Case, number: int, micro_batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * number + micro_batch)
    return torch.randint(0, VOCABULARY, (2, 3), generator=generator)
