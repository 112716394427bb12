"""What the processes of a run agree on, and the checks of what is supported."""

from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from .config import LSAMConfig
from .deepspeed import check_deepspeed
from .shards import is_sharded

# In these, every process has the same weights and, after pass 1, gradients (in shards, or from DeepSpeed on request).
_SUPPORTED = {"NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED"}
# Wrappers that `LSAM` refuses, besides those that Accelerate reports and FSDP2.
_REFUSED_IN_LOOPS = {"DataParallel", "DeepSpeedEngine", "FullyShardedDataParallel"}
_WAY_OUT = "Or train without perturbation: LSAMConfig(block_selection='none')."
_STATIC_GRAPH = (
    "{0}=True requires that DistributedDataParallel averages gradients in every step or in none, and with "
    "sharpness_scope='micro_batch' it does so in plain steps only. Set {0}=False, or sharpness_scope='batch'."
)


def is_distributed() -> bool:
    """Whether other processes train together with this one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def average_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each tensor over all processes, by one all-reduce per dtype and device; shapes must be the same."""
    if not is_distributed() or not tensors:
        return list(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        if not is_sharded([tensor]):  # FSDP2 has already averaged the sharded ones
            groups.setdefault((tensor.device, tensor.dtype), []).append(place)
    averages = list(tensors)
    for places in groups.values():
        flat = torch.cat([tensors[place].reshape(-1) for place in places])
        # As DistributedDataParallel does: divide first, since the sum of 16-bit numbers could overflow.
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


def mean_of_ranks(number: float, device: torch.device) -> float:
    """The mean of `number` over all processes; in one process the number itself."""
    if not is_distributed():
        return number
    return average_over_ranks([torch.tensor(number, device=device)])[0].item()


def first_of_ranks(chosen: Sequence[int], count: int, device: torch.device | None) -> list[int]:
    """The selection of the first process among `count` candidates, since costs may differ between batches."""
    mask = torch.zeros(count, dtype=torch.int32, device=device)
    mask[list(chosen)] = 1
    dist.broadcast(mask, 0)
    return mask.nonzero().flatten().tolist()


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace each `.grad` by its mean over all processes, where a missing one counts as zero."""
    if not is_distributed():
        return
    used = list(compress(parameters, any_of_ranks([p.grad is not None for p in parameters], parameters[0].device)))
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in used]
    for parameter, average in zip(used, average_over_ranks(gradients), strict=True):
        parameter.grad = average


def check_supported(trainer: Trainer, config: LSAMConfig) -> None:
    """Raise `NotImplementedError` where results would be wrong, and `ValueError` if `max_overhead` cannot be met."""
    for problem in _problems(trainer, config):
        raise NotImplementedError(f"{problem} {_WAY_OUT}")


def _problems(trainer: Trainer, config: LSAMConfig) -> Iterator[str]:
    """Each setting that is not supported, with the reason and the setting to use instead."""
    args, accelerator = trainer.args, trainer.accelerator
    is_micro_batch = config.sharpness_scope == "micro_batch"
    launched = dist.get_world_size() if is_distributed() else args.world_size
    if launched != args.world_size:
        yield f"{launched} processes were launched, but each trains alone. On CPUs set use_cpu=True, or launch one."
    kind = accelerator.distributed_type
    is_split = getattr(accelerator, "parallelism_config", None) is not None
    if kind.value not in _SUPPORTED or is_split:
        yield (
            f"This run is {kind.value}{' with a parallelism_config' * is_split}, which splits the weights in a way "
            "that is not supported. Launch one process, DistributedDataParallel, FSDP2 or DeepSpeed."
        )
    if kind == DistributedType.DEEPSPEED:
        check_deepspeed(trainer, config, _WAY_OUT)
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        yield "distributed_config may split weights in ways that are not supported. Load without it, and use FSDP2."
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        yield "FSDP1 keeps all weights in flat tensors, which hold no blocks to perturb. Set fsdp_version: 2."
    if kind == DistributedType.FSDP and is_micro_batch:
        yield "FSDP2 averages gradients that sharpness_scope='micro_batch' keeps apart. Set sharpness_scope='batch'."
    is_uneven = not accelerator.even_batches and not args.dataloader_drop_last
    if is_distributed() and is_uneven and is_micro_batch and args.gradient_accumulation_steps > 1:
        yield (
            "With even_batches=False, a process may have fewer micro-batches than the others, which wait for it. "
            "Set even_batches=True, dataloader_drop_last=True, or sharpness_scope='batch'."
        )
    if is_distributed() and is_micro_batch and getattr(accelerator.ddp_handler, "static_graph", False):
        yield _STATIC_GRAPH.format("ddp_static_graph")
    if args.n_gpu > 1:
        yield "DataParallel copies the model in each pass, so no block can be replayed. Set CUDA_VISIBLE_DEVICES=0."
    devices = {str(device) for device in getattr(trainer.model, "hf_device_map", {}).values()} - {"cpu", "disk"}
    if len(devices) > 1:
        yield "device_map spans devices, and pass 2 repeats random numbers on one only. Load without it, or use FSDP2."
    if args.optim.endswith(("lomo", "_layerwise")):
        yield f"optim={args.optim} updates the weights in the backward pass, that is before pass 2. Choose another."
    plugin = accelerator.state.dynamo_plugin
    is_compiled = plugin.backend != DynamoBackend.NO and config.ascent_gradient == "current"
    if is_compiled and plugin.mode in ("reduce-overhead", "max-autotune"):
        yield (
            f"torch_compile_mode={plugin.mode!r} records CUDA graphs, with which pass 2 overwrites outputs of pass 1. "
            "Use torch_compile_mode='default' or 'max-autotune-no-cudagraphs', or ascent_gradient='previous'."
        )
    is_one_graph = is_compiled and not plugin.use_regional_compilation
    way_out = "Compile the blocks one by one (with ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=true in the environment)"
    if is_one_graph and config.block_selection == "budget" and config.budget < 1:
        raise ValueError(
            f"torch_compile=True makes pass 2 cost a plain step, so max_overhead={config.budget} cannot be met. "
            f"{way_out}, raise max_overhead to 1, or use ascent_gradient='previous'."
        )
    if is_one_graph and is_micro_batch and args.world_size > 1:
        yield (
            "torch_compile=True wraps DistributedDataParallel, whose averaging of gradients cannot be switched off "
            f"then, as sharpness_scope='micro_batch' requires. {way_out}, or use sharpness_scope='batch'."
        )


def check_loop(model: nn.Module, config: LSAMConfig, scaler: Any, accelerator: Accelerator | None) -> None:
    """Raise `NotImplementedError` where the results of `LSAM` would be wrong, `ValueError` for two scalers."""
    if not config.enabled:
        return
    if scaler is not None and accelerator is not None:
        raise ValueError("An accelerator has its own gradient scaler. Give LSAM either accelerator or scaler.")
    kinds = {type(module).__name__ for module in model.modules()} & _REFUSED_IN_LOOPS
    kinds |= {"FSDP2, or another way that shards weights,"} if is_sharded(model.parameters()) else set()
    if accelerator is not None:
        kinds |= {accelerator.distributed_type.value} - (_SUPPORTED - {"FSDP", "DEEPSPEED"})
    wrapper = next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
    problem = ""
    if kinds:
        problem = (
            f"{min(kinds)} is not supported by LSAM, which runs in one process or under DistributedDataParallel. "
            "LSAMTrainer runs under FSDP2 and under DeepSpeed ZeRO 1 and 2."
        )
    elif is_distributed() and wrapper is None:
        problem = (
            f"{dist.get_world_size()} processes run, but each would train alone. Give LSAM the model that "
            "DistributedDataParallel or accelerator.prepare returns."
        )
    elif getattr(wrapper, "static_graph", False) and config.sharpness_scope == "micro_batch":
        problem = _STATIC_GRAPH.format("static_graph")
    if problem:
        raise NotImplementedError(f"{problem} {_WAY_OUT}")
    check_hooks(model)


def check_hooks(model: nn.Module) -> None:
    """Raise `NotImplementedError` if hooks of an optimizer consume each gradient during the backward pass."""
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise NotImplementedError(
                f"{name} has hooks (register_post_accumulate_grad_hook) that use its gradient in the backward pass, "
                f"before both passes are done. Use an optimizer that reads .grad in its step. {_WAY_OUT}"
            )
