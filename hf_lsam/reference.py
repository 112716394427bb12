r"""Every method as plain loops, straight from its equations: the file to read first, and the reference of the tests.

The trainer does not use it. Each `..._step` function performs one optimizer step on a list of micro-batches, whose
losses are averaged. `blocks` is a list of lists of parameters.

    L(w) + lambda * ||grad_S L(w)||,  alpha = lambda / rho                                    (Lee, KDD 2024)
    selected i:  g_i = (1 - alpha) * grad_i L(w) + alpha * grad_i L(w + eps)
    others:      g_i = grad_i L(w)
    eps_i = rho * grad_i L(w) / ||grad_S L(w)||  for i in S, 0 elsewhere
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

Batches = Sequence[dict[str, Any]]
Blocks = Sequence[Sequence[Parameter]]
Rule = Callable[[list[float]], Sequence[int]]


def trainable(model: Module) -> list[Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient(model: Module, batches: Batches) -> dict[Parameter, Tensor]:
    """grad L at the current weights, where L is the mean loss of the micro-batches."""
    loss = sum(model(**batch).loss for batch in batches) / len(batches)
    gradients = torch.autograd.grad(loss, trainable(model), allow_unused=True)
    return {p: grad for p, grad in zip(trainable(model), gradients, strict=True) if grad is not None}


def norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm over all entries of all tensors."""
    return math.sqrt(sum(float((tensor.double() ** 2).sum()) for tensor in tensors))


def perturbed_gradient(
    model: Module, batches: Batches, selected: Sequence[Parameter], ascent: dict, rho: float, adaptive=False
) -> dict[Parameter, Tensor]:
    """grad L(w + eps) with eps along `ascent` for the `selected` parameters (ASAM's if `adaptive`); w is restored."""
    weights = {p: p.detach().clone() for p in selected if p in ascent}
    scale = {p: weight.abs() if adaptive else 1.0 for p, weight in weights.items()}
    length = norm([scale[p] * ascent[p] for p in weights])
    for p in weights:
        p.data += rho * scale[p] ** 2 * ascent[p] / length
    result = gradient(model, batches)
    for p, weight in weights.items():
        p.data.copy_(weight)
    return result


def update(model: Module, gradients: dict[Parameter, Tensor], optimizer: Optimizer) -> None:
    """One step of the optimizer with these gradients."""
    for parameter in model.parameters():
        parameter.grad = gradients.get(parameter)
    optimizer.step()


def plain_step(model: Module, batches: Batches, optimizer: Optimizer) -> None:
    """A step without perturbation."""
    update(model, gradient(model, batches), optimizer)


def generalized_sam_step(
    model: Module, batches: Batches, optimizer: Optimizer, rho: float, alpha: float, adaptive=False
) -> None:
    """Gradient-norm penalty (Zhao et al., ICML 2022): every parameter is perturbed."""
    lsam_step(model, batches, optimizer, [trainable(model)], rho, alpha, lambda norms: [0], adaptive)


def sam_step(model: Module, batches: Batches, optimizer: Optimizer, rho: float, adaptive=False) -> None:
    """SAM (Foret et al., ICLR 2021): generalized SAM with alpha = 1."""
    generalized_sam_step(model, batches, optimizer, rho, 1.0, adaptive)


def lsam_step(
    model: Module,
    batches: Batches,
    optimizer: Optimizer,
    blocks: Blocks,
    rho: float,
    alpha: float,
    rule: Rule,
    adaptive: bool = False,
) -> None:
    """Layer-wise SAM (Lee, KDD 2024): only the blocks that `rule` selects are perturbed and have a mixed gradient."""
    update(model, lsam_gradient(model, batches, blocks, rho, alpha, rule, adaptive), optimizer)


def lsam_gradient(
    model: Module, batches: Batches, blocks: Blocks, rho: float, alpha: float, rule: Rule, adaptive: bool = False
) -> dict[Parameter, Tensor]:
    """The gradient that the optimizer gets from layer-wise SAM."""
    plain = gradient(model, batches)
    scores = {p: p.detach().abs() * g for p, g in plain.items()} if adaptive else plain
    norms = [norm([scores[p] for p in block if p in scores]) for block in blocks]
    selected = [p for i in rule(norms) for p in blocks[i] if p in plain]
    perturbed = perturbed_gradient(model, batches, selected, plain, rho, adaptive)
    mixed = {p: (1 - alpha) * plain[p] + alpha * perturbed.get(p, torch.zeros_like(p)) for p in selected}
    return plain | mixed


