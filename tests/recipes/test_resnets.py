"""The residual networks are those of their papers, and layer-wise SAM is exact on them."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import arguments, assert_equal, largest_difference, out_of_reach, passes, weights
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, set_seed

from hf_lsam import LSAMConfig, LSAMTrainer, reference
from hf_lsam.blocks import find_blocks, find_candidates
from hf_lsam.held import RandomState
from hf_lsam.passes import only_gradients_of
from hf_lsam.replay import Replay
from hf_lsam_recipes.support.images.resnets import (
    CifarResNet,
    CifarResNetConfig,
    ResidualBlock,
    WideResidualBlock,
    WideResNet,
    WideResNetConfig,
)

CONVOLUTIONS = r"stem|blocks\.\d+\.(conv\d|shortcut)"
STEPS, BATCH = 6, 4


def resnet20(labels: int = 10) -> CifarResNet:
    return CifarResNet(CifarResNetConfig(num_labels=labels))


def wide(depth: int, widen_factor: int, labels: int = 10, dropout: float = 0.0) -> WideResNet:
    return WideResNet(WideResNetConfig(depth=depth, widen_factor=widen_factor, num_labels=labels, dropout=dropout))


SMALL = {
    "resnet": lambda: CifarResNet(CifarResNetConfig(depth=8, num_labels=3)),
    "wide": lambda: wide(10, 1, labels=3),
    "wide with dropout": lambda: wide(10, 1, labels=3, dropout=0.3),
}


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return STEPS * BATCH

    def __getitem__(self, index):
        pixels = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": pixels, "labels": index % 3}


# The papers have 0.27 M, 36.5 M and 11.0 M; the wide ones for 10 classes, WRN-28-10 for 100.
@pytest.mark.parametrize(
    "build, parameters, convolutions",
    [
        (resnet20, 269_722, 19),
        (functools.partial(wide, 28, 10), 36_479_194, 28),
        (functools.partial(wide, 28, 10, 100), 36_536_884, 28),
        (functools.partial(wide, 16, 8), 10_961_370, 16),
    ],
    ids=["resnet-20", "wrn-28-10", "wrn-28-10 for 100 classes", "wrn-16-8"],
)
def test_number_of_weights_is_that_of_the_paper(build, parameters, convolutions):
    with torch.device("meta"):
        model = build()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == convolutions
    blocks = find_blocks(model)
    assert {type(block) for block in blocks.values()} in ({ResidualBlock}, {WideResidualBlock})
    assert len(blocks) == (9 if isinstance(model, CifarResNet) else 12 if convolutions == 28 else 6)
    candidates = find_candidates(model, blocks, CONVOLUTIONS)
    assert {c.name for c in candidates} == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def normed(x, layer):
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    shape = (1, -1, 1, 1)
    return (x - mean) / (variance + layer.eps).sqrt() * layer.weight.view(shape) + layer.bias.view(shape)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("stride", [1, 2])
def test_blocks_compute_what_the_papers_draw(stride):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    channels = 4 * stride
    block = ResidualBlock(4, channels, stride)
    inner = F.relu(normed(F.conv2d(x, block.conv1.weight, stride=stride, padding=1), block.norm1))
    inner = normed(F.conv2d(inner, block.conv2.weight, padding=1), block.norm2)
    shortcut = torch.zeros_like(inner)
    shortcut[:, :4] = x[:, :, ::stride, ::stride]
    assert torch.allclose(block(x), F.relu(inner + shortcut), rtol=0, atol=1e-12)

    block = WideResidualBlock(4, channels, stride, dropout=0.0)
    start = F.relu(normed(x, block.norm1))
    inner = F.relu(normed(F.conv2d(start, block.conv1.weight, stride=stride, padding=1), block.norm2))
    inner = F.conv2d(inner, block.conv2.weight, padding=1)
    shortcut = x if stride == 1 else F.conv2d(start, block.shortcut.weight, stride=stride)
    assert torch.allclose(block(x), inner + shortcut, rtol=0, atol=1e-12)


def test_dropout_lies_in_every_block_and_nothing_is_changed_in_place():
    model = wide(10, 1, dropout=0.3).train()
    assert [block.dropout.p for block in model.blocks] == [0.3] * 3
    x = torch.randn(2, 16, 8, 8)
    before = x.clone()
    assert not torch.equal(model.blocks[0](x), model.blocks[0](x))
    assert torch.equal(x, before)


def test_convolutions_start_as_he_et_al_say():
    set_seed(0)
    model = wide(16, 8)
    for layer in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
        fan_out = layer.out_channels * layer.kernel_size[0] ** 2
        assert float(layer.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    assert not model.classifier.bias.any()


@pytest.mark.parametrize("name", list(SMALL))
def test_a_saved_model_is_loaded_by_its_class_and_by_the_auto_class(name, tmp_path):
    model = SMALL[name]()
    model(torch.randn(4, 3, 8, 8))  # moves the running statistics
    model.save_pretrained(tmp_path)
    for loader in (type(model), AutoModelForImageClassification):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is type(model) and loaded.config.depth == model.config.depth
        assert_equal(weights(loaded), weights(model))


ELSEWHERE = """
import sys
from transformers import AutoModelForImageClassification
from safetensors.torch import load_file, save_file
import torch
model = AutoModelForImageClassification.from_pretrained("model", trust_remote_code=True).eval()
save_file({"logits": model(load_file("in.safetensors")["pixels"]).logits.detach()}, "out.safetensors")
assert not [name for name in sys.modules if name.startswith("hf_lsam")]
"""


@pytest.mark.parametrize("name", list(SMALL))
def test_a_saved_model_is_loaded_where_this_package_is_not_installed(name, tmp_path):
    model = SMALL[name]().eval()
    model.save_pretrained(tmp_path / "model")
    classes = {"AutoConfig": type(model.config), "AutoModelForImageClassification": type(model)}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"] == {
        name: f"resnets.{kind.__name__}" for name, kind in classes.items()
    }
    pixels = torch.randn(2, 3, 8, 8)
    save_file({"pixels": pixels}, tmp_path / "in.safetensors")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    run = functools.partial(subprocess.run, capture_output=True, text=True, cwd=tmp_path, env=environment)
    result = run([sys.executable, "-c", ELSEWHERE])
    assert result.returncode == 0, result.stderr
    assert torch.equal(load_file(tmp_path / "out.safetensors")["logits"], model(pixels).logits.detach())
    # Its code is not run unasked, and the message says how to ask.
    result = run([sys.executable, "-c", ELSEWHERE.replace(", trust_remote_code=True", "")], input="n\n")
    assert result.returncode != 0 and "trust_remote_code=True" in result.stderr


@pytest.mark.parametrize("kind, depth", [(CifarResNetConfig, 21), (CifarResNetConfig, 2), (WideResNetConfig, 20)])
def test_a_depth_that_no_network_has_is_refused(kind, depth):
    with pytest.raises(ValueError, match=rf"depth must be 6n \+ \d .* but is {depth}"):
        kind(depth=depth)


def train(model, config, folder) -> None:
    args = arguments(
        folder, max_steps=STEPS, max_grad_norm=0.0, optim="sgd", optim_args="momentum=0.9", learning_rate=0.05
    )
    LSAMTrainer(model=model, args=args, train_dataset=Pictures(), lsam_config=LSAMConfig(**config)).train()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("pattern", [None, CONVOLUTIONS], ids=["blocks", "convolutions"])
@pytest.mark.parametrize("name", ["resnet", "wide"])
def test_layer_wise_sam_equals_the_reference_and_counts_batches_once(name, pattern, tmp_path, monkeypatch):
    """Weights, and the running statistics of the batch norms, which only pass 1 moves."""
    monkeypatch.setattr(Pictures, "__getitem__", double(Pictures.__getitem__))
    set_seed(0)
    fast = SMALL[name]()
    slow = SMALL[name]()
    slow.load_state_dict(fast.state_dict())
    start = weights(fast)
    train(fast, dict(rho=0.1, block_pattern=pattern), tmp_path)

    blocks = [c.parameters for c in find_candidates(slow, find_blocks(slow), pattern)]
    optimizer = torch.optim.SGD(slow.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        rows = [Pictures()[index] for index in range(step * BATCH, (step + 1) * BATCH)]
        batch = torch.utils.data.default_collate(rows)
        slow.train()(**batch)
        once = {name: buffer.clone() for name, buffer in slow.named_buffers()}
        reference.lsam_step(slow, [batch], optimizer, blocks, 0.1, 1.0, reference.top_k(2))
        for name, buffer in slow.named_buffers():
            buffer.copy_(once[name])
    assert largest_difference(weights(fast), start) > 1e-3
    assert largest_difference(weights(fast), weights(slow)) < 1e-12
    assert int(fast.norm.num_batches_tracked) == STEPS


def double(getitem):
    def get(self, index):
        item = getitem(self, index)
        return item | {"pixel_values": item["pixel_values"].double()}

    return get


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("name", ["resnet", "wide with dropout"])
def test_replay_gives_bitwise_what_a_full_pass_gives(name, first):
    set_seed(0)
    model = SMALL[name]().train()
    batch = torch.utils.data.default_collate([Pictures()[index] for index in range(BATCH)])
    run, take_gradients = passes(model, batch)
    replay = Replay(list(model.blocks), torch.device("cpu"))
    before = RandomState.capture(torch.device("cpu"))
    with replay.recording() as recording:
        run()
    take_gradients()
    weight = model.blocks[first].conv2.weight
    weight.data.add_(0.05)
    results = []
    with only_gradients_of(list(model.parameters()), [weight]):
        for perturbed in (None, {first}):
            before.restore()
            with replay.replaying(recording, perturbed):
                results.append((run(), take_gradients()))
    (full_loss, full), (replayed_loss, replayed) = results
    assert torch.equal(full_loss, replayed_loss)
    assert list(full) == [f"blocks.{first}.conv2.weight"]
    assert_equal(full, replayed)


def test_the_second_pass_begins_at_the_first_perturbed_block(tmp_path):
    set_seed(0)
    model = SMALL["wide with dropout"]()
    notes = out_of_reach(calls=[])
    for index, block in enumerate(model.blocks):
        block.conv1.register_forward_hook(lambda *_, index=index: notes.calls.append(index))
    train(model, dict(rho=0.1, block_selection="last", num_perturbed_blocks=1), tmp_path)
    # And in the two full passes that the first step's is compared with.
    calls = notes.calls
    assert (calls.count(0), calls.count(1)) == (STEPS + 2, STEPS + 2)
    assert calls.count(2) >= 2 * STEPS
