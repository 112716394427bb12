"""What a pass reads of the blocks, and when: where a replay is another pass, the slower and right way is taken."""

from types import SimpleNamespace

import pytest
import torch
from literal_step import assert_right
from situations import LAST, Block, Net, Situation
from tiny import Examples, bert, largest_difference, weights
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_lsam import LSAM, LSAMConfig


def eager_bert():
    return bert(attn_implementation="eager").double()


def weighted(outputs):
    """Each layer has a weight of its own, as with targets for each layer."""
    return sum((weight + 1) * output.square().mean() for weight, output in enumerate(outputs))


def first(outputs):
    return outputs[0].square().mean()


def last(outputs):
    return outputs[-1].square().mean()


def middle(outputs):
    return outputs[1].square().mean() * outputs[2].square().mean()


def by_argument(model, batch, reads, always):
    return model(**batch, output_attentions=reads, output_hidden_states=reads)


def by_config(model, batch, reads, always):
    model.config.output_attentions = model.config.output_hidden_states = reads
    return model(**batch)


def by_the_loss(model, batch, reads, always):
    return model(**batch, output_attentions=True, output_hidden_states=True)


def reading(what, pick, how, first_step) -> type[Situation]:
    """From a step on the loss reads what the layers of a BERT leave."""

    class Reading(Situation):
        new = staticmethod(eager_bert)

        def loss(self, model, batch, items):
            reads = self.state.global_step >= first_step
            output = how(model, batch, reads, what)
            return output.loss + 5 * pick(getattr(output, what)) if reads else output.loss

    return Reading


BEGINS = [(by_argument, 0), (by_argument, 1), (by_argument, 2), (by_config, 1), (by_config, 2), (by_the_loss, 2)]


@pytest.mark.parametrize("way", ["plain", "last", "top_k, two"])
@pytest.mark.parametrize("how, first_step", BEGINS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("what", ["attentions", "hidden_states"])
def test_what_layers_leave_is_read_from_a_step_on(what, how, first_step, way, tmp_path):
    assert_right(reading(what, weighted, how, first_step), tmp_path, way)


@pytest.mark.parametrize("way", ["last, two", "budget, two"])
@pytest.mark.parametrize("pick", [first, middle, last], ids=lambda pick: pick.__name__)
@pytest.mark.parametrize("what", ["attentions", "hidden_states"])
def test_some_of_it_is_read_from_the_second_step_on(what, pick, way, tmp_path):
    assert_right(reading(what, pick, by_the_loss, 1), tmp_path, way)


def experts():
    set_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=16)
    heads = dict(num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)
    mixture = dict(num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=16, router_aux_loss_coef=1.0)
    config = Qwen2MoeConfig(**sizes, **heads, **mixture, initializer_range=0.3, experts_implementation="eager")
    return Qwen2MoeForCausalLM(config).double()


class Routes(Situation):
    """A mixture of experts, whose auxiliary loss is switched on at a step."""

    new, data = staticmethod(experts), Examples(48, language_model=True)
    first_step, how = 0, "config"

    def loss(self, model, batch, items):
        reads = self.state.global_step >= self.first_step
        if self.how == "config":
            model.config.output_router_logits = reads
            return model(**batch).loss
        return model(**batch, output_router_logits=reads).loss


@pytest.mark.parametrize("way", ["plain", "last", "top_k, two"])
@pytest.mark.parametrize("how, first_step", [("config", 0), ("config", 1), ("argument", 2)])
def test_a_router_loss_that_is_switched_on(how, first_step, way, tmp_path):
    assert_right(type("Routing", (Routes,), {"first_step": first_step, "how": how}), tmp_path, way)


class Captures(Situation):
    """Forward hooks of the user's keep what modules return; from a step on the loss reads it."""

    first_step, where, detach = 0, "", False

    def attach(self, model):
        self.captured = {}

        def capture(index):
            def hook(module, inputs, output):
                self.captured[index] = output.detach() if self.detach else output

            return hook

        for index, block in enumerate(model.blocks):
            block.get_submodule(self.where).register_forward_hook(capture(index))

    def loss(self, model, batch, items):
        loss = model(**batch).loss
        captured = [self.captured[index] for index in range(len(model.blocks))]
        if self.state.global_step < self.first_step:
            return loss
        return loss * (1 + weighted(captured)) if self.detach else loss + weighted(captured)


