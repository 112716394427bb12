"""Optional measurements after training: metrics with quantised weights, and with noise on the weights."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer

# Inputs that share a scale in 4-bit quantisation.
GROUP_SIZE = 64
# Draws of the noise that metrics are averaged over.
DRAWS = 3
# Endings of metrics that do not depend on the weights.
TIMES = ("_runtime", "_per_second", "_preparation_time")


@dataclass
class RobustnessArguments:
    """
    Metrics of the trained model with quantised or noisy weights, as `<split>_int<bits>_...` and
    `<split>_noise_<scale>_...`, on the validation data, and on the test data if it has labels. The saved model is not
    changed.

    The weights of all linear layers are changed, except those that are tied to an embedding.

    Args:
        quantised_bits (`list[int]`, *optional*):
            Numbers of bits: 8, 4 or both (symmetric weight-only quantisation). With 8 bits, each output has one scale.
            With 4 bits, each group of 64 inputs of an output has one, if the number of inputs is a multiple of 64.
        weight_noise (`list[float]`, *optional*):
            Standard deviations of Gaussian noise, relative to the standard deviation of each weight matrix. Metrics
            are means over 3 draws, which are the same in every run.
    """

    quantised_bits: list[int] | None = field(
        default=None, metadata={"help": "Also evaluate with weights quantised to this many bits: 8, 4 or both."}
    )
    weight_noise: list[float] | None = field(
        default=None,
        metadata={"help": "Also evaluate with noise of this size, relative to each weight matrix's deviation."},
    )

    def __post_init__(self):
        for bits in self.quantised_bits or ():
            if bits not in (4, 8):
                raise ValueError(f"quantised_bits must be 8, 4 or both, but one is {bits}.")
        for share in self.weight_noise or ():
            if not (math.isfinite(share) and share > 0):
                raise ValueError(f"weight_noise must be numbers above 0, but one is {share}.")

    @property
    def wanted(self) -> bool:
        """Whether anything is to be measured."""
        return bool(self.quantised_bits or self.weight_noise)


def check_robustness(trainer: Trainer, arguments: RobustnessArguments) -> None:
    """Raise `ValueError` if changed weights are requested, but FSDP or DeepSpeed shards the model."""
    if arguments.wanted and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(
            "quantised_bits and weight_noise need the whole model in each process, but FSDP and DeepSpeed shard it. "
            "Leave them out, and evaluate the saved model in a separate run."
        )


def evaluate_changed(trainer: Trainer, arguments: RobustnessArguments, rows: Dataset, prefix: str) -> dict[str, float]:
    """
    Evaluate on `rows` with each requested change of the weights, and restore them.

    Args:
        trainer (`Trainer`): The trainer, with the trained model.
        arguments (`RobustnessArguments`): The requested changes.
        rows (`Dataset`): Data with labels.
        prefix (`str`): Prefix of the metrics: `eval` gives `eval_int8_loss` and `eval_noise_0.1_loss`.

    Returns:
        `dict[str, float]`: The metrics of all changes, without times; those of noise are means over the draws.
    """
    metrics: dict[str, float] = {}
    for bits in arguments.quantised_bits or ():
        metrics |= _evaluate(trainer, partial(quantised, bits=bits), rows, f"{prefix}_int{bits}")
    for share in arguments.weight_noise or ():
        name = f"{prefix}_noise_{share}"
        draws = []
        for seed in range(DRAWS):
            generator = torch.Generator().manual_seed(seed)
            draws.append(_evaluate(trainer, partial(noisy, share=share, generator=generator), rows, name))
        metrics |= {metric: sum(draw[metric] for draw in draws) / DRAWS for metric in draws[0]}
    return metrics


def quantised(weight: Tensor, bits: int) -> Tensor:
    """
    Quantise `weight`, of shape `(outputs, inputs)`, to `bits` bits (symmetric, to nearest) and dequantise it.

    This does not use torchao: where that is installed, transformers loads it at every start, with its warnings.
    """
    grouped = bits == 4 and weight.shape[1] % GROUP_SIZE == 0
    groups = weight.detach().float().unflatten(1, (-1, GROUP_SIZE if grouped else weight.shape[1]))
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = (groups.abs().amax(2, keepdim=True) * 2 / (most - least)).clamp_min(torch.finfo(torch.float32).tiny)
    steps = (groups / scale).round().clamp(least, most)
    return (steps * scale).flatten(1).to(weight.dtype)


def noisy(weight: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Add to `weight` Gaussian noise of `share` times its own standard deviation, drawn on the CPU by `generator`."""
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
    return weight + (share * weight.float().std() * noise.to(weight.device)).to(weight.dtype)


def _evaluate(trainer: Trainer, change: Callable[[Tensor], Tensor], rows: Dataset, prefix: str) -> dict[str, float]:
    with changed_weights(trainer.accelerator.unwrap_model(trainer.model), change):
        metrics = trainer.predict(rows, metric_key_prefix=prefix).metrics
    return {name: value for name, value in metrics.items() if not name.endswith(TIMES)}


@contextmanager
def changed_weights(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Apply `change` to the weights of the linear layers in the context, and restore them bitwise afterwards."""
    modules = list(model.modules())
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    others = [module for module in modules if not isinstance(module, nn.Linear)]
    shared = {id(weight) for module in others for weight in module.parameters(recurse=False)}
    weights = {id(module.weight): module.weight for module in linear}
    chosen = [weight for key, weight in weights.items() if key not in shared and weight.is_floating_point()]
    before = [weight.detach().clone() for weight in chosen]
    try:
        with torch.no_grad():
            for weight in chosen:
                weight.copy_(change(weight))
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(chosen, before, strict=True):
                weight.copy_(old)
