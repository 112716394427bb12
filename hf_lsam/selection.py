"""The selection of blocks, by their gradient norms and the cost of perturbing them."""

from collections.abc import Sequence

import numpy as np

from .blocks import Candidate
from .config import LSAMConfig
from .costs import CostModel


def sums_of(values: np.ndarray, counts: Sequence[int]) -> list[float]:
    """The sum of the `values` of each candidate, of which it has `counts`, one candidate after another."""
    owners = np.repeat(np.arange(len(counts)), counts)
    return np.bincount(owners, weights=values, minlength=len(counts)).tolist()


def select(
    config: LSAMConfig, candidates: Sequence[Candidate], costs: CostModel, squared_norms: Sequence[float]
) -> list[int]:
    """Indices of the candidates to perturb, in ascending order; never one without a gradient (LayerDrop)."""
    alive = [index for index, squared_norm in enumerate(squared_norms) if squared_norm > 0]
    limit = len(alive) if config.num_perturbed_blocks is None else config.num_perturbed_blocks
    if config.block_selection == "all":
        return alive
    if config.block_selection == "last":
        return alive[-limit:]
    by_norm = sorted(alive, key=lambda index: -squared_norms[index])
    if config.block_selection == "top_k":
        return sorted(by_norm[:limit])
    # The budget: for each candidate as the first, add those with the largest norm that start no earlier and still fit.
    # This is exact for candidates of equal size, and greedy for others.
    sizes, starts = list(map(costs.size, candidates)), list(map(costs.start, candidates))
    sets: list[list[int]] = [[]]
    for first in by_norm:
        room = config.budget * costs.plain - costs.reaching(starts[first]) - sizes[first]
        if room < 0:
            continue
        sets.append([first])
        for other in by_norm:
            if other != first and starts[other] >= starts[first] and sizes[other] <= room and len(sets[-1]) < limit:
                sets[-1].append(other)
                room -= sizes[other]
    return sorted(max(sets, key=lambda chosen: sum(squared_norms[index] for index in chosen)))


def replay_starts(config: LSAMConfig, candidates: Sequence[Candidate], costs: CostModel) -> set[int]:
    """Indices of the calls of blocks at which a pass 2 may begin, if all of `candidates` have a gradient."""
    if config.block_selection == "last":
        limit = config.num_perturbed_blocks or len(candidates)  # all of them are selected, so it begins at the first
        return {min(map(costs.start, candidates[-limit:]))} if candidates else set()
    is_budget = config.block_selection == "budget"
    return {costs.start(c) for c in candidates if not is_budget or costs.overhead([c]) <= config.budget}


def predicted_overheads(config: LSAMConfig, candidates: Sequence[Candidate], costs: CostModel) -> tuple[float, float]:
    """The least and the largest cost of a pass 2 for as many of the trained `candidates` as are perturbed."""
    trained = [candidate for candidate in candidates if candidate.is_trained] or list(candidates)
    count = min(config.num_perturbed_blocks or len(trained), len(trained))
    last, first = costs.overhead(trained[-count:]), costs.overhead(trained[:count])
    if config.block_selection == "budget":
        return 0.0, min(config.budget, first)
    return last, last if config.block_selection == "last" else first


def check_selection(config: LSAMConfig, candidates: Sequence[Candidate], costs: CostModel) -> None:
    """Raise `ValueError` if `num_perturbed_blocks` exceeds the candidates, or none of them fits `max_overhead`."""
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
        if least > config.budget:
            other = "ascent_gradient='previous', which needs no second pass"
            if config.ascent_gradient == "previous":
                other = "block_selection='last', since without a second pass there is no cost to limit"
            raise ValueError(
                f"max_overhead={config.budget} is too small for any candidate: the cheapest, {cheapest.name}, "
                f"costs {least:.3f} of a plain step. Raise max_overhead to at least that, or use {other}."
            )