def micro_batch_lsam_step(
    model: Module, batches: Batches, optimizer: Optimizer, blocks: Blocks, rho: float, alpha: float, rule: Rule
) -> None:
    """Layer-wise m-sharpness: each micro-batch is perturbed by its own gradient; the results are averaged."""
    parts = [lsam_gradient(model, [batch], blocks, rho, alpha, rule) for batch in batches]
    update(model, {p: torch.stack([part[p] for part in parts]).mean(0) for p in parts[0]}, optimizer)


def looksam_step(
    model: Module, batches: Batches, optimizer: Optimizer, rho: float, interval: int, scale: float, step: int, state
) -> None:
    """LookSAM (Liu et al., CVPR 2022): SAM at every `interval`-th step; the others reuse its part orthogonal to g."""
    plain = gradient(model, batches)
    length = norm(list(plain.values()))
    if step % interval == 0:
        sam = perturbed_gradient(model, batches, trainable(model), plain, rho)
        along = sum(float((sam[p].double() * plain[p].double()).sum()) for p in plain) / length**2
        state["orthogonal"] = {p: sam[p] - along * plain[p] for p in plain}
        update(model, sam, optimizer)
    else:
        factor = scale * length / norm(list(state["orthogonal"].values()))
        update(model, {p: plain[p] + factor * state["orthogonal"][p] for p in plain}, optimizer)


def one_pass_lsam_step(
    model: Module, batches: Batches, optimizer: Optimizer, blocks: Blocks, rho: float, rule: Rule, state: dict
) -> None:
    """One-pass layer-wise SAM (after AsyncSAM, arXiv 2503.11147, tau = 1): eps along the previous step's gradient."""
    gradients = perturbed_gradient(model, batches, state.get("selected", []), state.get("gradient", {}), rho)
    norms = [norm([gradients[p] for p in block if p in gradients]) for block in blocks]
    state["selected"] = [p for i in rule(norms) for p in blocks[i]]
    state["gradient"] = {p: g.clone() for p, g in gradients.items()}
    update(model, gradients, optimizer)


def priced_steps(
    max_overhead: float, max_steps: int, steps: Sequence[int], expected: float, costs: Sequence[float]
) -> list[int]:
    """Those of `steps` that are perturbed at a price; `costs` has the cost of pass 2 at each step, if it has one.

    `max_overhead` plain steps for each of `max_steps` are paid into an account, in equal parts at `steps`. A step is
    perturbed if the account holds what the last perturbation cost, at first `expected`, and then pays its own cost.
    """
    account, perturbed = 0.0, []
    for step in steps:
        account += max_overhead * max_steps / len(steps)
        if account >= expected - 1e-9:
            perturbed.append(step)
            expected = costs[step]
            account -= expected
    return perturbed


def top_k(k: int) -> Rule:
    """The k blocks with the largest gradient norm (the paper's rule)."""
    return lambda norms: sorted(range(len(norms)), key=lambda i: -norms[i])[:k]


def last(k: int) -> Rule:
    """The k blocks nearest to the output."""
    return lambda norms: range(len(norms))[-k:]


def budget(max_overhead: float, k: int | None, sizes: Sequence[int], head: int) -> Rule:
    """Of all sets within the budget, the one with the largest norm, by trying all of them.

    `sizes` are the numbers of weights of the blocks, `head` of those after the last one, all trained. A plain step
    costs 3 for each weight. Pass 2 costs 2 for each from the first selected block on, and 1 more for selected ones.
    """

    def cost(blocks: Sequence[int]) -> float:
        plain = 3 * (sum(sizes) + head)
        return (2 * (sum(sizes[min(blocks) :]) + head) + sum(sizes[i] for i in blocks)) / plain

    def rule(norms: list[float]) -> Sequence[int]:
        largest = len(norms) if k is None else k
        sets = [s for count in range(1, largest + 1) for s in combinations(range(len(norms)), count)]
        return max((s for s in sets if cost(s) <= max_overhead), key=lambda s: sum(norms[i] ** 2 for i in s))

    return rule
