"""Move the selected weights, and restore them exactly."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial, reduce

import torch
from torch import Tensor
from transformers.utils import logging

from .rounding import add_into, is_coarse, wide
from .shards import from_parts, is_sharded, local_parts, on_host, sum_over_parts

logger = logging.get_logger(__name__)

_ROUNDED = 0.95  # warn if the cosine between the move of 16-bit weights and its direction is below this
Tensors = Sequence[Tensor]
Move = AbstractContextManager[list[Tensor]]


class Perturbation:
    """Moves weights along a direction for the length of a `with` block, and restores them exactly.

    Meanwhile the parameters refer to a buffer, since `w + e - e` differs from `w` for 0.3 to 6 % of float32 weights.
    Sharded weights keep their address under FSDP2: each process moves its shard in place and copies it back.
    """

    def __init__(self) -> None:
        # Seed of stochastic rounding: the number of the step, so that all processes, and resumed runs, round alike.
        self.seed = 0
        # `copies` swaps the two, so that the next `moved` does not overwrite them.
        self._memory, self._other_memory = _Memory(), _Memory()
        self._undo: Callable[[], None] | None = None
        self._rounding_checked = False

    def put_back(self) -> None:
        """Restore moved weights; also called after each step, since Ctrl-C may hit the start of a `with` block."""
        if self._undo is not None:
            self._undo()
            self._undo = None
            torch.clear_autocast_cache()

    def moved(self, weights: Tensors, direction: Tensors, scale: Tensor | float) -> Move:
        """Inside, `weights` are `weights + scale * direction`; yields the local parts of their former values."""
        parts = local_parts(weights)
        buffers = self._memory.places_of(parts)
        if not is_sharded(weights):
            add_into(buffers, parts, direction, scale, self.seed)
            return self.at(weights, buffers)
        _copy(buffers, parts)
        move = partial(add_into, parts, buffers, local_parts(direction), scale, self.seed)
        return self._until_put_back(move, partial(_copy, parts, buffers), buffers)

    def at(self, weights: Tensors, tensors: Tensors) -> Move:
        """Inside, `weights`, none of them sharded, refer to `tensors`; yields the data they referred to before."""
        before = [weight.data for weight in weights]
        return self._until_put_back(partial(_refer, weights, tensors), partial(_refer, weights, before), before)

    @contextmanager
    def _until_put_back(
        self, move: Callable[[], None], undo: Callable[[], None], before: list[Tensor]
    ) -> Iterator[list[Tensor]]:
        self._undo = undo
        try:
            move()
            # `move` refers to the direction, which the caller may free. Autocast may have cached casts of the weights.
            del move
            torch.clear_autocast_cache()
            yield before
        finally:
            self.put_back()

    def copies(self, tensors: Tensors) -> list[Tensor]:
        """Copies in the memory of the last move, since new memory takes a CPU twice as long; kept by the next move."""
        parts = local_parts(tensors)
        buffers = self._memory.places_of(parts)
        _copy(buffers, parts)
        self._memory, self._other_memory = self._other_memory, self._memory
        return from_parts(buffers, tensors)

    def check_rounding(self, weights: Tensors, before: Tensors, direction: Tensors, rho: float) -> None:
        """Warn if 16-bit `weights` moved from `before` in another direction; checks their first move only."""
        if self._rounding_checked:
            return
        coarse = next(filter(is_coarse, self._memory.dtypes), None)
        self._rounding_checked = coarse is not None
        if coarse is not None and (cosine := move_cosine(weights, before, direction)) < _ROUNDED:
            logger.warning(
                f"rho={rho} moves the {coarse} weights by less than they resolve: rounded stochastically, the move is "
                f"noisy (cosine with its direction {cosine:.2f}). Raise rho, or use float32 weights with bf16=True."
            )


class _Memory:
    """Memory that is reused from step to step, as large as the largest set of tensors so far."""

    def __init__(self) -> None:
        self._flat: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._kinds: list[tuple] = []
        self._places: list[Tensor] = []

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Those of all tensors so far."""
        return [dtype for _, dtype in self._flat]

    def places_of(self, tensors: Tensors) -> list[Tensor]:
        """Uninitialised tensors of the same devices, dtypes, shapes and (without gaps) strides as `tensors`."""
        kinds = [(tensor.device, tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]
        if kinds != self._kinds:
            starts, ends = [], Counter[tuple[torch.device, torch.dtype]]()
            for device, dtype, shape, _ in kinds:
                starts.append(ends[device, dtype])
                ends[device, dtype] += shape.numel()
            for (device, dtype), end in ends.items():
                if (device, dtype) not in self._flat or self._flat[device, dtype].numel() < end:
                    self._flat[device, dtype] = torch.empty(end, device=device, dtype=dtype)
            places = []
            for tensor, start in zip(tensors, starts, strict=True):
                dense = tensor if tensor.is_contiguous() else torch.empty_like(tensor, device="meta")
                flat = self._flat[tensor.device, tensor.dtype]
                places.append(flat.as_strided(tensor.shape, dense.stride(), start))
            self._kinds, self._places = kinds, places
        return self._places


@contextmanager
def unchanged(weights: Tensors) -> Iterator[None]:
    """Raise `RuntimeError` if the block changes the moved `weights` in place, since restoring would undo that."""
    versions = [weight._version for weight in weights]
    yield
    if versions != [weight._version for weight in weights]:
        raise RuntimeError(
            "A pass changed perturbed weights in place, as nn.Embedding does with max_norm, and the change is lost "
            "with the perturbation. Set ascent_gradient='current', or select others (block_selection, block_pattern)."
        )


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    torch._foreach_copy_(targets, sources)


def _refer(weights: Tensors, tensors: Tensors) -> None:
    """Let each of `weights` refer to the data of its tensor, in one call that Ctrl-C cannot interrupt."""
    deque(map(Tensor.data.__set__, weights, tensors), maxlen=0)  # type: ignore[attr-defined]


def _real_parts(tensors: Tensors) -> list[Tensor]:
    """Views of the local parts, with complex numbers as pairs of real ones."""
    parts = local_parts(tensors)
    if not any(dtype.is_complex for dtype in {part.dtype for part in parts}):
        return parts
    return [torch.view_as_real(part) if part.is_complex() else part for part in parts]


@torch.no_grad()
def norms(tensors: Tensors) -> Tensor:
    """The Euclidean norm of each whole tensor, in float32 or wider; shape `(len(tensors),)`."""
    dtype = reduce(torch.promote_types, (dtype.to_real() for dtype in {t.dtype for t in tensors}), torch.float32)
    parts = torch.stack(torch._foreach_norm(_real_parts(tensors), 2, dtype=dtype))
    if not is_sharded(tensors):
        return parts
    return sum_over_parts(parts.double().square(), tensors).sqrt().to(dtype)


def joint_norm(tensors: Tensors) -> Tensor:
    """The joint Euclidean norm of all of them: a scalar on the device."""
    return norms(tensors).square().sum().sqrt()


@torch.no_grad()
def distance(tensors: Tensors, others: Tensors) -> float:
    """Joint Euclidean norm of the differences, relative to that of `others`."""
    parts = torch._foreach_sub(local_parts(tensors), local_parts(others))
    apart, whole = norms(from_parts(parts, others)).double().norm(), norms(others).double().norm()
    return float(apart / whole) if whole > 0 or apart > 0 else 0.0


@torch.no_grad()
def mix(plain: Tensors, perturbed: Tensors, alpha: float) -> Tensors:
    """`(1 - alpha) * plain + alpha * perturbed`; may change `plain` in place."""
    if alpha == 1:
        return perturbed
    torch._foreach_lerp_(_real_parts(plain), _real_parts(perturbed), alpha)
    return plain


@torch.no_grad()
def where(condition: Tensor, tensors: Tensors, others: Tensors) -> list[Tensor]:
    """`tensors` if `condition` (a boolean scalar), else `others`; on an accelerator without host synchronisation."""
    if on_host(condition):
        return list(tensors if condition.numpy() else others)
    pairs = zip(local_parts(tensors), local_parts(others), strict=True)
    return from_parts([torch.where(condition, one, other) for one, other in pairs], tensors)


@torch.no_grad()
def zero_unless(condition: Tensor, tensors: Tensors) -> list[Tensor]:
    """`tensors` if `condition` (a boolean scalar), else zeros; on an accelerator without host synchronisation."""
    if on_host(condition):
        return list(tensors) if condition.numpy() else [torch.zeros_like(tensor) for tensor in tensors]
    return from_parts([torch.where(condition, part, 0.0) for part in local_parts(tensors)], tensors)


@torch.no_grad()
def adaptive_scores(weights: Tensors, gradients: Tensors) -> list[Tensor]:
    """ASAM's `|w| g`, whose norm replaces that of the gradient; in float32 or wider."""
    parts = torch._foreach_mul(torch._foreach_abs(wide(local_parts(weights))), wide(local_parts(gradients)))
    return from_parts(parts, gradients)


@torch.no_grad()
def orthogonal_part(perturbed: Tensors, plain: Tensors) -> list[Tensor]:
    """The part of the `perturbed` gradient orthogonal to the `plain` one, of unit length (zero if there is none)."""
    # The peak of LookSAM's memory: one list as large as the gradients, and one product at a time.
    plain_parts, perturbed_parts = wide(local_parts(plain)), wide(local_parts(perturbed))
    products = [(left.conj() * right).sum().real for left, right in zip(perturbed_parts, plain_parts, strict=True)]
    along = sum_over_parts(torch.stack(products), plain).sum() / norms(plain).square().sum()
    parts = list(torch._foreach_mul(plain_parts, -along))
    torch._foreach_add_(parts, perturbed_parts)
    orthogonal = from_parts(parts, plain)
    length = joint_norm(orthogonal)
    torch._foreach_div_(parts, length.clamp_min(torch.finfo(length.dtype).tiny))
    return orthogonal


@torch.no_grad()
def add_along(gradients: Tensors, directions: Tensors, scale: float) -> None:
    """Add to `gradients`, in place, `scale` times their joint norm along each of `directions`."""
    length = joint_norm(gradients).nan_to_num(0.0, posinf=0.0)  # if a gradient is not finite, nothing is added
    torch._foreach_add_(local_parts(gradients), torch._foreach_mul(local_parts(directions), scale * length))


@torch.no_grad()
def move_cosine(weights: Tensors, before: Tensors, direction: Tensors) -> float:
    """Cosine between the move of `weights` from `before` and `direction`; rounding makes it smaller than 1."""
    moves = [weight.double() - old.double() for weight, old in zip(local_parts(weights), before, strict=True)]
    products = [(move * d.double()).sum() for move, d in zip(moves, local_parts(direction), strict=True)]
    along = float(sum_over_parts(torch.stack(products), weights).sum())
    length = float(joint_norm(from_parts(moves, weights)) * joint_norm(direction))
    return along / length if length > 0 else 0.0
