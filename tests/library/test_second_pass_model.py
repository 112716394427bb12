"""The model in a pass is the model: copies of it, what reads it, and what runs it otherwise."""

import copy
import inspect
import pickle
from io import BytesIO
from itertools import product

import pytest
import torch
from literal_step import assert_literal, assert_right
from situations import ALL, LAST, TOP, Block, Net, Situation, follow, put
from torch import nn
from torch.optim.swa_utils import AveragedModel

WAYS = ["plain", "last", "top_k, two", "all, two"]


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_state(model):
    other = Net()
    other.load_state_dict(model.state_dict())
    return other


def averaged(model):
    return AveragedModel(model).module


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled, "save": saved, "state_dict": by_state, "averaged": averaged}


def assert_is_a_copy(other, weights):
    """It has the weights, works, and holds nothing that a net does not hold; so does what is made of it."""
    fresh = Net()
    put(fresh, weights)
    tokens = Situation.collate([Situation.data[row] for row in range(8)])["input_ids"]
    for each in (other, copy.deepcopy(other), pickled(other), saved(other)):
        assert torch.equal(each(tokens).logits, fresh(tokens).logits)
        for module, right in zip(each.modules(), fresh.modules(), strict=True):
            assert type(module) is type(right)
            # That one is of accelerate; and in a pickle a block has the `forward` of its class for its own.
            own = {name for name in vars(module) if getattr(vars(module)[name], "__self__", None) is module}
            assert vars(module).keys() - own - {"_is_accelerate_prepared"} == vars(right).keys()
            assert own <= {"forward"}
            assert not module._forward_hooks and not module._forward_pre_hooks


class Copies(Situation):
    """Makes a teacher of the model, before its pass or after, once or each time, and learns from it."""

    keeps = ("teacher",)
    make, first, each = staticmethod(copy.deepcopy), False, False

    def begin(self, model):
        self.teacher = None

    def loss(self, model, batch, items):
        if self.first and (self.teacher is None or self.each):
            self.teacher = self.make(model)
        output = model(**batch)
        if not self.first and (self.teacher is None or self.each):
            self.teacher = self.make(model)
        with torch.no_grad():
            target = 2 * self.teacher(**batch).logits
        return output.loss + (output.logits - target).square().mean()


