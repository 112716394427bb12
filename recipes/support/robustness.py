"""What recipes measure on demand after training: metrics with quantised weights, and with noise on the weights."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer

GROUP = 64
DRAWS = 3
# Figures of an evaluation that say nothing of the weights.
TIMES = ("_runtime", "_per_second", "_preparation_time")


@dataclass
class RobustnessArguments:
    """
    Metrics of the trained model with other weights, as `<split>_int<bits>_...` and `<split>_noise_<share>_...`, on the
    validation data, and on the test data if its labels are known. The saved model is not changed.

    What changes are the weights of all linear layers, but for those that an embedding shares.

    Args:
        quantised_bits (`list[int]`, *optional*):
            8, 4 or both: weights of so many bits (symmetric weight-only quantisation). 8 bits have one scale
            for each output, 4 bits one for each 64 inputs of it, where these divide evenly.
        weight_noise (`list[float]`, *optional*):
            Gaussian noise, as shares of the standard deviation of each weight matrix. Metrics are means of 3 draws,
            the same ones in every run.
    """

    quantised_bits: list[int] | None = field(
        default=None, metadata={"help": "Also evaluate with weights of so many bits: 8, 4 or both."}
    )
    weight_noise: list[float] | None = field(
        default=None, metadata={"help": "Also evaluate with noise on the weights: shares of each matrix's deviation."}
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
    """Raise `ValueError` where the weights are not whole in each process."""
    if arguments.wanted and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(
            "quantised_bits and weight_noise need the whole model in each process, which FSDP and DeepSpeed share "
            "out. Leave them out, and evaluate the saved model in a run of its own."
        )


def evaluate_changed(trainer: Trainer, arguments: RobustnessArguments, rows: Dataset, prefix: str) -> dict[str, float]:
    """
    Metrics on `rows` under each change that is wanted; the weights are put back.

    Args:
        trainer (`Trainer`): With the trained model.
        arguments (`RobustnessArguments`): The changes.
        rows (`Dataset`): With labels.
        prefix (`str`): Of the names: `eval` gives `eval_int8_loss` and `eval_noise_0.1_loss`.
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
    What `bits` bits leave of `weight`, a matrix with a row for each output; symmetric, rounded to the nearest.

    Done here: with torchao installed, transformers loads it at every start, which prints what it cannot load.
    """
    grouped = bits == 4 and weight.shape[1] % GROUP == 0
    groups = weight.detach().float().unflatten(1, (-1, GROUP if grouped else weight.shape[1]))
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = groups.abs().amax(2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) * 2 / (most - least)
    steps = (groups / scale).round().clamp(least, most)
    return (steps * scale).flatten(1).to(weight.dtype)


def noisy(weight: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """`weight` and Gaussian noise whose standard deviation is `share` of its own; drawn on the CPU."""
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
    return weight + (share * weight.float().std() * noise.to(weight.device)).to(weight.dtype)


def _evaluate(trainer: Trainer, change: Callable[[Tensor], Tensor], rows: Dataset, prefix: str) -> dict[str, float]:
    with changed_weights(trainer.accelerator.unwrap_model(trainer.model), change):
        metrics = trainer.predict(rows, metric_key_prefix=prefix).metrics
    return {name: value for name, value in metrics.items() if not name.endswith(TIMES)}


@contextmanager
def changed_weights(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`change` what linear layers multiply by, and put it back to the bit."""
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
