"""Tensors that FSDP2 shards: what goes element by element is done to the parts, and sums go over the processes."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate


@torch.no_grad()
def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process holds of each tensor, sharing its memory; of a tensor that is not sharded, all of it."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


@torch.no_grad()
def from_parts(parts: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Tensor]:
    """The tensors whose local parts are `parts`, sharded as those of `whole` are."""
    return [
        DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
        if isinstance(like, DTensor)
        else part
        for part, like in zip(parts, whole, strict=True)
    ]


@torch.no_grad()
def sum_over_parts(sums: Tensor, whole: Sequence[Tensor]) -> Tensor:
    """`sums[i]`, over this process's part of `whole[i]`, as that over all of it; an all-reduce for each mesh."""
    groups: dict[tuple, list[int]] = {}
    for place, tensor in enumerate(whole):
        if isinstance(tensor, DTensor):
            kinds = tuple(Replicate() if p.is_replicate() else Partial("sum") for p in tensor.placements)
            groups.setdefault((tensor.device_mesh, kinds), []).append(place)
    total = sums
    for (mesh, kinds), places in groups.items():
        index = torch.tensor(places, device=sums.device)
        total = total.index_copy(0, index, DTensor.from_local(sums[index], mesh, kinds).full_tensor())
    return total


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of `tensors` is sharded."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules of `model` that FSDP2 shards."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(modules: Iterable[FSDPModule]) -> None:
    """Give up weights that an evaluation has gathered: the model would use them, whatever is done to the shards."""
    for module in modules:
        module.reshard()


def on_host(tensor: Tensor) -> bool:
    """Whether its values are there. Those of an accelerator have to be waited for."""
    return tensor.device.type == "cpu"


def compute_device(tensor: Tensor) -> torch.device:
    """Where a module with this parameter computes: for a shard that is offloaded to the CPU, not where it lies."""
    if isinstance(tensor, DTensor) and tensor.device_mesh.device_type != tensor.device.type:
        return torch.device(tensor.device_mesh.device_type)
    return tensor.device
