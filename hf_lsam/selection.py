"""Which blocks are perturbed, from their gradient norms and from what perturbing them costs."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blocks import Candidate, idle_parameters, multiplied_parameters
from .config import LSAMConfig
from .replay import Ran


@dataclass(frozen=True)
class CostModel:
    """
    What pass 2 costs, in units of a plain step, counted in weights and the places (tokens, pixels) that they meet.

    A weight costs 1 in the forward pass, 1 for the gradient of its input and, if it is trained, 1 for its own
    gradient. A plain step pays for all of it, but for gradients only where there are any. Pass 2 starts at the first
    call of a block that holds a perturbed weight, and takes weight gradients for the selected S only:

        overhead = (2 * (weights from that call on, and of the head) + weights of S) / plain,  at most 1

    For N equal blocks in their order, k of them selected from block s on, and nothing else that is (2 (N - s) + k) /
    (3 N). It is what pass 2 costs at most: calls that depend on no perturbed weight need no gradient of their input.
    Products without weights, as those of attention, are left out.

    Attributes:
        passed: For each call of a block, the weights from it to the loss, frozen ones included. Embeddings look up and
            do not multiply, so they are free.
        plain: Cost of a plain step.
        one_graph: Whether the blocks are compiled into one graph, all of which pass 2 runs, whatever is perturbed.
        gradients: As `passed`, of the calls that have a gradient (default: all).
        starts: For each block the place of its first call (default: each is called once, in their order).
        places: For each block the places that its weights meet in all calls (default: 1).
    """

    passed: tuple[float, ...]
    plain: float
    one_graph: bool = False
    gradients: tuple[float, ...] | None = None
    starts: Mapping[int, int] | None = None
    places: Mapping[int, float] | None = None

    @classmethod
    def of(cls, model: nn.Module, blocks: dict[str, nn.Module], one_graph: bool = False) -> "CostModel":
        """Those of `model`, if its `blocks` are called once each, in their order, at equally many places."""
        trained = [any(p.requires_grad for p in block.parameters()) for block in blocks.values()]
        embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
        below = any(p.requires_grad for module in embeddings for p in module.parameters()) or not any(trained)
        grades = [below or any(trained[: index + 1]) for index in range(len(blocks))]
        calls = [Ran(index, 1, has_gradient, torch.float32) for index, has_gradient in enumerate(grades)]
        weights = Weights(model, list(blocks.values()))
        costs = weights.costs(calls, 1, {p for p in model.parameters() if p.requires_grad})
        return cls(costs.passed, costs.plain, one_graph)

    def start(self, candidate: Candidate) -> int:
        """Place of the first call of a block that holds a weight of `candidate`."""
        if self.starts is None:
            return candidate.first_block
        return min((self.starts[block] for block in candidate.blocks if block in self.starts), default=0)

    def size(self, candidate: Candidate) -> float:
        """Cost of the gradients of the weights of `candidate`."""
        if self.places is None or not candidate.blocks:
            return candidate.size
        return candidate.size * sum(self.places.get(b, 0) for b in candidate.blocks) / len(candidate.blocks)

    def reaching(self, start: int) -> float:
        """Cost of the forward pass from call `start` on, and of the gradients of inputs."""
        return self.passed[start] + (self.passed if self.gradients is None else self.gradients)[start]

    def overhead(self, candidates: Iterable[Candidate], replayed: bool = True) -> float:
        """Predicted cost of pass 2 when these are perturbed, in plain steps; without replay it runs forward from 0."""
        chosen = list(candidates)
        if not chosen:
            return 0.0
        if self.one_graph:
            return 1.0
        first = min(map(self.start, chosen))
        again = 0 if replayed else self.passed[0] - self.passed[first]
        return min((again + self.reaching(first) + sum(map(self.size, chosen))) / self.plain, 1.0)


class Weights:
    """The weights of a model that multiply, block by block, and those outside of the blocks, which are its head."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]):
        inside = {module for block in blocks for module in block.modules()}
        used = multiplied_parameters(model) - idle_parameters(model)
        outside = [m for m in model.modules() if m not in inside and not isinstance(m, nn.Embedding)]
        head = dict.fromkeys(p for module in outside for p in module.parameters(recurse=False))
        # The head comes last, as block -1.
        self.parts = [[p for p in part if p in used] for part in (*(b.parameters() for b in blocks), head)]
        self.sizes = [sum(p.numel() for p in part) for part in self.parts]

    def cost(self, calls: Sequence[Ran], heads: int, taking: Collection[Tensor]) -> float:
        """Cost of a pass with these calls of blocks, and so many of the model, where `taking` take a gradient."""
        taken = [sum(p.numel() for p in part if p in taking) for part in self.parts]
        return sum(
            ran.places * (self.sizes[ran.block] * (1 + ran.has_gradient) + taken[ran.block] * ran.has_gradient)
            for ran in (*calls, self._head(calls, heads))
        )

    def costs(self, calls: Sequence[Ran], heads: int, taking: Collection[Tensor]) -> CostModel:
        """What to expect of a second pass where the first was such a one."""
        starts: dict[int, int] = {}
        places: Counter[int] = Counter()
        head = self._head(calls, heads).places * self.sizes[-1]
        passed, gradients = [head], [head]
        for place, ran in reversed(list(enumerate(calls))):
            starts[ran.block] = place
            places[ran.block] += ran.places * ran.has_gradient
            passed.append(passed[-1] + ran.places * self.sizes[ran.block])
            gradients.append(gradients[-1] + ran.places * self.sizes[ran.block] * ran.has_gradient)
        plain = self.cost(calls, heads, taking)
        sums = [tuple(reversed(total[1:] or total)) for total in (passed, gradients)]
        return CostModel(sums[0], plain, False, sums[1], starts, places)

    def _head(self, calls: Sequence[Ran], heads: int) -> Ran:
        """What lies outside of the blocks, at as many places as the last block that was called."""
        places = calls[-1].places if calls else 1
        return Ran(-1, places * heads, True, torch.float32)


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
