"""The direction to climb: which candidates, and along what; and what a step keeps of it for the next."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .blocks import Candidate
from .config import LSAMConfig
from .costs import CostModel
from .distributed import average_over_ranks, first_of_ranks, is_distributed
from .perturbation import adaptive_scores, norms
from .rounding import add_into, is_coarse
from .selection import select
from .shards import is_sharded
from .step_log import StepLog


@dataclass
class Ascent:
    """
    The selected candidates and what they climb.

    Attributes:
        chosen: Indices of the selected candidates.
        squares: Squared gradient norm of each weight (of `|w| g` if adaptive) that has a gradient, on the device where
            nothing was selected on them.
        counts: How many of these weights each candidate has.
        norm: Joint norm of the selected gradients, the denominator of eps: one number, on the device.
        weights: Parameters of the selected candidates that have a gradient.
        gradients: Their gradients.
        direction: What is added to the weights, times `rho / norm`: the gradients, or `w^2 g` if adaptive.
        spent: Whether `direction` holds the moved weights by now (`spend`).
    """

    chosen: list[int]
    squares: Tensor
    counts: list[int]
    norm: Tensor
    weights: list[Tensor]
    gradients: list[Tensor]
    direction: list[Tensor]
    spent: bool = False

    def scale(self, rho: float) -> Tensor:
        """`rho / norm`; 0 where the norm is zero or not finite, so that nothing moves."""
        return torch.where((self.norm > 0) & self.norm.isfinite(), rho / self.norm, 0.0)

    def length(self, rho: float) -> Tensor:
        """How far the weights move, `||eps||`: not by `rho` where the move is adaptive."""
        return norms(self.direction).square().sum().sqrt() * self.scale(rho)

    @torch.no_grad()
    def spend(self, rho: float) -> None:
        """
        Write the moved weights, `w + rho / norm * direction`, over the direction, if that can be done.

        It takes half the time of writing them elsewhere. FSDP2 wants sharded weights where they lie, and the move of
        16-bit weights is compared with its direction. If this is interrupted, nothing is left to climb.
        """
        weights, direction = self.weights, self.direction
        kinds = {tensor.dtype for tensor in (*weights, *direction)}
        if self.spent or is_sharded(weights) or len(kinds) != 1 or any(map(is_coarse, kinds)):
            return
        self.weights, self.direction = [], []
        add_into(direction, weights, direction, self.scale(rho), seed=0)
        self.spent = True
        self.weights, self.direction = weights, direction


@dataclass
class Kept:
    """
    What an optimizer step begins with.

    Attributes:
        previous: What it climbs, found in the step before (one pass).
        correction: Weights, and for each the orthogonal part of the last perturbed gradient, to reuse (LookSAM).
        log: Sums since the last log line.
    """

    previous: Ascent | None
    correction: tuple[list[Tensor], list[Tensor]] | None
    log: StepLog


@torch.no_grad()
def find_ascent(
    candidates: Sequence[Candidate], costs: CostModel, config: LSAMConfig, device: torch.device | None = None
) -> Ascent | str:
    """
    Select S on the gradients in `.grad`: `eps_i = rho * direction_i / norm` for i in S.

    Where they are selected on, the norms come to the host together, in one wait for the device; else there is none.

    Processes select the same: with `sharpness_scope="batch"` their gradients are the same, and with `"micro_batch"`
    they select on the mean of their squared norms, while each climbs its own gradient: also one that has none, for
    which the others would wait. `device` is where they meet.

    Returns:
        The ascent, or why there is nothing to climb: a norm that is selected on is not finite, all of them are zero,
        no candidate has a gradient, or none that has one fits the budget.
    """
    with_gradient = [[p for p in candidate.parameters if p.grad is not None] for candidate in candidates]
    counts = [len(parameters) for parameters in with_gradient]
    weights: list[Tensor] = [p for parameters in with_gradient for p in parameters]
    gradients: list[Tensor] = [p.grad for p in weights]  # type: ignore[misc]
    apart = config.sharpness_scope == "micro_batch" and is_distributed()
    if not weights and not apart:
        return "nothing that may be perturbed is trained now: it is frozen, or not in the optimizer"
    scores = adaptive_scores(weights, gradients) if config.adaptive and weights else gradients
    squares = norms(scores).double().square() if weights else torch.zeros(0, dtype=torch.float64, device=device)
    if config.block_selection == "all" or (config.block_selection == "last" and not apart):
        chosen = select(config, candidates, costs, counts)
    else:
        squares = squares.cpu()
        agreed = [float(part.sum()) for part in np.split(squares.numpy(), np.cumsum(counts)[:-1])]
        if apart:
            own = torch.tensor(agreed, device=weights[0].device if weights else device)
            agreed = average_over_ranks([own])[0].tolist()
        if not np.isfinite(agreed).all() or not any(agreed):
            return "the gradient is zero or not finite"
        chosen = select(config, candidates, costs, agreed)
        if config.block_selection == "budget" and is_distributed():
            chosen = first_of_ranks(chosen, len(candidates), device)
        if not chosen:
            return f"no block that is trained now fits max_overhead={config.max_overhead}"
    ends = np.cumsum(counts).tolist()
    places = [place for index in chosen for place in range(ends[index] - counts[index], ends[index])]
    norm = torch.cat([squares[ends[index] - counts[index] : ends[index]] for index in chosen]).sum().sqrt()
    if norm.device.type == "cpu" and not 0 < norm.numpy() < np.inf:
        return "the gradient is zero or not finite"
    weights, gradients = [weights[i] for i in places], [gradients[i] for i in places]
    direction = adaptive_scores(weights, [scores[i] for i in places]) if config.adaptive else gradients
    return Ascent(chosen, squares, counts, norm, weights, gradients, direction)
