"""DeepSpeed, whose engine updates the weights itself: what of it is supported, and its update held back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from transformers import Trainer

from .config import LSAMConfig

# Settings of the engine beside its ZeRO stage, the values of them that are fine, and what is wrong with the others.
_REFUSED = {
    "zero_optimization.offload_optimizer.device": (
        (None, "none"),
        "keeps the gradients away from the device, where the direction to climb is taken",
    ),
    "zero_optimization.round_robin_gradients": (
        (None, False),
        "deals out the gradients in an order that deepspeed.utils.safe_get_full_grad does not know",
    ),
    "zero_optimization.zenflow": ((None,), "updates some of the weights later than the engine's step"),
    "fp16.enabled": ((None, False), "multiplies the gradients by a loss scale; bf16 needs none"),
    "torch_autocast.dtype": ((None, "bfloat16"), "multiplies the gradients by a loss scale; bfloat16 needs none"),
    "tensor_parallel.autotp_size": ((None, 0, 1), "shards the weights, and blocks are perturbed as a whole"),
    "compile.deepcompile": ((None, False), "compiles the reduction of the gradients into the backward pass"),
    "compression_training": ((None, {}), "changes the weights in each forward pass"),
}


def check_deepspeed(trainer: Trainer, config: LSAMConfig, way_out: str) -> None:
    """
    Refuse what the engine cannot be driven to, or has not been shown to do right.

    Raises:
        NotImplementedError: names the setting, the reason and the way out.
    """
    plugin = trainer.accelerator.state.deepspeed_plugin
    settings = plugin.hf_ds_config
    stage = settings.get_value("zero_optimization.stage", plugin.zero_stage)
    if stage not in (1, 2):
        raise NotImplementedError(
            f"This is a DeepSpeed run with ZeRO stage {stage}, and LSAMTrainer supports stages 1 and 2, where every "
            "process holds whole weights (stage 3 shards them, and stage 0 is DistributedDataParallel). Set "
            f"zero_optimization.stage to 1 or 2, or launch without DeepSpeed. {way_out}"
        )
    if config.ascent_gradient == "current":
        raise NotImplementedError(
            "This is a DeepSpeed run, whose engine adds up the gradients of all backward passes in its own shards and "
            "takes none of them back, so pass 2 cannot have a gradient of its own. Use ascent_gradient='previous' "
            f"(with alpha=1 and sharpness_scope='batch'), or launch without DeepSpeed. {way_out}"
        )
    for name, (fine, reason) in _REFUSED.items():
        value = settings.get_value(name)
        if value not in fine:
            raise NotImplementedError(
                f"DeepSpeed's setting {name}={value!r} is not supported by LSAMTrainer: it {reason}. {way_out}"
            )
    if str(settings.get_value("optimizer.type")).lower() == "muon":
        raise NotImplementedError(
            "DeepSpeed's Muon turns the gradients into updates before they can be read. Choose another "
            f"optimizer.type. {way_out}"
        )


@contextmanager
def update_held_back(engine, parameters: Sequence[Tensor]) -> Iterator[None]:
    """
    Inside, what asks `engine` for its step only gets the gradients; the step is taken at the end.

    Accelerate has the engine step right after its last backward pass of an optimizer step, that is within
    `training_step`, when the weights are still moved and nobody has seen the gradients.

    Args:
        engine: The `DeepSpeedEngine`.
        parameters: Those whose `.grad` holds, from the engine's last backward pass on, the mean over all
            micro-batches and processes, as it would without DeepSpeed. It is gathered from the shards that ZeRO keeps,
            by one all-reduce each, so all processes must give the same ones.
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
        # Back to the method of the class.
        del engine.step
    if asked:
        for parameter in parameters:
            parameter.grad = None
        engine.step()
