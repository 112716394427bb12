"""Losses equal and gradients not: training steps that do more with gradients, and checkpoints around blocks."""

from functools import partial

import pytest
import torch
from literal_step import assert_right
from situations import Net, Situation
from torch import nn
from torch.utils.checkpoint import checkpoint

WAYS = ["plain", "last", "last, two", "top_k, two", "budget, two", "all, two"]


def trained(model) -> list[torch.Tensor]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def gradients(loss, weights) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return [torch.zeros_like(weight) if one is None else one for weight, one in zip(weights, found, strict=True)]


def length(tensors) -> torch.Tensor:
    return sum(tensor.square().sum() for tensor in tensors).sqrt()


class Clips(Situation):
    """Clips what has been accumulated, after each micro-batch."""

    def step(self, model, batch, once):
        loss = once(batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        return loss


class ClipsByTheLargest(Situation):
    """Divides all gradients by the largest entry of any."""

    def step(self, model, batch, once):
        loss = once(batch)
        found = [weight.grad for weight in model.parameters() if weight.grad is not None]
        largest = max(gradient.abs().max() for gradient in found)
        for gradient in found:
            gradient.div_(1 + largest)
        return loss


class DividesTheFirst(Situation):
    """Assigns gradients anew, divided by their length, in the first micro-batch of a step only."""

    def step(self, model, batch, once):
        is_first = all(weight.grad is None for weight in model.parameters())
        loss = once(batch)
        found = [weight for weight in trained(model) if is_first and weight.grad is not None]
        size = length([weight.grad for weight in found]) if found else 1
        for weight in found:
            weight.grad = weight.grad / (0.1 + size)
        return loss


class Projects(Situation):
    """PCGrad: of two losses' gradients that are at odds each gives up what is against the other."""

    def losses(self, model, batch):
        output = model(**batch)
        return output.loss, -0.7 * output.loss + output.logits.square().mean()

    def step(self, model, batch, once):
        weights = trained(model)
        losses = [loss / self.current_gradient_accumulation_steps for loss in self.losses(model, batch)]
        first, second = (gradients(loss, weights) for loss in (losses[0], self.other(model, batch)))
        along = sum((one * other).sum() for one, other in zip(first, second, strict=True))
        share = along.clamp(max=0)
        for weight, one, other in zip(weights, first, second, strict=True):
            mixed = one + other - share * (other / length(second) ** 2 + one / length(first) ** 2)
            weight.grad = mixed if weight.grad is None else weight.grad + mixed
        return losses[0].detach()

    def other(self, model, batch):
        return self.losses(model, batch)[1] / self.current_gradient_accumulation_steps


class ProjectsAfterBackward(Situation):
    """The same with what `backward` leaves in `.grad`."""

    def step(self, model, batch, once):
        before = {weight: weight.grad for weight in trained(model)}
        found = []
        for name in ("first", "second"):
            for weight in before:
                weight.grad = None
            self.which = name
            loss = once(batch)
            found.append({weight: weight.grad for weight in before if weight.grad is not None})
        first, second = found
        along = sum((first[weight] * second[weight]).sum() for weight in first).clamp(max=0)
        square = sum(gradient.square().sum() for gradient in second.values())
        for weight, former in before.items():
            if weight in first:
                mixed = first[weight] - along / square * second[weight]
                weight.grad = mixed if former is None else former + mixed
            else:
                weight.grad = former
        return loss

    def loss(self, model, batch, items):
        output = model(**batch)
        return output.loss if self.which == "first" else output.logits.square().mean() - output.loss


class Attacks(Situation):
    """FGM: a second backward pass where the embeddings are moved along their gradient."""

    def step(self, model, batch, once):
        loss, weight = once(batch), model.embedding.weight
        if weight.grad is not None and weight.grad.norm() > 0:
            before = weight.detach().clone()
            weight.data.add_(weight.grad / weight.grad.norm())
            once(batch)
            weight.data.copy_(before)
        return loss


class AttacksAll(Situation):
    """AWP: the same for every weight that has a gradient."""

    def step(self, model, batch, once):
        loss = once(batch)
        moved = {weight: weight.detach().clone() for weight in trained(model) if weight.grad is not None}
        size = length([weight.grad for weight in moved])
        for weight in moved:
            weight.data.add_(0.3 * weight.grad / size)
        once(batch)
        for weight, before in moved.items():
            weight.data.copy_(before)
        return loss


class Balances(Situation):
    """GradNorm: the weight of a second loss by the gradients of both at a weight that is not selected."""

    def loss(self, model, batch, items):
        output = model(**batch)
        other, weight = output.logits.square().mean(), model.head.weight
        norms = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (output.loss, other)]
        return output.loss + norms[0] / norms[1] * other


