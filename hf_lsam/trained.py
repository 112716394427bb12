"""What is trained now, and what passes cost with it."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from torch import Tensor, nn

from .ascent import Ascent
from .blocks import Candidate, multiplied_parameters
from .compiled import CompiledRegions
from .costs import CostModel, Weights
from .replay import Recording


class Trained:
    """
    What is trained now: what has a gradient of pass 1 and, where that is known, lies in the optimizer.

    Attributes:
        parameters: All that are trained or may be.
        candidates: Those of the model, each with what of it is trained.
        number: Another one for other weights with a gradient.
        is_current: Whether this is so in the present micro-batch: `now` looks once in each.
    """

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
        self.parameters: list[Tensor] = list(model.parameters())
        self.candidates, self.number, self.is_current = candidates, 0, False
        self._optimized: Collection[Tensor] | None = None
        self._key: tuple | None = None
        # For each choice of candidates, how much of each block takes a gradient in pass 2; for `None` in pass 1.
        self._taken: dict[tuple[int, ...] | None, list[int]] = {}

    def now(self) -> "Trained":
        """This, after a look at what has a gradient."""
        if self.is_current:
            return self
        optimized = self._look_up_optimized()
        if optimized is not self._optimized:
            self._optimized = optimized
            self.parameters[:] = dict.fromkeys([*self._model.parameters(), *(optimized or ())])
        key = (tuple([p.grad is not None for p in self.parameters]), id(optimized))
        if key != self._key:
            graded = {p for p, has in zip(self.parameters, key[0], strict=True) if has}
            trained = graded if optimized is None else {p for p in graded if p in optimized}
            self.candidates = [self._part(candidate, trained) for candidate in self._all]
            self._taken = {None: self._weights.taken(graded)}
            self._key, self.number = key, hash(key)
        self.is_current = True
        return self

    def includes(self, parameter: Tensor) -> bool:
        """Whether `parameter` may be trained, with a gradient now or without."""
        optimized = self._look_up_optimized()
        return parameter.requires_grad if optimized is None else parameter in optimized

    def costs(self, recording: Recording) -> CostModel:
        """What a pass 2 costs after such a pass 1."""
        return self._weights.costs(recording.first, recording.heads, self.now()._taken[None])

    def overhead(self, recordings: Sequence[Recording], ascent: Ascent) -> float:
        """What the last pass 2 along `ascent` cost, in plain passes."""
        key = tuple(ascent.chosen)
        if key not in self._taken:
            self._taken[key] = self._weights.taken(self._regions.taken_with(ascent.weights))
        return self._weights.overhead(recordings, self._taken[None], self._taken[key])

    def _part(self, candidate: Candidate, trained: Collection[Tensor]) -> Candidate:
        parameters = tuple(p for p in candidate.parameters if p in trained)
        # What is compiled together takes its gradients together.
        taken = self._regions.taken_with(parameters) & self._multiplied
        return replace(candidate, parameters=parameters, size=sum(p.numel() for p in taken))
