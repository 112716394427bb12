"""Two passes under DeepSpeed, whose engine reduces the gradients and updates the weights itself."""

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
# Settings of the engine other than the ZeRO stage: the supported values, and what the others do.
_REFUSED = {
    "zero_optimization.offload_optimizer.device": ((None, "none"), "moves the gradients away from the device"),
    "zero_optimization.round_robin_gradients": ((None, False), "assigns gradients to processes in an unknown order"),
    "zero_optimization.zenflow": ((None,), "updates some of the weights later than the engine's step"),
    "fp16.enabled": ((None, False), "multiplies the gradients by a loss scale; bf16 needs none"),
    "torch_autocast.dtype": ((None, "bfloat16"), "multiplies the gradients by a loss scale; bfloat16 needs none"),
    "tensor_parallel.autotp_size": ((None, 0, 1), "splits the weights, and blocks are perturbed as a whole"),
    "compile.deepcompile": ((None, False), "compiles the reduction of the gradients into the backward pass"),
    "compression_training": ((None, {}), "changes the weights in each forward pass"),
}


def check_deepspeed(trainer: Trainer, config: LSAMConfig, way_out: str) -> None:
    """Raise `NotImplementedError` for settings of DeepSpeed with which two passes are impossible or not tested."""
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
            "DeepSpeed averages gradients over the processes, and sharpness_scope='micro_batch' needs that of each "
            f"process. Set sharpness_scope='batch'. {way_out}"
        )
    in_float32 = settings.get_value("bf16.enabled") and settings.get_value("data_types.grad_accum_dtype") in _FLOAT32
    if stage == 1 and in_float32 and config.ascent_gradient == "current":
        raise NotImplementedError(
            "In bf16 with data_types.grad_accum_dtype='fp32', ZeRO stage 1 of DeepSpeed does not accept gradients "
            "(deepspeed.utils.safe_set_full_grad), as two passes require. Use ZeRO stage 2, which also accumulates in "
            f"float32, or ascent_gradient='previous'. {way_out}"
        )
    for name, (fine, reason) in _REFUSED.items():
        value = settings.get_value(name)
        if value not in fine:
            raise NotImplementedError(
                f"DeepSpeed's setting {name}={value!r} is not supported: it {reason}. Change it. {way_out}"
            )
    if str(settings.get_value("optimizer.type")).lower() == "muon":
        raise NotImplementedError(
            "DeepSpeed's Muon turns gradients into updates before they can be read. Set another optimizer.type. "
            f"{way_out}"
        )


def reduction_bits(engine) -> int:
    """Bits of the least precise dtype in which `engine` averages gradients over the processes."""
    dtypes = [engine.communication_data_type]
    if engine.torch_autocast_enabled():
        dtypes.append(engine.torch_autocast_dtype())
    return min(torch.finfo(dtype).bits for dtype in dtypes)


@contextmanager
def bypass_engine(engine, accelerator: Accelerator) -> Iterator[nn.Module]:
    """Inside, passes over the yielded module leave their gradients in `.grad`, and `engine` ignores them."""

    def backward(_: Callable, args: tuple, kwargs: dict) -> None:
        own = {name: value for name, value in kwargs.items() if name not in ("sync_gradients", "scale_wrt_gas")}
        micro_batches = engine.gradient_accumulation_steps() if kwargs.get("scale_wrt_gas", True) else 1
        (args[0] / micro_batches).backward(**own)

    def forward(method: Callable, args: tuple, kwargs: dict) -> Any:
        if engine.torch_autocast_enabled():
            method = torch.autocast(engine.device.type, engine.torch_autocast_dtype())(method)
        return method(*args, **kwargs)

    # The hooks with which the engine collects each gradient during the backward pass.
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
def delayed_update(engine, parameters: Sequence[Tensor], changed: Callable[[], Collection[Tensor]]) -> Iterator[None]:
    """Inside, a call of the `DeepSpeedEngine`'s `step` only gathers gradients; the step itself follows at the end.

    Accelerate calls it within `training_step`, before pass 2. From then on, `.grad` of `parameters` (the same in all
    processes) holds the mean over all processes. At the end, the engine gets the `.grad` of those in `changed()`.
    """
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad  # type: ignore[import-not-found]

    asked = False

    def gather() -> None:
        nonlocal asked
        asked = True
        for parameter in parameters:
            parameter.grad = None  # of this process only, if the engine does not train the parameter
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
