"""16-bit weights: short moves are rounded stochastically, since rounding to the nearest would lose them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .shards import on_host


@torch.no_grad()
def add_into(
    targets: Sequence[Tensor], weights: Sequence[Tensor], direction: Sequence[Tensor], scale: Tensor | float, seed: int
) -> None:
    """`targets = weights + scale * direction`; 16-bit numbers are rounded stochastically, with `seed`."""
    if isinstance(scale, Tensor) and on_host(scale):
        scale = scale.numpy().item()
    kinds = {weight.dtype for weight in weights}
    coarse = set(filter(is_coarse, kinds))
    scales = {kind: scale.to(kind) for kind in kinds} if isinstance(scale, Tensor) else {}
    generator = torch.Generator(weights[0].device).manual_seed(seed) if coarse else None
    for target, weight, slope in zip(targets, weights, direction, strict=True):
        if generator is not None and weight.dtype in coarse:
            exact = weight.float().add_(slope.float() * scale)
            target.copy_(round_stochastically(exact, weight.dtype, generator))
        elif scales:
            torch.addcmul(weight, slope, scales[weight.dtype], out=target)
        else:
            torch.add(weight, slope, alpha=float(scale), out=target)


def is_coarse(dtype: torch.dtype) -> bool:
    """Whether `dtype` has 16 bits or fewer."""
    return torch.finfo(dtype).bits < 32


@torch.no_grad()
def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Float32 `values` rounded to one of their two neighbours in a 16-bit `dtype`; the expectation is `values`."""
    near = values.to(dtype)
    rest = values - near
    # As integers, the bits of numbers of one sign are in order. The neighbours of zero are the smallest of each sign.
    bits = near.view(torch.int16)
    beyond_zero = torch.where(rest > 0, 1, torch.iinfo(torch.int16).min + 1)
    outwards = torch.where((rest > 0) == (near > 0), bits + 1, bits - 1)
    other = torch.where(near == 0, beyond_zero, outwards).to(torch.int16).view(dtype)
    chance = rest / (other.float() - near)
    draws = torch.rand(values.shape, device=values.device, generator=generator)
    return torch.where(draws < chance, other, near)


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` in float32 or wider: products of 16-bit gradients underflow or overflow."""
    return [tensor.float() if is_coarse(tensor.dtype) else tensor for tensor in tensors]
