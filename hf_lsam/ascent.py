"""The direction to climb: which candidates, and along what; and what a step keeps of it for the next."""

import math
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
        squared_norms: Squared gradient norm of every candidate (of `|w| g` if adaptive) that was selected on.
        norm: Joint norm of the selected gradients, the denominator of eps.
        weights: Parameters of the selected candidates that have a gradient.
        gradients: Their gradients.
        direction: What is added to the weights, times `rho / norm`: the gradients, or `w^2 g` if adaptive.
        spent: Whether `direction` holds the moved weights by now (`spend`).
    """

    chosen: list[int]
    squared_norms: list[float]
    norm: float
    weights: list[Tensor]
    gradients: list[Tensor]
    direction: list[Tensor]
    spent: bool = False

    def length(self, rho: float) -> Tensor:
        """How far the weights move, `||eps||`: not by `rho` where the move is adaptive."""
        return norms(self.direction).square().sum().sqrt() * (rho / self.norm)

    def release(self) -> None:
        """Let go of the gradients: those of a second pass are about to take as much memory."""
        self.gradients, self.direction = [], []
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def spend(self, rho: float) -> None:
        """
        Write the moved weights, `w + rho / norm * direction`, over the direction, if that can be done.

        It takes half the time of writing them elsewhere. FSDP2 wants sharded weights where they lie, and the move of
        16-bit weights is compared with its direction. If this is interrupted, nothing is left to climb.
        """
        weights, direction = self.weights, self.direction
        kinds = {tensor.dtype for tensor in (*weights, *direction)}
        if self.spent or is_sharded(weights) or len(kinds) != 1 or any(map(is_coarse, weights)):
            return
        self.weights, self.direction = [], []
        add_into(direction, weights, direction, rho / self.norm, seed=0)
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

    The norms come to the host together, in one wait for the device.

    Processes select the same: with `sharpness_scope="batch"` their gradients are the same, and with `"micro_batch"`
    they select on the mean of their squared norms, while each climbs its own gradient: also one that has none, for
    which the others would wait. `device` is where they meet.

    Returns:
        The ascent, or why there is nothing to climb: a norm is not finite, all of them are zero, no candidate has a
        gradient, or none that has one fits the budget.
    """
    with_gradient = [[p for p in candidate.parameters if p.grad is not None] for candidate in candidates]
    weights: list[Tensor] = [p for parameters in with_gradient for p in parameters]
    gradients: list[Tensor] = [p.grad for p in weights]  # type: ignore[misc]
    apart = config.sharpness_scope == "micro_batch" and is_distributed()
    if not weights and not apart:
        return "nothing that may be perturbed is trained now: it is frozen, or not in the optimizer"
    scores = adaptive_scores(weights, gradients) if config.adaptive and weights else gradients
    squares = norms(scores).cpu().numpy().astype(np.float64) ** 2 if weights else np.zeros(0)
    ends = np.cumsum([len(parameters) for parameters in with_gradient])
    own = agreed = [float(part.sum()) for part in np.split(squares, ends[:-1])]
    device = weights[0].device if weights else device
    if apart:
        agreed = average_over_ranks([torch.tensor(own, dtype=torch.float64, device=device)])[0].tolist()
    if not np.isfinite(agreed).all() or not any(agreed):
        return "the gradient is zero or not finite"
    chosen = select(config, candidates, costs, agreed)
    if config.block_selection == "budget" and is_distributed():
        chosen = first_of_ranks(chosen, len(candidates), device)
    if not chosen:
        return f"no block that is trained now fits max_overhead={config.max_overhead}"
    norm = math.sqrt(sum(own[index] for index in chosen))
    if norm == 0:
        return "the gradient of this process is zero"
    starts = [0, *ends]
    places = [place for index in chosen for place in range(starts[index], starts[index + 1])]
    weights, gradients = [weights[i] for i in places], [gradients[i] for i in places]
    if config.adaptive:
        direction = adaptive_scores(weights, [scores[i] for i in places])
    else:
        direction = gradients
    return Ascent(chosen, agreed, norm, weights, gradients, direction)
