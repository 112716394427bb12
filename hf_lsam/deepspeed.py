"""DeepSpeed, whose engine reduces gradients and updates weights itself: what of it is supported, and how it is led."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer

from .config import LSAMConfig
from .passes import Standin

_FLOAT32 = ("fp32", "float32", "float", "torch.float32")
# Settings of the engine beside its ZeRO stage, the values of them that are fine, and what is wrong with the others.
_REFUSED = {
    "zero_optimization.offload_optimizer.device": ((None, "none"), "keeps the gradients away from the device"),
    "zero_optimization.round_robin_gradients": ((None, False), "deals out gradients in an order that is not known"),
    "zero_optimization.zenflow": ((None,), "updates some of the weights later than the engine's step"),
    "fp16.enabled": ((None, False), "multiplies the gradients by a loss scale; bf16 needs none"),
    "torch_autocast.dtype": ((None, "bfloat16"), "multiplies the gradients by a loss scale; bfloat16 needs none"),
    "tensor_parallel.autotp_size": ((None, 0, 1), "shards the weights, and blocks are perturbed as a whole"),
    "compile.deepcompile": ((None, False), "compiles the reduction of the gradients into the backward pass"),
    "compression_training": ((None, {}), "changes the weights in each forward pass"),
}


def check_deepspeed(trainer: Trainer, config: LSAMConfig, way_out: str) -> None:
    """Refuse, by a `NotImplementedError`, what the engine cannot be driven to or has not been shown to do right."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    settings = plugin.hf_ds_config
    stage = settings.get_value("zero_optimization.stage", plugin.zero_stage)
    if stage not in (1, 2):
        raise NotImplementedError(
            f"DeepSpeed runs with ZeRO stage {stage}, and LSAMTrainer supports 1 and 2: stage 3 shards the weights, "
            f"and stage 0 is DistributedDataParallel. Set zero_optimization.stage to 1 or 2. {way_out}"
        )
    if config.sharpness_scope == "micro_batch":
        raise NotImplementedError(
            "DeepSpeed averages the gradient of each micro-batch over the processes, and "
            f"sharpness_scope='micro_batch' climbs that of one alone. Set sharpness_scope='batch'. {way_out}"
        )
    in_float32 = settings.get_value("bf16.enabled") and settings.get_value("data_types.grad_accum_dtype") in _FLOAT32
    if stage == 1 and in_float32 and config.ascent_gradient == "current":
        raise NotImplementedError(
            "In bf16 with data_types.grad_accum_dtype='fp32', DeepSpeed's ZeRO stage 1 takes no gradients back "
            "(deepspeed.utils.safe_set_full_grad), as two passes need. Use ZeRO stage 2, which accumulates in "
            f"float32, too, or ascent_gradient='previous'. {way_out}"
        )
    for name, (fine, reason) in _REFUSED.items():
        value = settings.get_value(name)
        if value not in fine:
            raise NotImplementedError(
                f"DeepSpeed's setting {name}={value!r} is not supported: it {reason}. Set it otherwise. {way_out}"
            )
    if str(settings.get_value("optimizer.type")).lower() == "muon":
        raise NotImplementedError(
            f"DeepSpeed's Muon makes gradients updates before they can be read. Set another optimizer.type. {way_out}"
        )


def bits_sent(engine) -> int:
    """Bits of the coarsest numbers in which `engine` averages gradients over processes."""
    dtypes = [engine.communication_data_type]
    if engine.torch_autocast_enabled():
        dtypes.append(engine.torch_autocast_dtype())
    return min(torch.finfo(dtype).bits for dtype in dtypes)


@contextmanager
def past_engine(engine, accelerator: Accelerator) -> Iterator[nn.Module]:
    """Inside, passes over the yielded module leave gradients in `.grad`, of which `engine` takes no notice."""

    def backward(_: Callable, args: tuple, kwargs: dict) -> None:
        own = {name: value for name, value in kwargs.items() if name not in ("sync_gradients", "scale_wrt_gas")}
        micro_batches = engine.gradient_accumulation_steps() if kwargs.get("scale_wrt_gas", True) else 1
        (args[0] / micro_batches).backward(**own)

    def forward(method: Callable, args: tuple, kwargs: dict) -> Any:
        if engine.torch_autocast_enabled():
            method = torch.autocast(engine.device.type, engine.torch_autocast_dtype())(method)
        return method(*args, **kwargs)

    # The hooks by which it takes each gradient out of the backward pass.
    tables = [table for parameter in engine.parameters() if (table := parameter._post_accumulate_grad_hooks)]
    hooks = [dict(table) for table in tables]
    try:
        for table in tables:
            table.clear()
        past = Standin(accelerator.deepspeed_engine_wrapped, "backward", backward)
        with past, Standin(engine.module, "forward", forward):
            yield engine.module
    finally:
        for table, kept in zip(tables, hooks, strict=True):
            table.update(kept)


@contextmanager
def update_held_back(
    engine, parameters: Sequence[Tensor], changed: Callable[[], Collection[Tensor]]
) -> Iterator[None]:
    """
    Inside, what asks the `DeepSpeedEngine` for its step only gets the gradients; the step is taken at the end.

    Accelerate asks for it within `training_step`, before pass 2. From then on `.grad` of the `parameters`, the same
    in all processes, holds the mean over all. Those that `changed` tells at the end get theirs back from there.
    """
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad  # type: ignore[import-not-found]

    asked = False

    def gather() -> None:
        nonlocal asked
        asked = True
        for parameter in parameters:
            # Left there on weights that the engine does not train, and then only that of this process.
            parameter.grad = None
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                parameter.grad = gradient.to(parameter.dtype)

    engine.step = gather
    try:
        yield
    finally:
        del engine.step
    if asked:
        mixed = [(parameter, parameter.grad) for parameter in changed()]
        for parameter in parameters:
            parameter.grad = None
        for parameter, gradient in mixed:
            safe_set_full_grad(parameter, gradient)
        engine.step()
