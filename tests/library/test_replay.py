"""Promise 3: a replayed pass has bitwise the loss and the gradients of a full one, and runs no more than it says."""

import random

import numpy as np
import pytest
import torch
import transformers
import transformers as tf
from architectures import ARCHITECTURES, TOKENS, batch_for, model_of
from packaging import version
from tiny import assert_equal, bert, checkpoint, passes, random_states
from torch import nn

from hf_lsam.blocks import find_blocks
from hf_lsam.held import RandomState
from hf_lsam.replay import Replay, ReplayError

CPU = torch.device("cpu")
CHECKPOINTING = {"plain": None, "non-reentrant": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}


# The router logits of a mixture of experts are read inside its blocks, so it cannot be replayed: that is tested in
# `test_replayed_steps.py`. ResNet has no activation checkpointing.
@pytest.mark.parametrize(
    "name, checkpointing",
    [
        (n, c)
        for n in ARCHITECTURES
        for c in CHECKPOINTING
        if n != "mixtral" and (n, c == "plain") != ("resnet", False)
    ],
)
def test_replay_equals_a_full_pass(name, checkpointing):
    since = {"vit": "5.23", "bart": "5.0", "wav2vec2": "5.0"}.get(name, "0")
    if checkpointing == "reentrant" and version.parse(transformers.__version__) < version.parse(since):
        pytest.skip(f"before transformers {since} there is no gradient under reentrant checkpointing")
    model = model_of(name)
    if CHECKPOINTING[checkpointing] is not None:
        checkpoint(model, **CHECKPOINTING[checkpointing])
    blocks = list(find_blocks(model).values())
    run, take_gradients = passes(model, batch_for(name))
    replay = Replay(blocks, CPU)
    before = RandomState.capture(CPU)
    with replay.recording() as recording:
        first_loss = run()
    take_gradients()
    after = random_states()
    first = len(blocks) // 2
    with torch.no_grad():
        for parameter in blocks[first].parameters():
            parameter.add_(0.05)
    others = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in blocks[first].parameters())]
    for parameter in others:
        parameter.requires_grad_(False)

    before.restore()
    with replay.replaying(recording, None):
        full_loss = run()
    full = take_gradients()
    assert random_states() == after
    before.restore()
    with replay.replaying(recording, {first}):
        replayed_loss = run()
    replayed = take_gradients()

    assert random_states() == after
    assert torch.equal(replayed_loss, full_loss) and not torch.equal(full_loss, first_loss)
    assert_equal(replayed, full)
    assert all(bool(gradient.any()) or gradient.ndim < 2 for gradient in replayed.values())


def test_replayed_blocks_are_not_run():
    model = bert(dropout=0.1).train()
    blocks = list(find_blocks(model).values())
    run, _ = passes(model, {"input_ids": TOKENS, "labels": torch.tensor([0, 1])})
    replay, calls = Replay(blocks, CPU), []
    before = RandomState.capture(CPU)
    with replay.recording() as recording:
        run()
    for index, block in enumerate(blocks):
        block.output.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    before.restore()
    with replay.replaying(recording, {2, 3}):
        run()
    assert calls == [2, 3]


def test_forward_is_put_back():
    model = bert().train()
    blocks = list(find_blocks(model).values())
    own = blocks[1].forward = blocks[1].forward  # as accelerate's device hooks leave it
    replay = Replay(blocks, CPU)
    with pytest.raises(KeyboardInterrupt), replay.recording():
        raise KeyboardInterrupt
    assert "forward" not in vars(blocks[0])
    assert vars(blocks[1])["forward"] is own


def test_layer_drop():
    model = model_of("bart")
    model.model.encoder.layerdrop = model.model.decoder.layerdrop = 0.5
    blocks = list(find_blocks(model).values())
    run, take_gradients = passes(model, batch_for("bart"))
    replay, counts = Replay(blocks, CPU), set()
    for seed in range(6):
        torch.manual_seed(seed)
        before = RandomState.capture(CPU)
        with replay.recording() as recording:
            loss = run()
        plain = take_gradients()
        counts.add(len(recording.calls))
        last = recording.calls[-1].block
        before.restore()
        with replay.replaying(recording, {last}):
            assert torch.equal(run(), loss)
        replayed = take_gradients()
        prefix = next(name for name, module in model.named_modules() if module is blocks[last])
        assert_equal(
            {n: g for n, g in replayed.items() if n.startswith(prefix)},
            {n: g for n, g in plain.items() if n.startswith(prefix)},
        )
    assert len(counts) > 1


class NumPyNoise(nn.Module):
    """A block that draws from NumPy and Python as well as from torch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x):
        noise = torch.from_numpy(np.random.rand(8)).to(x.dtype) * random.random() * torch.rand(8)
        return self.second(torch.tanh(self.linear(x))) * noise


class Stack(nn.Module):
    def __init__(self, block=NumPyNoise):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([block() for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return tf.modeling_outputs.BaseModelOutput(x), x.square().sum()


def stack_pass(model, x):
    def run():
        loss = model(x)[1]
        loss.backward()
        return loss.detach()

    return run


def test_draws_from_numpy_and_python_are_replayed():
    """Where it is known that a pass draws from these, each call keeps their states."""
    model = Stack()
    run = stack_pass(model, torch.ones(2, 8))
    replay = Replay(list(model.blocks), CPU)
    for known in (False, True):
        replay.draws_on_host = known
        before = RandomState.capture(CPU)
        with replay.recording() as recording:
            loss = run()
        after = random_states()
        before.restore()
        with replay.replaying(recording, {2}):
            assert torch.equal(run(), loss) is known
        assert (random_states() == after) is known


class InPlace(nn.Module):
    """A block that changes its input, which is the output of the block before."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x):
        return self.second(x.add_(1.0)) if x.grad_fn is not None else self.linear(x)


def test_records_changed_in_place_are_not_replayed():
    model = Stack(InPlace)
    run = stack_pass(model, torch.ones(2, 8))
    replay = Replay(list(model.blocks), CPU)
    before = RandomState.capture(CPU)
    with replay.recording() as recording:
        run()
    before.restore()
    with pytest.raises(ReplayError, match="changed in place"), replay.replaying(recording, {2}):
        run()


def test_another_order_of_calls_is_not_replayed():
    model = bert().train()
    layers = model.bert.encoder.layer
    run, _ = passes(model, {"input_ids": TOKENS, "labels": torch.tensor([0, 1])})
    replay = Replay(list(layers), CPU)
    before = RandomState.capture(CPU)
    with replay.recording() as recording:
        run()
    model.bert.encoder.layer = nn.ModuleList([layers[1], layers[0], layers[2], layers[3]])
    before.restore()
    with pytest.raises(ReplayError, match="block 1 was called where block 0"), replay.replaying(recording, {3}):
        run()
    model.bert.encoder.layer = layers[:1]
    before.restore()
    with pytest.raises(ReplayError, match="1 blocks were called, but 4"), replay.replaying(recording, {3}):
        run()