MADE = [*(("deepcopy", *when) for when in product([False, True], [False, True])), ("pickle", False, True)]
MADE += [("save", True, True), ("state_dict", False, True), ("averaged", True, False)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make, first, each", MADE)
def test_copies_of_the_model(make, first, each, way, tmp_path):
    own = {"make": staticmethod(COPIES[make]), "first": first, "each": each}
    run = assert_right(type("Copying", (Copies,), own), tmp_path, way)
    assert_is_a_copy(run.trainer.teacher, run.starts[-2 if each else 0]["model"])


@pytest.mark.parametrize("config", [LAST, ALL], ids=["last", "all"])
@pytest.mark.parametrize("make", COPIES)
def test_copies_in_each_of_the_passes(make, config, tmp_path):
    """In pass 2 it is the model at the weights that this has there; also in the middle of a forward."""
    made = []

    class Looks(Net):
        def run(self, x):
            for block in self.blocks:
                x = block(x)
                # Of the class that can be pickled.
                self.__class__ = Net
                made.append((COPIES[make](self), {n: p.detach().clone() for n, p in self.named_parameters()}))
                self.__class__ = Looks
            return x

    run = follow(type("Looking", (Situation,), {"new": Looks}), tmp_path, config, max_steps=2)
    assert_literal(run)
    assert len(made) >= 4 * 2 * 2
    for other, weights in made[:: len(made) // 8]:
        assert_is_a_copy(other, weights)


@pytest.mark.parametrize("way", WAYS)
def test_a_shallow_copy_is_a_second_forward(way, tmp_path):
    """It has the modules of the model."""

    class Twice(Situation):
        def loss(self, model, batch, items):
            one, other = model(**batch), copy.copy(model)(batch["input_ids"] // 2)
            return one.loss + (one.logits - other.logits).square().mean()

    assert_right(Twice, tmp_path, way)


@pytest.mark.parametrize("way", WAYS)
def test_one_block_copied(way, tmp_path):
    class Partly(Situation):
        def loss(self, model, batch, items):
            x = model.run(model.embedding(batch["input_ids"]))
            others = [copy.deepcopy(model.blocks[index]).requires_grad_(False) for index in (0, 3)]
            for other in others:
                x = x + 0.5 * other(x)
            return nn.functional.cross_entropy(model.head(x.mean(1)), batch["labels"])

    assert_right(Partly, tmp_path, way)


@pytest.mark.parametrize("config", [LAST, TOP, ALL, {**LAST, "ascent_gradient": "previous"}], ids=str)
def test_after_training_the_model_is_as_it_was(config, tmp_path):
    run = follow(Situation, tmp_path, config)
    assert_is_a_copy(run.trainer.model, run.starts[-1]["model"])


class Infers(Situation):
    """First runs the model for pseudo-labels, or keeps what such a run gives."""

    keeps = ("kept",)
    mode, first_step, switches = torch.inference_mode, 0, False

    def begin(self, model):
        self.kept = torch.zeros(4, 3, dtype=torch.float64)

    def loss(self, model, batch, items):
        if self.state.global_step < self.first_step:
            return model(**batch).loss
        model.train(not self.switches)
        with self.mode():
            logits = model(**batch).logits
            guesses = logits.argmax(-1)
            self.kept = self.kept / 2 + logits
        model.train()
        output = model(**batch)
        weight = float(self.kept.abs().sum())
        return output.loss + weight * nn.functional.cross_entropy(output.logits, guesses.clone())


@pytest.mark.parametrize("way", [*WAYS, "last, two"])
@pytest.mark.parametrize("first_step, switches", [(0, False), (0, True), (2, False)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_a_forward_without_gradients(mode, first_step, switches, way, tmp_path):
    own = {"mode": mode, "first_step": first_step, "switches": switches}
    assert_right(type("Inferring", (Infers,), own), tmp_path, way)


NORMS = {
    "instance": lambda width: nn.InstanceNorm1d(width, affine=True),
    "instance, tracked": lambda width: nn.InstanceNorm1d(width, affine=True, track_running_stats=True),
    "batch": lambda width: nn.BatchNorm1d(width),
    "batch, all": lambda width: nn.BatchNorm1d(width, momentum=None),
    "batch, not tracked": lambda width: nn.BatchNorm1d(width, track_running_stats=False),
}


class Normed(Block):
    norm_of, evaluated = NORMS["batch"], False

    def __init__(self, width):
        super().__init__(width)
        self.norm = self.norm_of(width)
        if self.norm.track_running_stats:
            self.norm.running_mean.copy_(torch.linspace(-1, 1, width))
            self.norm.running_var.copy_(torch.linspace(0.5, 2, width))

    def train(self, mode=True):
        super().train(mode)
        if self.evaluated:
            self.norm.eval()
        return self

    def forward(self, x):
        return super().forward(self.norm(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("way", [*WAYS, "last, two"])
@pytest.mark.parametrize("evaluated", [False, True], ids=["trained", "evaluated"])
@pytest.mark.parametrize("norm", NORMS)
def test_layers_with_running_statistics(norm, evaluated, way, tmp_path):
    block = type("Block", (Normed,), {"norm_of": staticmethod(NORMS[norm]), "evaluated": evaluated})
    net = type("NormedNet", (Net,), {"block": block})
    assert_right(type("Norms", (Situation,), {"new": net}), tmp_path, way)


class ReadsTheSignature(Situation):
    """Gives the model what its `forward` takes, as `generate` does."""

    def loss(self, model, batch, items):
        names = inspect.signature(model.forward).parameters
        assert set(names) == set(model.forward.__code__.co_varnames[1 : len(names) + 1])
        return model(**{name: value for name, value in batch.items() if name in names}).loss


class PatchesABlock(Situation):
    """Replaces the forward pass of a block, in the first loss."""

    def loss(self, model, batch, items):
        block = model.blocks[1]
        if not hasattr(block, "patched"):
            block.patched, former = True, block.forward
            block.forward = lambda x: 2 * former(x)
        return model(**batch).loss


@pytest.mark.parametrize("config", [None, LAST, ALL], ids=["plain", "last", "all"])
def test_the_signature_of_the_model(config, tmp_path):
    assert_literal(follow(ReadsTheSignature, tmp_path, config))


def test_a_patch_of_a_block_stays(tmp_path):
    ends = []
    for name, config in (("plain", None), ("ours", {**LAST, "rho": 1e-9})):
        run = follow(PatchesABlock, tmp_path / name, config)
        ends.append(run.starts[-1]["model"])
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=0, atol=1e-7)
