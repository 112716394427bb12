"""Which blocks are perturbed, from their gradient norms and from what perturbing them costs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from .blocks import Candidate, idle_parameters, multiplied_parameters
from .config import LSAMConfig


@dataclass(frozen=True)
class CostModel:
    """
    What pass 2 costs, in units of a plain step, counted in weights that each token meets.

    A weight costs 1 in the forward pass, 1 for the gradient of its input and, if it is trained, 1 for its own
    gradient. A plain step pays for all of it, but for input gradients only down to the first trained block. Pass 2
    starts at block s, the first that holds a perturbed weight, and takes weight gradients for the selected S only:

        overhead = (2 * (weights from block s on, and of the head) + weights of S) / plain

    For N equal blocks, k of them selected, and nothing else that is (2 (N - s) + k) / (3 N). Products without weights,
    as those of attention, are left out. A weight counts once a pass: too little where a block runs several times, and
    for a convolution, whose weights meet more places in early blocks than in late ones.

    Attributes:
        passed: For each model block s, the weights from s to the loss, frozen ones included. Embeddings look up and do
            not multiply, so they are free.
        plain: Cost of a plain step.
        one_graph: Whether the blocks are compiled into one graph, all of which pass 2 runs, whatever is perturbed.
    """

    passed: tuple[int, ...]
    plain: int
    one_graph: bool = False

    @classmethod
    def of(cls, model: nn.Module, blocks: dict[str, nn.Module], one_graph: bool = False) -> "CostModel":
        """Count the weights of `model`, whose blocks are `blocks`."""
        inside = {module for block in blocks.values() for module in block.modules()}
        embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        outside = [module for module in model.modules() if module not in inside and module not in embeddings]
        idle = idle_parameters(model)
        head_size = sum(p.numel() for module in outside for p in module.parameters(recurse=False) if p not in idle)
        sizes = [sum(p.numel() for p in block.parameters() if p not in idle) for block in blocks.values()]
        passed = tuple(sum(sizes[first:]) + head_size for first in range(len(sizes))) or (head_size,)
        trained = sum(p.numel() for p in multiplied_parameters(model) if p.requires_grad)
        if any(p.requires_grad for module in embeddings for p in module.parameters()):
            input_gradients = passed[0]
        else:
            first_trained = (i for i, b in enumerate(blocks.values()) if any(p.requires_grad for p in b.parameters()))
            input_gradients = passed[next(first_trained, 0)]
        return cls(passed, passed[0] + input_gradients + trained, one_graph)

    def overhead(self, candidates: Iterable[Candidate], replayed: bool = True) -> float:
        """Predicted cost of pass 2 when these are perturbed, in plain steps; without replay it runs forward from 0."""
        chosen = list(candidates)
        if not chosen:
            return 0.0
        if self.one_graph:
            return 1.0
        first = min(candidate.first_block for candidate in chosen)
        forward = self.passed[first if replayed else 0]
        return (forward + self.passed[first] + sum(candidate.size for candidate in chosen)) / self.plain


def select(
    config: LSAMConfig, candidates: Sequence[Candidate], costs: CostModel, squared_norms: Sequence[float]
) -> list[int]:
    """
    Indices of the candidates to perturb, in their own order; one without a gradient (LayerDrop) is never selected.

    Args:
        config: `block_selection`, `num_perturbed_blocks` and `max_overhead` are read.
        candidates: What can be selected.
        costs: Cost model of the same model.
        squared_norms: Squared gradient norm of each candidate, finite.
    """
    alive = [index for index, squared_norm in enumerate(squared_norms) if squared_norm > 0]
    limit = len(alive) if config.num_perturbed_blocks is None else config.num_perturbed_blocks
    if config.block_selection == "all":
        return alive
    if config.block_selection == "last":
        return alive[-limit:]
    by_norm = sorted(alive, key=lambda index: -squared_norms[index])
    if config.block_selection == "top_k":
        return sorted(by_norm[:limit])
    return sorted(_within_budget(config.max_overhead, limit, candidates, costs, squared_norms, by_norm))


def _within_budget(
    max_overhead: float,
    limit: int,
    candidates: Sequence[Candidate],
    costs: CostModel,
    squared_norms: Sequence[float],
    by_norm: Sequence[int],
) -> list[int]:
    """
    The set within the budget that holds the most squared norm.

    For each candidate as the first: it, and of those that start no earlier the ones with the largest norm that still
    fit. Exact for candidates of one size; the others are filled greedily.
    """
    best: list[int] = []
    best_norm = 0.0
    for first in by_norm:
        start = candidates[first].first_block
        room = max_overhead * costs.plain - 2 * costs.passed[start] - candidates[first].size
        if room < 0:
            continue
        chosen = [first]
        for other in by_norm:
            if len(chosen) == limit:
                break
            if other != first and candidates[other].first_block >= start and candidates[other].size <= room:
                chosen.append(other)
                room -= candidates[other].size
        norm = sum(squared_norms[index] for index in chosen)
        if norm > best_norm:
            best, best_norm = chosen, norm
    return best


def earliest_block(config: LSAMConfig, candidates: Sequence[Candidate], costs: CostModel) -> int:
    """Index of the first block that a selection can begin with, where all candidates have a gradient."""
    if config.block_selection == "last":
        limit = config.num_perturbed_blocks
        candidates = candidates if limit is None else candidates[-limit:]
    elif config.block_selection == "budget":
        candidates = [candidate for candidate in candidates if costs.overhead([candidate]) <= config.max_overhead]
    return min(candidate.first_block for candidate in candidates)


def check_selection(config: LSAMConfig, candidates: Sequence[Candidate], costs: CostModel) -> None:
    """
    Refuse settings that this model cannot follow.

    Raises:
        ValueError: if `num_perturbed_blocks` is more than there are, or `max_overhead` leaves no candidate.
    """
    if config.block_selection in ("all", "none"):
        return
    wanted = config.num_perturbed_blocks
    if wanted is not None and wanted > len(candidates):
        raise ValueError(
            f"num_perturbed_blocks={wanted}, but the model has {len(candidates)} candidates: "
            f"{', '.join(c.name for c in candidates)}. Lower it, or set it to None to perturb all of them."
        )
    if config.block_selection == "budget":
        cheapest = min(candidates, key=lambda candidate: costs.overhead([candidate]))
        least = costs.overhead([cheapest])
        if least > config.max_overhead:
            other = "ascent_gradient='previous', whose cost is next to nothing"
            if config.ascent_gradient == "previous":
                other = "block_selection='last': without a second pass there is no cost to bound"
            raise ValueError(
                f"max_overhead={config.max_overhead} is too small for any candidate: the cheapest, {cheapest.name}, "
                f"costs {least:.3f} of a plain step. Raise max_overhead to at least that, or use {other}."
            )