@pytest.mark.parametrize("way", ["plain", "last", "last, two", "top_k, two"])
@pytest.mark.parametrize("first_step", [0, 1, 2])
@pytest.mark.parametrize("detach", [False, True], ids=["with its graph", "detached"])
@pytest.mark.parametrize("where", ["", "up"], ids=["blocks", "inside of blocks"])
def test_what_forward_hooks_capture(where, detach, first_step, way, tmp_path):
    own = dict(first_step=first_step, where=where, detach=detach)
    assert_right(type("Capturing", (Captures,), own), tmp_path, way)


class Loaded(Block):
    """Leaves a number behind."""

    def forward(self, x):
        y = super().forward(x)
        self.load = y.detach().abs().mean() if self.detach else y.abs().mean()
        return y

    detach = True


class LoadedNet(Net):
    block = Loaded

    def forward(self, input_ids, attention_mask=None, labels=None, reads=True):
        logits = self.head(self.run(self.embedding(input_ids)).mean(1))
        if reads:
            logits = logits / sum((place + 1) * block.load for place, block in enumerate(self.blocks))
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


@pytest.mark.parametrize("way", ["plain", "last", "last, two", "top_k, two", "all, two"])
@pytest.mark.parametrize("first_step", [0, 1, 2, 9])
@pytest.mark.parametrize("detach", [True, False], ids=["a number", "with its graph"])
def test_numbers_that_blocks_leave_behind(detach, first_step, way, tmp_path):
    """Each micro-batch has its own, whether or not they are read later."""
    block = type("Loads", (Loaded,), {"detach": detach})

    class Loads(Situation):
        new = type("LoadedNet", (LoadedNet,), {"block": block})

        def loss(self, model, batch, items):
            return model(**batch, reads=self.state.global_step >= first_step).loss

    assert_right(Loads, tmp_path, way)


class Penalises(Situation):
    """From a step on, the norm of the weights that take a gradient is part of the loss."""

    first_step = 0

    def loss(self, model, batch, items):
        loss = model(**batch).loss
        if self.state.global_step >= self.first_step:
            loss = loss + sum(weight.square().sum() for weight in model.parameters() if weight.requires_grad) / 100
        return loss


class Counting(Block):
    """Writes a mean of its outputs to a buffer, in place."""

    def __init__(self, width):
        super().__init__(width)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        x = super().forward(x)
        self.mean.mul_(0.5).add_(x.detach().mean())
        return x


class CountingNet(Net):
    block = Counting


class ReadsBuffers(Situation):
    """From a step on, the loss is weighted by what the blocks have written."""

    new, first_step = CountingNet, 0

    def loss(self, model, batch, items):
        output = model(**batch)
        if self.state.global_step < self.first_step:
            return output.loss
        return output.loss + sum(block.mean for block in model.blocks) * output.logits.square().mean()


@pytest.mark.parametrize("way", ["plain", "last", "last, two", "top_k, two", "budget, two"])
@pytest.mark.parametrize("first_step", [0, 1, 2])
@pytest.mark.parametrize("situation", [Penalises, ReadsBuffers])
def test_a_loss_that_is_computed_otherwise_from_a_step_on(situation, first_step, way, tmp_path):
    assert_right(type("Begins", (situation,), {"first_step": first_step}), tmp_path, way)


@pytest.mark.parametrize("situation", [Penalises, ReadsBuffers])
def test_a_loop_whose_loss_is_computed_otherwise_from_a_step_on(situation):
    """The gradients are those of the same loop that runs pass 2 in full from the beginning."""
    ends = []
    for first_step in (2, -1):
        model, holder = situation.new(), situation()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lsam = LSAM(model, optimizer, LSAMConfig(**LAST), max_steps=4)
        if first_step < 0:
            lsam._lsam.second_pass.replays = lsam._lsam.second_pass.narrow = False
        holder.first_step = 2
        for step in range(4):
            holder.state = SimpleNamespace(global_step=step)
            batch = situation.collate([situation.data[4 * step + row] for row in range(4)])
            lsam.backward(lambda: holder.loss(model, batch, None))  # noqa: B023
            optimizer.step()
            optimizer.zero_grad()
        ends.append(weights(model))
    assert largest_difference(*ends) < 1e-12
