"""Tensors that FSDP2 shards: element-wise operations act on local parts, and sums are reduced over the processes."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate


@torch.no_grad()
def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The shard of each tensor in this process, in the same memory; a tensor that is not sharded, itself."""
    if not is_sharded(tensors):
        return list(tensors)
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


@torch.no_grad()
def from_parts(parts: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Tensor]:
    """The tensors whose local parts are `parts`, sharded like those of `whole`."""
    if not is_sharded(whole):
        return list(parts)
    return [
        DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
        if isinstance(like, DTensor)
        else part
        for part, like in zip(parts, whole, strict=True)
    ]


@torch.no_grad()
def sum_over_parts(sums: Tensor, whole: Sequence[Tensor]) -> Tensor:
    """Sums over whole tensors, from the `sums[i]` over the local parts of `whole[i]`; one all-reduce per mesh."""
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
    return any(issubclass(kind, DTensor) for kind in {*map(type, tensors)})


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules of `model` that FSDP2 shards."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(modules: Iterable[FSDPModule]) -> None:
    """Free full weights that an evaluation has gathered: the model would use them in place of the moved shards."""
    for module in modules:
        module.reshard()


def on_host(tensor: Tensor) -> bool:
    """Whether the values can be read without host synchronisation."""
    return tensor.device.type == "cpu"


def compute_device(tensor: Tensor) -> torch.device:
    """The device that computes with this parameter: of a shard that is offloaded to the CPU, the accelerator."""
    if isinstance(tensor, DTensor) and tensor.device_mesh.device_type != tensor.device.type:
        return torch.device(tensor.device_mesh.device_type)
    return tensor.device
