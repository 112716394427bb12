"""Which blocks are perturbed, from their gradient norms and from what perturbing them costs."""

from collections.abc import Sequence

from .blocks import Candidate
from .config import LSAMConfig
from .costs import CostModel


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
        start = costs.start(candidates[first])
        room = max_overhead * costs.plain - costs.reaching(start) - costs.size(candidates[first])
        if room < 0:
            continue
        chosen = [first]
        for other in by_norm:
            if len(chosen) == limit:
                break
            size = costs.size(candidates[other])
            if other != first and costs.start(candidates[other]) >= start and size <= room:
                chosen.append(other)
                room -= size
        norm = sum(squared_norms[index] for index in chosen)
        if norm > best_norm:
            best, best_norm = chosen, norm
    return best


def beginnings(config: LSAMConfig, candidates: Sequence[Candidate], costs: CostModel) -> set[int]:
    """Places of the calls that a pass 2 can begin with, where all of `candidates` have a gradient."""
    if config.block_selection == "last":
        limit = config.num_perturbed_blocks
        candidates = candidates if limit is None else candidates[-limit:]
    elif config.block_selection == "budget":
        candidates = [candidate for candidate in candidates if costs.overhead([candidate]) <= config.max_overhead]
    places = {costs.start(candidate) for candidate in candidates}
    # All of those together begin with the first of them.
    return {min(places)} if places and config.block_selection == "last" else places


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
