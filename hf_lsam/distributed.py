"""What the processes of a run must agree on, and which ways of running are supported."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, DynamoBackend
from torch import Tensor
from transformers import Trainer
from transformers.training_args import OptimizerNames

from .config import LSAMConfig
from .deepspeed import check_deepspeed
from .shards import is_sharded

# Optimizers that update the weights inside the backward pass: pass 1 would already train.
_UPDATE_IN_BACKWARD = {
    OptimizerNames.LOMO,
    OptimizerNames.ADALOMO,
    OptimizerNames.GALORE_ADAMW_LAYERWISE,
    OptimizerNames.GALORE_ADAMW_8BIT_LAYERWISE,
    OptimizerNames.GALORE_ADAFACTOR_LAYERWISE,
    OptimizerNames.APOLLO_ADAMW_LAYERWISE,
}
# Modes of torch.compile that record CUDA graphs.
_CUDA_GRAPHS = {"reduce-overhead", "max-autotune"}
# One process, or DistributedDataParallel: every process holds the whole model and, after pass 1, the same gradients.
# DeepSpeed, as far as `check_deepspeed` lets it through, gives them on request.
# Or FSDP2: every process holds its part of each weight and, after pass 1, that of the same gradient.
_SUPPORTED = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
}


def is_distributed() -> bool:
    """Whether other processes train with this one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def average_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """
    The mean of each tensor over all processes, by one all-reduce for each dtype and device.

    In one process the tensors themselves. Every process must give tensors of the same shapes in the same order.
    Sharded ones are left alone: as gradients, FSDP2 has reduced them over the processes already.
    """
    if not is_distributed() or not tensors:
        return list(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        if is_sharded([tensor]):
            continue
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


def any_of_ranks(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Whether each of `flags` is set in any process; in one process the flags themselves."""
    if not is_distributed():
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.float32, device=device)
    dist.all_reduce(counts)
    return [count > 0 for count in counts.tolist()]


def first_of_ranks(chosen: Sequence[int], count: int, device: torch.device | None) -> list[int]:
    """What the first process has chosen of `count`: costs may differ between batches."""
    mask = torch.zeros(count, dtype=torch.int32, device=device)
    mask[list(chosen)] = 1
    dist.broadcast(mask, 0)
    return mask.nonzero().flatten().tolist()


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
        ValueError: if `max_overhead` cannot hold.
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
    split = getattr(trainer.accelerator, "parallelism_config", None) is not None
    if distributed_type not in _SUPPORTED or split:
        raise NotImplementedError(
            "LSAMTrainer runs in one process, or in several under DistributedDataParallel, FSDP2 or DeepSpeed, and "
            f"this run is {distributed_type.value}{' with a parallelism_config' * split}: weights that are split in "
            f"another way are not perturbed. Launch it as one of those. {way_out}"
        )
    if distributed_type == DistributedType.DEEPSPEED:
        check_deepspeed(trainer, config, way_out)
    _check_sharding(trainer, config)
    uneven = is_distributed() and not trainer.accelerator.even_batches and not args.dataloader_drop_last
    if uneven and config.sharpness_scope == "micro_batch" and args.gradient_accumulation_steps > 1:
        raise NotImplementedError(
            "With even_batches=False a process may have fewer micro-batches in the last step than another, which "
            "would wait for it: sharpness_scope='micro_batch' selects blocks together at each of them. Set "
            "even_batches=True, dataloader_drop_last=True, or sharpness_scope='batch'."
        )
    handler = trainer.accelerator.ddp_handler
    if is_distributed() and config.sharpness_scope == "micro_batch" and handler is not None and handler.static_graph:
        raise NotImplementedError(
            "ddp_static_graph=True lets DistributedDataParallel expect the same work in each pass, but with "
            "sharpness_scope='micro_batch' it averages the gradients of plain steps only. Set ddp_static_graph=False, "
            "or sharpness_scope='batch'."
        )
    if args.n_gpu > 1:
        raise NotImplementedError(
            f"torch.nn.DataParallel copies the model to {args.n_gpu} GPUs in each pass, so blocks cannot be replayed. "
            f"Make one GPU visible (CUDA_VISIBLE_DEVICES=0). {way_out}"
        )
    devices = {str(device) for device in getattr(trainer.model, "hf_device_map", {}).values()} - {"cpu", "disk"}
    if len(devices) > 1:
        raise NotImplementedError(
            f"device_map spreads the model over the devices {', '.join(sorted(devices))}, and pass 2 repeats the "
            "random numbers of one device only. Load it without device_map, and let FSDP2 shard it if it does not fit "
            f"one device. {way_out}"
        )
    if args.optim in _UPDATE_IN_BACKWARD:
        raise NotImplementedError(
            f"optim={args.optim} updates the weights inside the backward pass, so there is no gradient left to "
            f"perturb by. {way_out}"
        )
    plugin = trainer.accelerator.state.dynamo_plugin
    if plugin.backend != DynamoBackend.NO and config.ascent_gradient == "current":
        if plugin.mode in _CUDA_GRAPHS:
            raise NotImplementedError(
                f"torch_compile_mode={plugin.mode!r} records CUDA graphs, whose outputs the next run writes over: "
                "pass 2 would run over what is kept of pass 1. Use torch_compile_mode='default' or "
                f"'max-autotune-no-cudagraphs', or ascent_gradient='previous'. {way_out}"
            )
        if not plugin.use_regional_compilation:
            _check_one_graph(trainer, config)


def check_hooks(trainer: Trainer) -> None:
    """
    Refuse an optimizer that takes each gradient as soon as it is there.

    Raises:
        NotImplementedError: if a parameter has a hook that sees its gradient within the backward pass.
    """
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        return
    hooked = [name for name, p in trainer.model.named_parameters() if getattr(p, "_post_accumulate_grad_hooks", None)]
    if hooked:
        raise NotImplementedError(
            f"{hooked[0]} has hooks that take its gradient within the backward pass "
            "(register_post_accumulate_grad_hook), as optimizers have that update or offload there: they would take "
            "that of either pass, and never the mixed one. Use an optimizer that reads .grad in its step, or train "
            "plainly with LSAMConfig(block_selection='none')."
        )


def _check_one_graph(trainer: Trainer, config: LSAMConfig) -> None:
    """Refuse what two passes over a model that is compiled as a whole cannot do."""
    way_out = (
        "Compile the blocks one by one (environment variable ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=true, or "
        "dynamo_use_regional_compilation in the configuration of accelerate)"
    )
    if config.block_selection == "budget" and config.max_overhead < 1:
        raise ValueError(
            "torch_compile=True compiles the whole model into one graph, so pass 2 costs as much as a plain step "
            f"whichever blocks are perturbed, and max_overhead={config.max_overhead} cannot hold. {way_out}, raise "
            "max_overhead to 1, or use ascent_gradient='previous'."
        )
    if config.sharpness_scope == "micro_batch" and trainer.args.world_size > 1:
        raise NotImplementedError(
            "torch_compile=True hides DistributedDataParallel from what keeps the gradients of a micro-batch to the "
            f"process that took them, which sharpness_scope='micro_batch' needs. {way_out}, or use "
            "sharpness_scope='batch'."
        )


def _check_sharding(trainer: Trainer, config: LSAMConfig) -> None:
    """Of the ways to shard a model, leave only FSDP2 as accelerate sets it up."""
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise NotImplementedError(
            "The model was loaded with a distributed_config, which may split weights and gradients in ways that are "
            "not perturbed. Load it without, and let accelerate shard it (fsdp_version: 2). Or train plainly with "
            "LSAMConfig(block_selection='none')."
        )
    if trainer.accelerator.distributed_type != DistributedType.FSDP:
        return
    if not trainer.accelerator.is_fsdp2:
        raise NotImplementedError(
            "FSDP1 (FullyShardedDataParallel) keeps the weights of many modules in one flat tensor, in which there "
            "are no blocks to perturb. Set fsdp_version: 2 in the FSDP settings, or train plainly with "
            "LSAMConfig(block_selection='none')."
        )
    if config.sharpness_scope == "micro_batch":
        raise NotImplementedError(
            "sharpness_scope='micro_batch' climbs the gradient of this process's own micro-batch, but FSDP2 has "
            "averaged it over the processes by then. Set sharpness_scope='batch', launch without FSDP, or train "
            "plainly with LSAMConfig(block_selection='none')."
        )
