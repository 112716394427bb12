"""Move the selected weights, and put them back exactly."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Perturbation:
    """
    Moves weights along a direction for the length of a `with` block, and restores them by copy.

    Restoring by subtraction would change 0.3 to 6 % of the float32 weights (w + e - e is not w) and keep a NaN. The
    copies live in a buffer that is kept from step to step, of the size of the largest set that was ever moved.

    Attributes:
        seed: Of stochastic rounding, which draws nothing from the generators of the training. With the number of the
            step, processes and runs that resume round alike.
    """

    def __init__(self) -> None:
        self.seed = 0
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @contextmanager
    def moved(self, weights: Sequence[Tensor], direction: Sequence[Tensor], scale: float) -> Iterator[list[Tensor]]:
        """
        Inside, `weights` are at `weights + scale * direction`; afterwards they are bitwise what they were before.

        Weights of 16 bits are rounded stochastically; rounding to the nearest would swallow most of a short move.

        Args:
            weights: Parameters, changed in place.
            direction: One tensor for each weight, of its shape.
            scale: Factor, for instance `rho / norm`.

        Yields:
            The copies of the weights as they were.
        """
        copies = self._copies(weights)
        try:
            with torch.no_grad():
                _add_(weights, direction, scale, self.seed)
            # Under autocast, casts of the weights may be cached from before.
            torch.clear_autocast_cache()
            yield copies
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(weights), copies)
            torch.clear_autocast_cache()

    @torch.no_grad()
    def _copies(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Copies of `weights`, as slices of the kept buffers."""
        needed: dict[tuple[torch.device, torch.dtype], int] = {}
        places = []
        for weight in weights:
            key = (weight.device, weight.dtype)
            places.append((key, needed.get(key, 0)))
            needed[key] = needed.get(key, 0) + weight.numel()
        for key, size in needed.items():
            if key not in self._buffers or self._buffers[key].numel() < size:
                self._buffers[key] = torch.empty(size, device=key[0], dtype=key[1])
        copies = [
            self._buffers[key][start : start + weight.numel()].view(weight.shape)
            for (key, start), weight in zip(places, weights, strict=True)
        ]
        torch._foreach_copy_(copies, list(weights))
        return copies


def _add_(weights: Sequence[Tensor], direction: Sequence[Tensor], scale: float, seed: int) -> None:
    """`weights += scale * direction`."""
    coarse = [is_coarse(weight) for weight in weights]
    exact = [place for place, is_one in enumerate(coarse) if not is_one]
    if exact:
        torch._foreach_add_([weights[i] for i in exact], [direction[i] for i in exact], alpha=scale)
    if any(coarse):
        generator = torch.Generator(weights[0].device).manual_seed(seed)
        for weight, slope in itertools.compress(zip(weights, direction, strict=True), coarse):
            weight.copy_(round_stochastically(weight.float().add_(slope, alpha=scale), weight.dtype, generator))


def is_coarse(tensor: Tensor) -> bool:
    """Whether its numbers have 16 bits or fewer."""
    return torch.finfo(tensor.dtype).bits < 32


@torch.no_grad()
def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Float32 `values` rounded to one of their two neighbours in a 16-bit `dtype`, such that the mean is `values`."""
    near = values.to(dtype)
    rest = values - near
    # The numbers of one sign are in the order of their bits; next to zero is the smallest one of either sign.
    bits = near.view(torch.int16)
    beyond_zero = torch.where(rest > 0, 1, torch.iinfo(torch.int16).min + 1)
    outwards = torch.where((rest > 0) == (near > 0), bits + 1, bits - 1)
    other = torch.where(near == 0, beyond_zero, outwards).to(torch.int16).view(dtype)
    chance = rest / (other.float() - near)
    draws = torch.rand(values.shape, device=values.device, generator=generator)
    return torch.where(draws < chance, other, near)


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` in float32 or wider: products of 16-bit gradients underflow or overflow."""
    return [tensor.float() if is_coarse(tensor) else tensor for tensor in tensors]


@torch.no_grad()
def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor, in float32 or wider, stacked on their device: shape `(len(tensors),)`."""
    dtype = max((t.dtype for t in tensors), key=lambda dtype: torch.finfo(dtype).bits)
    if torch.finfo(dtype).bits < 32:
        dtype = torch.float32
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=dtype))


@torch.no_grad()
def mix(plain: Sequence[Tensor], perturbed: Sequence[Tensor], alpha: float) -> Sequence[Tensor]:
    """`(1 - alpha) * plain + alpha * perturbed`; may change `plain` in place."""
    if alpha == 1:
        return perturbed
    torch._foreach_lerp_(list(plain), list(perturbed), alpha)
    return plain


@torch.no_grad()
def where(condition: Tensor, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` if `condition`, one boolean, else `others`; on an accelerator without waiting for it."""
    if condition.device.type == "cpu":
        return list(tensors if condition else others)
    return [torch.where(condition, one, other) for one, other in zip(tensors, others, strict=True)]


@torch.no_grad()
def adaptive_scores(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """ASAM's `|w| g`, whose norm takes the place of the gradient's, in float32 or wider."""
    return list(torch._foreach_mul(torch._foreach_abs(wide(weights)), wide(gradients)))


@torch.no_grad()
def orthogonal_part(perturbed: Sequence[Tensor], plain: Sequence[Tensor]) -> list[Tensor]:
    """The part of the `perturbed` gradient orthogonal to the `plain` one, of unit length (zero if there is none)."""
    perturbed, plain = wide(perturbed), wide(plain)
    products = torch._foreach_mul(perturbed, plain)
    along = torch.stack([product.sum() for product in products]).sum() / norms(plain).square().sum()
    parts = list(torch._foreach_sub(perturbed, torch._foreach_mul(plain, along)))
    length = norms(parts).square().sum().sqrt()
    torch._foreach_div_(parts, length.clamp_min(torch.finfo(length.dtype).tiny))
    return parts


@torch.no_grad()
def move_cosine(weights: Sequence[Tensor], before: Sequence[Tensor], direction: Sequence[Tensor]) -> float:
    """Cosine between the move of `weights` from `before` and `direction`; below 1 where rounding swallows it."""
    moves = [weight.double() - old.double() for weight, old in zip(weights, before, strict=True)]
    along = sum(float((move * d.double()).sum()) for move, d in zip(moves, direction, strict=True))
    length = float(norms(moves).square().sum().sqrt() * norms(direction).square().sum().sqrt())
    return along / length if length > 0 else 0.0
