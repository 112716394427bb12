"""What one would pick instead: SAM as an optimizer, in a training loop written by hand."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from pytorch_optimizer import SAM, LookSAM
from torch import Tensor, nn


class PastedSAM(torch.optim.Optimizer):
    """SAM as it is mostly pasted (after Foret et al., ICLR 2021): a loop over all weights, and a clone of each."""

    def __init__(self, params: Iterable[nn.Parameter], base_optimizer: type, rho: float = 0.05, **kwargs: Any):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)

    @torch.no_grad()
    def first_step(self) -> None:
        """From w to w + rho * g / ||g||."""
        norm = torch.stack([weight.grad.norm() for _, weight in self._weights()]).norm()
        for rho, weight in self._weights():
            self.state[weight]["before"] = weight.clone()
            weight.add_(weight.grad * (rho / (norm + 1e-12)))

    @torch.no_grad()
    def second_step(self) -> None:
        """Back to w, and a step of the base optimizer along the gradient that is there by now."""
        for _, weight in self._weights():
            weight.copy_(self.state[weight]["before"])
        self.base_optimizer.step()

    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        """Both, with `closure`, a forward and a backward pass from gradients of zero, in between."""
        self.first_step()
        closure()
        self.second_step()

    def _weights(self) -> Iterator[tuple[float, Any]]:
        for group in self.param_groups:
            yield from ((group["rho"], weight) for weight in group["params"] if weight.grad is not None)


def _adamw(kind: type, **kwargs: Any) -> Callable[[Iterable[nn.Parameter]], Any]:
    """`kind` around the optimizer that the Trainer takes by default."""
    return lambda weights: kind(weights, torch.optim.AdamW, lr=5e-5, weight_decay=0.0, fused=True, **kwargs)


PEERS: dict[str, Callable[[Iterable[nn.Parameter]], Any]] = {
    "pasted-sam": _adamw(PastedSAM),
    "pytorch_optimizer-sam": _adamw(SAM),
    "pytorch_optimizer-looksam-5": _adamw(LookSAM, k=5),
}


class HandWrittenLoop:
    """
    Forward, backward, `optimizer.step(closure)`: no Trainer, no clipping, no logging.

    Args:
        name: One of `PEERS`.
        model: Trained in place.
        batches: Micro-batches, begun anew when they end.
        accumulation: Micro-batches of a step.
        bf16: Whether to train under bf16 autocast.
    """

    def __init__(
        self, name: str, model: nn.Module, batches: Iterable[dict[str, Tensor]], accumulation: int, bf16: bool
    ):
        self.model, self.accumulation, self.bf16 = model.train(), accumulation, bf16
        self.optimizer = PEERS[name]([weight for weight in model.parameters() if weight.requires_grad])
        self.batches = itertools.chain.from_iterable(itertools.repeat(batches))
        self.device = next(model.parameters()).device

    def run(self, steps: int) -> list[float]:
        """Seconds of each of `steps` steps."""
        return [self._step() for _ in range(steps)]

    def _step(self) -> float:
        window = list(itertools.islice(self.batches, self.accumulation))
        self._wait()
        start = time.perf_counter()

        def closure() -> None:
            self.optimizer.zero_grad()
            for batch in window:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    loss = self.model(**{name: tensor.to(self.device) for name, tensor in batch.items()}).loss
                (loss / self.accumulation).backward()

        closure()
        self.optimizer.step(closure)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
