"""How flat a minimum is. Measuring leaves weights, gradients, modes and random state bitwise as they were."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device, slice_tensors
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.trainer_pt_utils import find_batch_size

from .held import RandomState
from .perturbation import Perturbation, adaptive_scores

LossFunction = Callable[[nn.Module, Any], Tensor]


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a transformers model returns for a batch with labels."""
    return model(**batch).loss


class LossSurface:
    """
    The mean loss over `batches` as a function of `parameters`.

    Args:
        model: Any model; it is in evaluation mode while it is measured.
        batches: The same ones at each figure, with the rows along the first axis: a list, or a `DataLoader`.
        loss_function: Maps model and batch to its mean loss. Default: the model's `loss`.
        parameters: Weights, such as those of one block. Default: all trained ones.

    Raises:
        ValueError: if there is no parameter. Each method: if `batches` is empty, or an argument out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss_function: LossFunction = model_loss,
        parameters: Sequence[Tensor] | None = None,
    ):
        self.model, self.batches, self.loss_function = model, batches, loss_function
        trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
        self.parameters: list[Tensor] = list(trained if parameters is None else parameters)
        if not self.parameters:
            raise ValueError("There is no weight to measure along: parameters is empty, or none is trained.")
        self.device = self.parameters[0].device

    def loss(self) -> float:
        """The mean loss over all rows. Costs a forward pass."""
        with _undisturbed(self.model, self.device), torch.no_grad():
            return _mean((float(self.loss_function(self.model, batch)), rows) for batch, rows in self._batches())

    def gradient(self) -> list[Tensor]:
        """The gradient of the mean loss, a tensor for each parameter; `.grad` is left alone. Costs a backward pass."""
        with _undisturbed(self.model, self.device):
            return self._mean_over_batches(lambda loss: grad(loss, self.parameters, materialize_grads=True))

    def gradient_norm(self) -> float:
        """The Euclidean norm of the gradient."""
        return _norm(self.gradient())

    def sharpness(self, rho: float = 0.05, adaptive: bool = False) -> float:
        """
        SAM's sharpness, `L(w + eps) - L(w)` with `eps = rho * g / ||g||` (Foret et al., ICLR 2021; `rho` as there).

        ASAM's, if `adaptive`, is the same for rescaled weights of a layer: `eps = rho * w^2 g / || |w| g ||` (Kwon et
        al., ICML 2021).
        """
        direction = scores = self.gradient()
        if adaptive:
            scores = adaptive_scores(self.parameters, direction)
            direction = adaptive_scores(self.parameters, scores)
        norm = _norm(scores)
        if norm == 0:
            return 0.0
        return self.loss_along(direction, rho / norm) - self.loss()

    def m_sharpness(self, m: int, rho: float = 0.05, adaptive: bool = False) -> float:
        """
        The mean [`~LossSurface.sharpness`] over groups of `m` rows, each perturbed by its own gradient.

        As Foret et al. have it (ICLR 2021). What remains of a batch is a smaller group, counted by its rows.
        """
        if m < 1:
            raise ValueError(f"m counts rows and must be at least 1, but is {m}.")

        def groups() -> Iterator[tuple[float, int]]:
            for batch, rows in self._batches():
                for start in range(0, rows, m):
                    group = slice_tensors(batch, slice(start, start + m))
                    surface = LossSurface(self.model, [group], self.loss_function, self.parameters)
                    yield surface.sharpness(rho, adaptive), min(m, rows - start)

        return _mean(groups())

    def loss_along(self, direction: Sequence[Tensor], scale: float) -> float:
        """The mean loss at `w + scale * direction`."""
        with Perturbation().moved(self.parameters, direction, scale):
            return self.loss()

    def hessian_times(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """The Hessian of the mean loss times `vector`. Costs about 2 backward passes."""

        def product(loss: Tensor) -> tuple[Tensor, ...]:
            gradient = grad(loss, self.parameters, create_graph=True, materialize_grads=True)
            along = torch.stack([(g * v).sum() for g, v in zip(gradient, vector, strict=True)]).sum()
            return grad(along, self.parameters, materialize_grads=True)

        # Only the plain attention can be differentiated twice.
        with _undisturbed(self.model, self.device), sdpa_kernel(SDPBackend.MATH):
            return self._mean_over_batches(product)

    def top_eigenvalue(self, max_products: int = 100, tolerance: float = 1e-3, seed: int = 0) -> float:
        """
        The largest eigenvalue of the Hessian, by power iteration from a random vector.

        One round, or two where the largest in size is negative, of at most `max_products` Hessian products; a round
        ends when its estimate changes by less than `tolerance` as a share of itself.
        """
        if max_products < 1:
            raise ValueError(f"max_products counts Hessian products and must be at least 1, but is {max_products}.")
        largest = self._power_iteration(0.0, max_products, tolerance, seed)
        if largest >= 0:
            return largest
        # Of the Hessian shifted by it, the largest eigenvalue is that of the largest size.
        return largest + self._power_iteration(-largest, max_products, tolerance, seed)

    def trace(self, samples: int = 30, seed: int = 0) -> tuple[float, float]:
        """
        The trace of the Hessian, and the standard error of this estimate (NaN for one sample).

        Hutchinson's: the mean of `v . H v` over `samples` vectors `v` of random signs, at a Hessian product each.
        """
        if samples < 1:
            raise ValueError(f"samples counts random vectors and must be at least 1, but is {samples}.")
        generator = torch.Generator().manual_seed(seed)
        values = []
        for _ in range(samples):
            vector = [(torch.randint(0, 2, p.shape, generator=generator) * 2 - 1).to(p) for p in self.parameters]
            values.append(_dot(vector, self.hessian_times(vector)))
        estimates = torch.tensor(values, dtype=torch.float64)
        return float(estimates.mean()), float(estimates.std() / math.sqrt(samples)) if samples > 1 else math.nan

    def random_direction(self, seed: int = 0) -> list[Tensor]:
        """
        A random direction whose filters, or rows, have the norms of those of the weights (Li et al., NeurIPS 2018).

        What has a single axis, as biases and weights of norm layers, stays where it is.
        """
        generator = torch.Generator().manual_seed(seed)
        direction = []
        for parameter in self.parameters:
            if parameter.dim() < 2:
                direction.append(torch.zeros_like(parameter))
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            filter_norms = partial(torch.linalg.vector_norm, dim=tuple(range(1, parameter.dim())), keepdim=True)
            direction.append(noise * (filter_norms(parameter.detach()) / filter_norms(noise)))
        return direction

    def landscape(self, span: float = 1.0, points: int = 21, axes: int = 1, seed: int = 0) -> "Landscape":
        """
        The loss along one or two (`axes`) random directions, from `-span` to `span` times the length of the weights.

        Costs `points ** axes` forward passes.
        """
        if axes not in (1, 2) or points < 2:
            raise ValueError(f"A landscape has 1 or 2 axes of at least 2 points, but axes={axes} and points={points}.")
        directions = [self.random_direction(seed + axis) for axis in range(axes)]
        places = torch.linspace(-span, span, points, dtype=torch.float64).tolist()
        if axes == 1:
            return Landscape(places, [self.loss_along(directions[0], place) for place in places])
        losses = []
        for first in places:
            with Perturbation().moved(self.parameters, directions[0], first):
                losses.append([self.loss_along(directions[1], second) for second in places])
        return Landscape(places, losses)

    def _power_iteration(self, shift: float, max_products: int, tolerance: float, seed: int) -> float:
        """The eigenvalue of the largest size of the Hessian plus `shift`."""
        generator = torch.Generator().manual_seed(seed)
        vector = [torch.randn(p.shape, generator=generator).to(p) for p in self.parameters]
        eigenvalue = math.inf
        for _ in range(max_products):
            length = _norm(vector)
            if length == 0:
                return 0.0
            vector = [v / length for v in vector]
            product = [h + shift * v for h, v in zip(self.hessian_times(vector), vector, strict=True)]
            last, eigenvalue = eigenvalue, _dot(vector, product)
            if abs(eigenvalue - last) <= tolerance * abs(eigenvalue):
                break
            vector = product
        return eigenvalue

    def _batches(self) -> Iterator[tuple[Any, int]]:
        """Each batch, on the device of the weights, and its rows (1, where no tensor has an axis)."""
        is_empty = True
        for batch in self.batches:
            is_empty = False
            yield send_to_device(batch, self.device), find_batch_size(batch) or 1
        if is_empty:
            raise ValueError("batches is empty: nothing to measure. (A generator can be gone through only once.)")

    def _mean_over_batches(self, of: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
        """The mean over all rows of what `of` makes of each batch's mean loss."""
        sums, total = list(map(torch.zeros_like, self.parameters)), 0
        for batch, rows in self._batches():
            torch._foreach_add_(sums, of(self.loss_function(self.model, batch)), alpha=rows)
            total += rows
        torch._foreach_div_(sums, total)
        return sums


@dataclass(frozen=True)
class Landscape:
    """The loss around the weights."""

    places: list[float]  # points of each axis; 0 is where the weights are
    losses: list  # the loss at each, for two axes a list for each place on the first


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards modes and random state are what they were."""
    modes = {module: module.training for module in model.modules()}
    state = RandomState.capture(device)
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        state.restore()


def _mean(values: Iterable[tuple[float, int]]) -> float:
    """The mean of values, each of which stands for so many rows."""
    pairs = list(values)
    return sum(value * rows for value, rows in pairs) / sum(rows for _, rows in pairs)


@torch.no_grad()
def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    products = torch._foreach_mul(list(left), list(right))
    return float(torch.stack([product.sum(dtype=torch.float64) for product in products]).sum())


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(_dot(tensors, tensors))
