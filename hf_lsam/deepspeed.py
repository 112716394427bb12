"""DeepSpeed, whose engine updates the weights itself: what of it is supported, and its update held back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from transformers import Trainer

from .config import LSAMConfig

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
    if config.ascent_gradient == "current":
        raise NotImplementedError(
            "DeepSpeed adds up the gradients of all backward passes and takes none of them back, so pass 2 has none "
            f"of its own. Use ascent_gradient='previous' (with alpha=1 and sharpness_scope='batch'). {way_out}"
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


@contextmanager
def update_held_back(engine, parameters: Sequence[Tensor]) -> Iterator[None]:
    """
    Inside, what asks the `DeepSpeedEngine` for its step only gets the gradients; the step is taken at the end.

    Accelerate asks for it within `training_step`, when the weights are still moved and nobody has seen the gradients.
    From then on `.grad` of the `parameters` holds the mean over all micro-batches and processes. It is gathered from
    the shards that ZeRO keeps, by one all-reduce each, so all processes must give the same ones.
    """
    from deepspeed.utils import safe_get_full_grad  # type: ignore[import-not-found]

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
        for parameter in parameters:
            parameter.grad = None
        engine.step()
