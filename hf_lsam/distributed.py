"""What the processes of a run must agree on, and which ways of running are supported."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import Trainer
from transformers.training_args import OptimizerNames

from .config import LSAMConfig
from .deepspeed import check_deepspeed

# Optimizers that update the weights inside the backward pass: pass 1 would already train.
_UPDATE_IN_BACKWARD = {
    OptimizerNames.LOMO,
    OptimizerNames.ADALOMO,
    OptimizerNames.GALORE_ADAMW_LAYERWISE,
    OptimizerNames.GALORE_ADAMW_8BIT_LAYERWISE,
    OptimizerNames.GALORE_ADAFACTOR_LAYERWISE,
    OptimizerNames.APOLLO_ADAMW_LAYERWISE,
}
# One process, or DistributedDataParallel: every process holds the whole model and, after pass 1, the same gradients.
# DeepSpeed, as far as `check_deepspeed` lets it through, gives them on request.
_SUPPORTED = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.DEEPSPEED}


def is_distributed() -> bool:
    """Whether other processes train with this one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def average_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """
    The mean of each tensor over all processes, by one all-reduce for each dtype and device.

    In one process the tensors themselves. Every process must give tensors of the same shapes in the same order.
    """
    if not is_distributed() or not tensors:
        return list(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(place)
    averages = list(tensors)
    for places in groups.values():
        flat = torch.cat([tensors[place].reshape(-1) for place in places])
        # Divided first, as DistributedDataParallel does: the sum of 16-bit numbers could overflow.
        flat.div_(dist.get_world_size())
        dist.all_reduce(flat)
        parts = flat.split([tensors[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            averages[place] = part.view_as(tensors[place])
    return averages


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace every `.grad` by its mean over all processes; one that only some have counts as zero elsewhere."""
    if not is_distributed():
        return
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    dist.all_reduce(present)
    used = [p for p, count in zip(parameters, present.tolist(), strict=True) if count > 0]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in used]
    for parameter, average in zip(used, average_over_ranks(gradients), strict=True):
        parameter.grad = average


def check_supported(trainer: Trainer, config: LSAMConfig) -> None:
    """
    Refuse what would give wrong results.

    Raises:
        NotImplementedError: names the setting, the reason and the way out.
    """
    args = trainer.args
    way_out = "Set it otherwise, or train plainly with LSAMConfig(block_selection='none')."
    if is_distributed() and args.world_size != dist.get_world_size():
        raise NotImplementedError(
            f"{dist.get_world_size()} processes were launched, but each trains alone: its Trainer counts "
            f"{args.world_size} of them. Accelerate does this on CPUs unless it is told of them: set use_cpu=True "
            "(--use_cpu), or launch one process."
        )
    distributed_type = trainer.accelerator.distributed_type
    if distributed_type not in _SUPPORTED or getattr(trainer.accelerator, "parallelism_config", None) is not None:
        raise NotImplementedError(
            "LSAMTrainer runs in one process, or in several under DistributedDataParallel or DeepSpeed, and this run "
            f"is {distributed_type.value}: weights and gradients that are sharded are not perturbed. Launch it "
            f"without FSDP or a parallelism_config. {way_out}"
        )
    if distributed_type == DistributedType.DEEPSPEED:
        check_deepspeed(trainer, config, way_out)
    uneven = is_distributed() and not trainer.accelerator.even_batches and not args.dataloader_drop_last
    if uneven and config.sharpness_scope == "micro_batch" and args.gradient_accumulation_steps > 1:
        raise NotImplementedError(
            "With even_batches=False a process may have fewer micro-batches in the last step than another, which "
            "would wait for it: sharpness_scope='micro_batch' selects blocks together at each of them. Set "
            "even_batches=True, dataloader_drop_last=True, or sharpness_scope='batch'."
        )
    if args.n_gpu > 1:
        raise NotImplementedError(
            f"torch.nn.DataParallel copies the model to {args.n_gpu} GPUs in each pass, so blocks cannot be replayed. "
            f"Make one GPU visible (CUDA_VISIBLE_DEVICES=0). {way_out}"
        )
    if args.optim in _UPDATE_IN_BACKWARD:
        raise NotImplementedError(
            f"optim={args.optim} updates the weights inside the backward pass, so there is no gradient left to "
            f"perturb by. {way_out}"
        )
    if args.torch_compile and config.ascent_gradient == "current":
        raise NotImplementedError(
            "torch_compile=True compiles the whole model, and each set of selected blocks would compile it anew. Use "
            f"ascent_gradient='previous', which compiles once. {way_out}"
        )