class BalancesByTheEmbedding(Balances):
    """The same with what `backward` would give the embedding; it goes without where the embedding takes none."""

    def loss(self, model, batch, items):
        output, weight = model(**batch), model.embedding.weight
        other = output.logits.square().mean()
        if not weight.requires_grad:
            return output.loss + other
        norms = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (output.loss, other)]
        return output.loss + norms[0] / norms[1] * other


class Penalises(Situation):
    """A penalty on the gradient with respect to the embedding's output."""

    def attach(self, model):
        model.embedding.register_forward_hook(lambda module, inputs, output: self.keep(output))

    def keep(self, output):
        self.embedded = output

    def loss(self, model, batch, items):
        loss = model(**batch).loss
        if not self.embedded.requires_grad:
            return loss
        (gradient,) = torch.autograd.grad(loss, self.embedded, create_graph=True)
        return loss + gradient.square().sum()


class ByGradientHooks(Situation):
    """Hooks on the embedding's gradient scale the loss of the next forward in the same step."""

    def step(self, model, batch, once):
        self.scale, grad = 1.0, model.embedding.weight.grad
        model.embedding.weight.grad = None
        loss = once(batch)
        own = model.embedding.weight.grad
        self.scale = 1.0 if own is None else float(own.norm()) * 10
        once(batch)
        if grad is not None:
            model.embedding.weight.grad.add_(grad)
        return loss

    def loss(self, model, batch, items):
        return self.scale * model(**batch).loss


SITUATIONS = [
    *(Clips, ClipsByTheLargest, DividesTheFirst, Projects, ProjectsAfterBackward, Attacks, AttacksAll),
    *(Balances, BalancesByTheEmbedding, Penalises, ByGradientHooks),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
def test_what_is_done_with_gradients(situation, way, tmp_path):
    assert_right(situation, tmp_path, way)


def later(situation, first_step):
    """The situation from a step on; a plain step before."""

    class Later(situation):
        def step(self, model, batch, once):
            if self.state.global_step >= first_step:
                return super().step(model, batch, once)
            self.which, self.scale = "first", 1.0
            return once(batch)

    return Later


LATER = [Clips, ClipsByTheLargest, DividesTheFirst, Projects, ProjectsAfterBackward, Attacks, AttacksAll]


@pytest.mark.parametrize("way", ["last", "last, two", "top_k, two"])
@pytest.mark.parametrize("first_step", [1, 2])
@pytest.mark.parametrize("situation", LATER, ids=lambda situation: situation.__name__)
def test_what_is_done_with_gradients_from_a_step_on(situation, first_step, way, tmp_path):
    assert_right(later(situation, first_step), tmp_path, way, may_skip=r"pass 2|second pass|repeat|not perturbed")


class Checkpointed(Net):
    """Calls `checkpoint` around each block."""

    reentrant = True
    of_each = True

    def run(self, x):
        if not self.training:
            return super().run(x)
        if not self.of_each:
            return checkpoint(super().run, x, use_reentrant=self.reentrant)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("of_each", [True, False], ids=["each block", "all blocks"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpoints_from_outside_of_the_blocks(reentrant, of_each, way, tmp_path):
    net = type("Net", (Checkpointed,), {"reentrant": reentrant, "of_each": of_each})
    assert_right(type("Checkpoints", (Situation,), {"new": net}), tmp_path, way)


class DetachedBetween(Net):
    """A block in the middle gets its input without a graph: of those before it none has a gradient."""

    def run(self, x):
        for index, block in enumerate(self.blocks):
            x = block(x.detach() if index == 2 else x)
        return x


class ScalesGradients(Net):
    """Hooks between the blocks scale gradients by their own size."""

    def run(self, x):
        for block in self.blocks:
            x = block(x)
            if x.requires_grad:
                x.register_hook(lambda gradient: gradient / (1e-3 + gradient.norm()))
        return x


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("net", [DetachedBetween, ScalesGradients], ids=lambda net: net.__name__)
def test_gradients_between_blocks(net, way, tmp_path):
    assert_right(type("Between", (Situation,), {"new": partial(net)}), tmp_path, way)


class HalfUsed(Situation):
    """Which blocks get a gradient depends on the micro-batch."""

    def loss(self, model, batch, items):
        x = model.embedding(batch["input_ids"])
        for index, block in enumerate(model.blocks):
            x = block(x) if int(batch["input_ids"][0, 0]) % 2 or index < 3 else x
        return nn.functional.cross_entropy(model.head(x.mean(1)), batch["labels"])


@pytest.mark.parametrize("way", WAYS)
def test_blocks_that_some_micro_batches_leave_out(way, tmp_path):
    assert_right(HalfUsed, tmp_path, way)
