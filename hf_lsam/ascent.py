"""The direction to climb: which candidates, and along what."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .blocks import Candidate
from .config import LSAMConfig
from .perturbation import adaptive_scores, norms
from .selection import CostModel, select


@dataclass
class Ascent:
    """
    The selected candidates and what they climb.

    Attributes:
        chosen: Indices of the selected candidates.
        squared_norms: Squared gradient norm of every candidate (of `|w| g` if adaptive).
        weights: Parameters of the selected candidates that have a gradient.
        gradients: Their gradients.
        direction: What is added to the weights, times `rho / norm`: the gradients, or `w^2 g` if adaptive.
    """

    chosen: list[int]
    squared_norms: list[float]
    weights: list[Tensor]
    gradients: list[Tensor]
    direction: list[Tensor]

    @property
    def norm(self) -> float:
        """Joint norm of the selected gradients, the denominator of eps."""
        return math.sqrt(sum(self.squared_norms[index] for index in self.chosen))


@torch.no_grad()
def find_ascent(candidates: Sequence[Candidate], costs: CostModel, config: LSAMConfig) -> Ascent | None:
    """
    Select on the gradients in `.grad`. The one wait for the device in a step: the norms come to the host together.

    Returns:
        The ascent, or `None` where there is nothing to climb: a norm is not finite, or all of them are zero.
    """
    with_gradient = [[p for p in candidate.parameters if p.grad is not None] for candidate in candidates]
    weights: list[Tensor] = [p for parameters in with_gradient for p in parameters]
    if not weights:
        return None
    gradients: list[Tensor] = [p.grad for p in weights]  # type: ignore[misc]
    scores = adaptive_scores(weights, gradients) if config.adaptive else gradients
    squares = norms(scores).cpu().numpy().astype(np.float64) ** 2
    ends = np.cumsum([len(parameters) for parameters in with_gradient])
    squared_norms = [float(part.sum()) for part in np.split(squares, ends[:-1])]
    if not np.isfinite(squares).all() or not squares.any():
        return None
    chosen = select(config, candidates, costs, squared_norms)
    if not chosen:
        return None
    starts = [0, *ends]
    places = [place for index in chosen for place in range(starts[index], starts[index + 1])]
    weights, gradients = [weights[i] for i in places], [gradients[i] for i in places]
    if config.adaptive:
        selected_scores = [scores[i] for i in places]
        direction = list(torch._foreach_mul(torch._foreach_abs(weights), selected_scores))
    else:
        direction = gradients
    return Ascent(chosen, squared_norms, weights, gradients, direction)
