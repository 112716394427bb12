"""The cost of a second pass, counted from the calls of the blocks and from what is trained now."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from .blocks import Candidate, idle_parameters, multiplied_parameters, outside_parameters
from .compiled import CompiledRegions
from .replay import Call, Recording


@dataclass(frozen=True)
class CostModel:
    """An upper bound of the cost of pass 2, in plain steps. The unit is one weight applied to one token (or pixel).

    That costs 1 in the forward pass, 1 for the gradient of the input, if there is one, and 1 for that of the weight,
    if it is trained. Pass 2 starts at the first call of a block with a perturbed weight, and computes weight gradients
    of S only:

        overhead = (2 * (weights from that call on, head included) + weights of S) / plain,  at most 1

    For k of N equal blocks, the first of them block s (0-based), that is (2 (N - s) + k) / (3 N). The products of
    attention scores are not counted.
    """

    passed: tuple[float, ...]  # by call of a block or the head: cost of the forward pass from there to the loss
    plain: float  # cost of a plain step
    one_graph: bool = False  # whether the blocks are compiled into one graph, all of which pass 2 runs
    gradients: tuple[float, ...] | None = None  # as `passed`, for the gradients of inputs (default: the same)
    starts: Mapping[int, int] | None = None  # index of each block's first call (default: one call each, in order)
    places: Mapping[int, float] | None = None  # tokens that each block is applied to in all its calls (default: 1)

    @classmethod
    def of(cls, model: nn.Module, blocks: dict[str, nn.Module], one_graph: bool = False) -> "CostModel":
        """The costs of `model` if each of `blocks` is called once, in order, on equally many tokens."""
        trained = {p for p in model.parameters() if p.requires_grad}
        takes = [not trained.isdisjoint(block.parameters()) for block in blocks.values()]
        embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        # Whether the first block's input has a gradient, which then passes through all blocks.
        below = not any(takes) or any(not trained.isdisjoint(module.parameters()) for module in embeddings)
        calls = [Call(index, 1, below or any(takes[: index + 1])) for index in range(len(blocks))]
        weights = Weights(model, list(blocks.values()))
        costs = weights.costs(calls, 1, weights.taken(trained))
        return cls(costs.passed, costs.plain, one_graph)

    def start(self, candidate: Candidate) -> int:
        """Index of the first call of a block that holds a weight of `candidate`."""
        if self.starts is None:
            return candidate.first_block
        return min((self.starts[block] for block in candidate.blocks if block in self.starts), default=0)

    def size(self, candidate: Candidate) -> float:
        """Cost of the weight gradients of `candidate`."""
        if self.places is None or not candidate.blocks:
            return candidate.size
        return candidate.size * sum(self.places.get(b, 0) for b in candidate.blocks) / len(candidate.blocks)

    def reaching(self, start: int) -> float:
        """Cost of the forward pass from call `start` on, and of the gradients of the inputs there."""
        return self.passed[start] + (self.passed if self.gradients is None else self.gradients)[start]

    def overhead(self, candidates: Iterable[Candidate], replayed: bool = True) -> float:
        """Cost of pass 2 if `candidates` are perturbed, in plain steps; not `replayed`, it runs the whole forward."""
        chosen = list(candidates)
        if not chosen:
            return 0.0
        if self.one_graph:
            return 1.0
        first = min(map(self.start, chosen))
        again = 0 if replayed else self.passed[0] - self.passed[first]
        return min((again + self.reaching(first) + sum(map(self.size, chosen))) / self.plain, 1.0)


class Weights:
    """The weights of a model that take part in products, by block; the last part, block -1, is outside of blocks."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]):
        used = multiplied_parameters(model) - idle_parameters(model)
        parts = [*(block.parameters() for block in blocks), outside_parameters(model, blocks, nn.Embedding)]
        self.parts = [[p for p in part if p in used] for part in parts]
        self.sizes = [sum(p.numel() for p in part) for part in self.parts]

    def taken(self, weights: Collection[Tensor]) -> list[int]:
        """The number of weights of each part that are in `weights`, those that get a gradient."""
        return [sum(p.numel() for p in part if p in weights) for part in self.parts]

    def overhead(self, recordings: Sequence[Recording], first: Sequence[int], last: Sequence[int]) -> float:
        """Cost of the last passes over plain ones, at most 1; `first`, `last`: `taken` in pass 1 and in the last."""
        plain = sum(self._cost(recording.first, recording.heads, first) for recording in recordings)
        return min(sum(self._cost(r.last, r.heads, last) for r in recordings) / plain, 1.0)

    def costs(self, calls: Sequence[Call], heads: int, taken: Sequence[int]) -> CostModel:
        """The cost model after a pass 1 with these `calls` of blocks and `heads` calls of the model."""
        starts: dict[int, int] = {}
        places: Counter[int] = Counter()
        passed, gradients = [0], [0]
        for place, ran in reversed(list(enumerate(self._with_head(calls, heads)))):
            starts[ran.block] = place
            places[ran.block] += ran.places * ran.has_gradient
            passed.append(passed[-1] + ran.places * self.sizes[ran.block])
            gradients.append(gradients[-1] + ran.places * self.sizes[ran.block] * ran.has_gradient)
        plain = self._cost(calls, heads, taken)
        return CostModel(tuple(passed[:0:-1]), plain, False, tuple(gradients[:0:-1]), starts, places)

    def _cost(self, calls: Sequence[Call], heads: int, taken: Sequence[int]) -> float:
        return sum(
            ran.places * (self.sizes[ran.block] * (1 + ran.has_gradient) + taken[ran.block] * ran.has_gradient)
            for ran in self._with_head(calls, heads)
        )

    def _with_head(self, calls: Sequence[Call], heads: int) -> list[Call]:
        """The calls and, as the last one, the head, applied to as many tokens as the last block that was called."""
        places = calls[-1].places if calls else 1
        return [*calls, Call(-1, places * heads, True)]


