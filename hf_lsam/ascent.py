"""The ascent: which candidates are perturbed and in which direction, and what a step keeps for the next one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .account import Account
from .blocks import Candidate
from .config import LSAMConfig
from .costs import CostModel
from .distributed import average_over_ranks, first_of_ranks, is_distributed
from .perturbation import Perturbation, adaptive_scores, joint_norm, norms
from .rounding import add_into, is_coarse
from .selection import select, sums_of
from .shards import is_sharded, on_host
from .step_log import StepLog


@dataclass
class Ascent:
    """The selected candidates and the direction in which they are moved."""

    chosen: list[int]  # indices of the selected candidates
    squares: Tensor  # squared norm of each gradient (of `|w| g` if adaptive), on the CPU where the selection reads it
    counts: list[int]  # how many of these each candidate has
    norm: Tensor  # joint norm of the selected ones, the denominator of eps: a scalar on the device
    weights: list[Tensor]  # parameters of the selected candidates that have a gradient
    gradients: list[Tensor]  # their gradients
    direction: list[Tensor]  # eps is `rho / norm` times this: the gradients, or `w^2 g` if adaptive
    moved_in_place: bool = False  # whether `move_in_place` has written the moved weights over `direction`

    def scale(self, rho: float) -> Tensor:
        """`rho / norm`, or 0 where the norm is zero or not finite, so that nothing moves."""
        return (rho / self.norm).nan_to_num(0.0, posinf=0.0)

    def length(self, rho: float) -> Tensor:
        """`||eps||`, how far the weights move; if adaptive, that is not `rho`."""
        return joint_norm(self.direction) * self.scale(rho)

    @contextmanager
    def moved(self, perturbation: Perturbation, rho: float) -> Iterator[None]:
        """Inside, the weights of S are w + eps with eps_i = rho * direction_i / norm; afterwards w."""
        if self.moved_in_place:
            move = perturbation.at(self.weights, self.direction)
        else:
            move = perturbation.moved(self.weights, self.direction, self.scale(rho))
        with move as before:
            perturbation.check_rounding(self.weights, before, self.direction, rho)
            yield

    def release(self) -> None:
        """Free the gradients, since those of pass 2 take as much memory."""
        self.gradients, self.direction = [], []
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def move_in_place(self, rho: float) -> None:
        """Overwrite the direction with the moved weights, `w + rho / norm * direction`, where that is possible."""
        # Half the time of writing them to other memory, but FSDP2 needs sharded weights at their own address, and the
        # move of 16-bit weights is compared with its direction. If interrupted, nothing is left to perturb.
        weights, direction = self.weights, self.direction
        kinds = {tensor.dtype for tensor in (*weights, *direction)}
        if self.moved_in_place or is_sharded(weights) or len(kinds) != 1 or any(map(is_coarse, kinds)):
            return
        self.weights, self.direction = [], []
        add_into(direction, weights, direction, self.scale(rho), seed=0)
        self.moved_in_place = True
        self.weights, self.direction = weights, direction


@dataclass
class StepState:
    """What an optimizer step takes over from the steps before it."""

    previous: Ascent | None  # one pass: its ascent, found in the step before
    # LookSAM: weights, and for each the part of the last perturbed gradient that is orthogonal to the plain one.
    correction: tuple[list[Tensor], list[Tensor]] | None
    log: StepLog  # sums since the last log line
    account: Account | None  # of `max_overhead`; `None` without a price, and before the first step at a price


@torch.no_grad()
def find_ascent(
    candidates: Sequence[Candidate], costs: CostModel, config: LSAMConfig, device: torch.device | None = None
) -> Ascent | str:
    """Select S by the gradients in `.grad`, for `eps_i = rho * direction_i / norm`; returns the reason if S is empty.

    Norms that the selection reads are copied to the host in one synchronisation. All processes select the same blocks.
    With `sharpness_scope="micro_batch"` that is by the mean of their squared norms, communicated on `device`, in which
    a process without any gradient takes part, too.
    """
    with_gradient = [[p for p in candidate.parameters if p.grad is not None] for candidate in candidates]
    counts = [len(parameters) for parameters in with_gradient]
    every: list[Tensor] = [p for parameters in with_gradient for p in parameters]
    apart = config.sharpness_scope == "micro_batch" and is_distributed()
    if not every and not apart:
        return "none of the candidate blocks is trained now: they are frozen, or not in the optimizer"
    scores = _gradients(every)
    if config.adaptive and every:
        scores = adaptive_scores(every, scores)
    squares = norms(scores).double().square() if every else torch.zeros(0, dtype=torch.float64, device=device)
    if config.block_selection == "all" or (config.block_selection == "last" and not apart):
        chosen = select(config, candidates, costs, counts)
    else:
        squares = squares.cpu()
        agreed = sums_of(squares.numpy(), counts)
        if apart:
            own = torch.tensor(agreed, device=every[0].device if every else device)
            agreed = average_over_ranks([own])[0].tolist()
        if not np.isfinite(agreed).all() or not any(agreed):
            return "the gradient is zero or not finite"
        chosen = select(config, candidates, costs, agreed)
        if config.block_selection == "budget" and is_distributed():
            chosen = first_of_ranks(chosen, len(candidates), device)
        if not chosen:
            return f"no block that is trained now fits max_overhead={config.budget}"
    parts = squares.split(counts)
    norm = torch.cat([parts[index] for index in chosen]).sum().sqrt()
    if on_host(norm) and not 0 < norm.numpy() < np.inf:
        return "the gradient is zero or not finite"
    weights: list[Tensor] = [p for index in chosen for p in with_gradient[index]]
    direction = gradients = _gradients(weights)
    if config.adaptive:
        score_of = dict(zip(every, scores, strict=True))
        direction = adaptive_scores(weights, [score_of[p] for p in weights])
    return Ascent(chosen, squares, counts, norm, weights, gradients, direction)


def _gradients(weights: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in weights]  # type: ignore[misc]
