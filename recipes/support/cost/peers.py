"""Other implementations of SAM for the benchmark: optimizers in a hand-written loop, and `training_step`s."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_optimizer import SAM, LookSAM
from torch import Tensor, nn
from transformers import Trainer

from hf_lsam.blocks import find_blocks


class PastedSAM(torch.optim.Optimizer):
    """SAM (Foret et al., ICLR 2021) in the usual simple form: a loop over all weights, and a clone of each."""

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
        """Back to w, and a step of the base optimizer along the current gradient."""
        for _, weight in self._weights():
            weight.copy_(self.state[weight]["before"])
        self.base_optimizer.step()

    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        """Both steps, with `closure` between them: it clears the gradients and runs a forward and a backward pass."""
        self.first_step()
        closure()
        self.second_step()

    def _weights(self) -> Iterator[tuple[float, Any]]:
        for group in self.param_groups:
            yield from ((group["rho"], weight) for weight in group["params"] if weight.grad is not None)


def _adamw(kind: type, **kwargs: Any) -> Callable[[Iterable[nn.Parameter]], Any]:
    """Make a factory of `kind`, with the Trainer's default optimizer as base optimizer."""
    return lambda weights: kind(weights, torch.optim.AdamW, lr=5e-5, weight_decay=0.0, fused=True, **kwargs)


PEERS: dict[str, Callable[[Iterable[nn.Parameter]], Any]] = {
    "pasted-sam": _adamw(PastedSAM),
    "pytorch_optimizer-sam": _adamw(SAM),
    "pytorch_optimizer-looksam-5": _adamw(LookSAM, k=5),
}


class SAMTrainer(Trainer):
    """SAM as in the widely used `davda54/sam`, in a `training_step`: ascent step, second pass, step back."""

    rho = 0.05

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._window: list[dict[str, Any]] = []
        self._moves: list[tuple[nn.Parameter, Tensor]] = []

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Both passes; the second one follows the last micro-batch of an optimizer step."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._window.append(inputs)
        if self.accelerator.sync_gradients:
            window, self._window = self._window, []
            self._first_step()
            for batch in window:
                super().training_step(model, batch, num_items_in_batch)
            self._second_step()
        return loss

    @torch.no_grad()
    def _first_step(self) -> None:
        """From w to w + e(w), and gradients of zero."""
        trained = (weight for group in self.optimizer.param_groups for weight in group["params"])
        weights = [weight for weight in trained if weight.grad is not None]
        scale = self.rho / (torch.stack([weight.grad.norm(p=2) for weight in weights]).norm(p=2) + 1e-12)
        for weight in weights:
            e_w = weight.grad * scale.to(weight)
            weight.add_(e_w)
            self._moves.append((weight, e_w))
        self.optimizer.zero_grad()

    @torch.no_grad()
    def _second_step(self) -> None:
        """Back to w, for the optimizer to step along the current gradient."""
        for weight, e_w in self._moves:
            weight.sub_(e_w)
        self._moves.clear()


class LastBlocksTrainer(Trainer):
    """
    SAM for the last `k` blocks, with nothing but what the gradient needs: the least that a pass 2 through
    `training_step` costs. It restores no random or other state, so that dropout differs between the passes, checks
    nothing, and logs nothing. Each block has to be called once, and to return a tensor.
    """

    k = 1
    rho = 0.05

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        blocks = list(find_blocks(self.model).values())
        if len(blocks) <= self.k:
            raise ValueError(f"Of {len(blocks)} blocks, the last {self.k} leave none to replay. Take a deeper model.")
        self._plain = blocks[: -self.k]
        self._moved: list[Tensor] = [weight for block in blocks[-self.k :] for weight in block.parameters()]
        moved = set(self._moved)
        self._others = [weight for weight in self.model.parameters() if weight.requires_grad and weight not in moved]
        self._window: list[tuple[dict[str, Any], Tensor]] = []

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Both passes; the second one follows the last micro-batch, and begins at the first of the last blocks."""
        forward, outputs = self._plain[-1].forward, []

        def record(*args: Any, **kwargs: Any) -> Tensor:
            outputs.append(forward(*args, **kwargs))
            return outputs[-1]

        self._plain[-1].forward = record
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            del self._plain[-1].forward
        self._window.append((inputs, outputs[0].detach()))
        if self.accelerator.sync_gradients:
            with self._at_moved_weights():
                for batch, output in self._window:
                    for block in self._plain:
                        block.forward = lambda *args, output=output, **kwargs: output
                    super().training_step(model, batch, num_items_in_batch)
            self._window.clear()
        return loss

    @contextmanager
    def _at_moved_weights(self) -> Iterator[None]:
        plain = [weight.grad for weight in self._others]
        slopes: list[Any] = [weight.grad for weight in self._moved]
        with torch.no_grad():
            before = [weight.clone() for weight in self._moved]
            norm = torch.stack(torch._foreach_norm(slopes)).norm()
            torch._foreach_add_(self._moved, list(torch._foreach_mul(slopes, self.rho / norm)))
        for weight in self._moved:
            weight.grad = None
        for weight in self._others:
            weight.grad, weight.requires_grad = None, False
        yield
        for block in self._plain:
            del block.forward
        for weight, gradient in zip(self._others, plain, strict=True):
            weight.grad, weight.requires_grad = gradient, True
        with torch.no_grad():
            torch._foreach_copy_(self._moved, before)


class LastTwoBlocksTrainer(LastBlocksTrainer):
    """The last two blocks."""

    k = 2


# Peers in the Trainer's loop, so that only the step differs.
IN_TRAINER: dict[str, type[Trainer]] = {
    "sam-by-hand": SAMTrainer,
    "last-1-by-hand": LastBlocksTrainer,
    "last-2-by-hand": LastTwoBlocksTrainer,
}


class HandWrittenLoop:
    """
    Forward, backward, `optimizer.step(closure)`: no Trainer, no clipping, no logging.

    Args:
        name: One of `PEERS`.
        model: Trained in place.
        batches: Micro-batches, repeated when they end.
        accumulation: Micro-batches per optimizer step.
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
        """Train for `steps` steps; returns the seconds of each."""
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