class Trained:
    """The parameters that are trained now: those with a gradient from pass 1 and, if that is known, an optimizer."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        candidates: list[Candidate],
        regions: CompiledRegions,
        optimized: Callable[[], Collection[Tensor] | None],
    ):
        self._model, self._all, self._regions, self._look_up_optimized = model, candidates, regions, optimized
        self._multiplied, self._weights = multiplied_parameters(model), Weights(model, blocks)
        self.parameters: list[Tensor] = list(model.parameters())  # of the model and of the optimizer
        self._former = set(self.parameters)  # those of the model from which the candidates were made
        self._is_outdated = False
        self.candidates = candidates  # each reduced to its trained parameters
        self.number = 0  # identifies the set of parameters with a gradient
        self.is_current = False  # whether `now` has run in this micro-batch
        self._optimized: Collection[Tensor] | None = None
        self._key: tuple | None = None
        self._taken: dict[tuple[int, ...] | None, list[int]] = {}  # `Weights.taken` by selection; `None` is pass 1

    def now(self) -> "Trained":
        """Update this, at most once a micro-batch, from the parameters that have a gradient; returns itself."""
        if self.is_current:
            return self
        optimized = self._look()
        flags = [p.grad is not None for p in self.parameters]
        # Under DeepSpeed there is no `.grad` before the last micro-batch.
        key = (tuple(flags if any(flags) else [p.requires_grad for p in self.parameters]), id(optimized))
        if key != self._key:
            graded = {p for p, has in zip(self.parameters, key[0], strict=True) if has}
            trained = graded if optimized is None else {p for p in graded if p in optimized}
            self.candidates = [self._part(candidate, trained) for candidate in self._all]
            self._taken = {None: self._weights.taken(graded)}
            self._key, self.number = key, hash(key)
        self.is_current = True
        return self

    def is_outdated(self) -> bool:
        """Whether the optimizer has got parameters of the model that did not exist when this was made."""
        self._look()
        return self._is_outdated

    def includes(self, parameter: Tensor) -> bool:
        """Whether `parameter` may be trained, whether or not it has a gradient now."""
        optimized = self._look() if self._optimized is None else self._optimized
        return parameter.requires_grad if optimized is None else parameter in optimized

    def _look(self) -> Collection[Tensor] | None:
        """The parameters in the optimizer; where they have changed, those of the model are read anew, too."""
        optimized = self._look_up_optimized()
        if optimized is not self._optimized:
            self._optimized = optimized
            self.parameters[:] = dict.fromkeys([*self._model.parameters(), *(optimized or ())])
            new = set(self._model.parameters()) - self._former
            self._is_outdated = not new.isdisjoint(optimized or ())
        return optimized

    def costs(self, recording: Recording) -> CostModel:
        """The cost model of a pass 2 after this pass 1."""
        return self._weights.costs(recording.first, recording.heads, self.now()._taken[None])

    def overhead(self, recordings: Sequence[Recording], chosen: Sequence[int], weights: Sequence[Tensor]) -> float:
        """The cost of the last pass 2, for the `weights` of the `chosen` candidates, in plain passes."""
        key = tuple(chosen)
        if key not in self._taken:
            self._taken[key] = self._weights.taken(self._regions.whole_regions(weights))
        return self._weights.overhead(recordings, self._taken[None], self._taken[key])

    def _part(self, candidate: Candidate, trained: Collection[Tensor]) -> Candidate:
        parameters = tuple(p for p in candidate.parameters if p in trained)
        # Weights that are compiled together get their gradients together.
        taken = self._regions.whole_regions(parameters) & self._multiplied
        return replace(candidate, parameters=parameters, size=sum(p.numel() for p in taken))
