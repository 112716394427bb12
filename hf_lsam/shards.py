"""
Tensors that FSDP2 shards over processes: a `DTensor` stands for the whole, of which this process holds a part.

Weights and their gradients are split in the same way, so what is done element by element is done to the parts, and
what is a sum over all elements is summed over the processes.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor


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


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor; if it is sharded, on the CPU, and every process has to call this."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def sharded_as(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of `tensor`, which every process holds, if `like` is sharded."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to(like.device)


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of `tensors` is sharded."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules of `model` that FSDP2 shards."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(modules: Iterable[FSDPModule]) -> None:
    """
    Give up the gathered weights that FSDP2 keeps after a forward pass without a backward pass (an evaluation).

    The model shows them as its parameters, and would use them whatever was done to the shards meanwhile.
    """
    for module in modules:
        module.reshard()


def compute_device(tensor: Tensor) -> torch.device:
    """Where a module with this parameter computes: for a shard that is offloaded to the CPU, not where it lies."""
    if isinstance(tensor, DTensor) and tensor.device_mesh.device_type != tensor.device.type:
        return torch.device(tensor.device_mesh.device_type)
    return tensor.device
