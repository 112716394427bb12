"""
Measures of flatness: gradient norm, sharpness, top Hessian eigenvalue, Hessian trace, and loss landscapes.

All are methods of [`LossSurface`]: the mean loss of a model over some batches, as a function of all or some of its
weights. Measuring changes neither weights, gradients and train/eval modes nor the random state, bitwise.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_lsam.held import RandomState
from hf_lsam.perturbation import Perturbation, adaptive_scores
from hf_lsam_recipes.support.rows import check_rows, count_rows, groups_of_rows

LossFunction = Callable[[nn.Module, Any], Tensor]


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a transformers model returns for a batch with labels."""
    return model(**batch).loss


class LossSurface:
    """
    The mean loss over `batches` as a function of `parameters`.

    Args:
        model (`nn.Module`): Any model. It is set to evaluation mode during a measurement.
        batches (`Iterable`): Batches, or a `DataLoader`. Each measurement iterates over them, so they must be the same
            each time.
        loss_function (`Callable`, *optional*): Maps model and batch to the mean loss of the batch. Default: the `loss`
            that the model returns.
        parameters (`Sequence[Tensor]`, *optional*): The weights that the surface is a function of, for instance
            those of one block. Default: all parameters with `requires_grad`.

    Raises:
        ValueError: if there is no parameter, or, when measuring, if `batches` is empty.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss_function: LossFunction = model_loss,
        parameters: Sequence[Tensor] | None = None,
    ):
        self.model = model
        self.batches = batches
        self.loss_function = loss_function
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.parameters: list[Tensor] = list(trained if parameters is None else parameters)
        if not self.parameters:
            raise ValueError(
                "There are no weights to measure: parameters is empty, or the model has none with requires_grad. Pass "
                "some parameters."
            )
        self.device = self.parameters[0].device
        self._perturbation = Perturbation()

    def loss(self) -> float:
        """The mean loss over all rows. Costs a forward pass."""
        with _evaluating(self.model, self.device), torch.no_grad():
            return self._mean_loss()

    def gradient(self) -> list[Tensor]:
        """The gradient of the mean loss, a tensor per parameter; `.grad` is not changed. Costs a backward pass."""
        with _evaluating(self.model, self.device):
            return self._mean_over_batches(lambda loss: _gradient(loss, self.parameters))

    def gradient_norm(self) -> float:
        """The Euclidean norm of the gradient."""
        return math.sqrt(_dot(gradient := self.gradient(), gradient))

    def sharpness(self, rho: float = 0.05, adaptive: bool = False) -> float:
        """
        SAM's sharpness, `L(w + eps) - L(w)` with `eps = rho * g / ||g||` (Foret et al., ICLR 2021).

        Args:
            rho (`float`, *optional*, defaults to `0.05`): Length of the perturbation. Default: SAM's.
            adaptive (`bool`, *optional*, defaults to `False`): Use ASAM's sharpness (Kwon et al., ICML 2021), which is
                invariant to rescaling the weights of layers: `eps = rho * w^2 g / || |w| g ||`.
        """
        gradient = self.gradient()
        direction, norm = gradient, math.sqrt(_dot(gradient, gradient))
        if adaptive:
            scores = adaptive_scores(self.parameters, gradient)
            norm = math.sqrt(_dot(scores, scores))
            direction = adaptive_scores(self.parameters, scores)
        if norm == 0:
            return 0.0
        return self.loss_along(direction, rho / norm) - self.loss()

    def m_sharpness(self, m: int, rho: float = 0.05, adaptive: bool = False) -> float:
        """
        The mean sharpness over groups of `m` rows, each perturbed by its own gradient (Foret et al., ICLR 2021).

        Batches must be tensors, or dictionaries or tuples of tensors, with the rows along the first axis. The last
        group of a batch may be smaller. Groups are weighted by their number of rows.

        Args:
            m (`int`): Rows per group.
            rho (`float`, *optional*, defaults to `0.05`): Length of each perturbation. Default: SAM's.
            adaptive (`bool`, *optional*, defaults to `False`): ASAM's scaling, as for [`~LossSurface.sharpness`].

        Raises:
            ValueError: if `m` is below 1, or `batches` is empty.
        """
        if m < 1:
            raise ValueError(f"m counts rows and must be at least 1, but is {m}.")
        total, rows = 0.0, 0
        for batch in self.batches:
            for part in groups_of_rows(batch, m):
                surface = LossSurface(self.model, [part], self.loss_function, self.parameters)
                total += surface.sharpness(rho, adaptive) * count_rows(part)
                rows += count_rows(part)
        check_rows(rows)
        return total / rows

    def loss_along(self, direction: Sequence[Tensor], scale: float) -> float:
        """The mean loss at `w + scale * direction`."""
        with self._perturbation.moved(self.parameters, direction, scale):
            return self.loss()

    def hessian_times(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """The Hessian of the mean loss times `vector`, by double backward. Costs about 2 backward passes."""

        def product(loss: Tensor) -> list[Tensor]:
            gradient = _gradient(loss, self.parameters, create_graph=True)
            along = torch.stack([(g * v).sum() for g, v in zip(gradient, vector, strict=True)]).sum()
            return _gradient(along, self.parameters)

        # Fused attention kernels do not support double backward.
        with _evaluating(self.model, self.device), sdpa_kernel(SDPBackend.MATH):
            return self._mean_over_batches(product)

    def top_eigenvalue(self, max_products: int = 100, tolerance: float = 1e-3, seed: int = 0) -> float:
        """
        The largest eigenvalue of the Hessian, by power iteration.

        Power iteration finds the eigenvalue of the largest absolute value. If that is negative, a second run on the
        Hessian shifted by it finds the largest eigenvalue.

        Args:
            max_products (`int`, *optional*, defaults to `100`): Maximum number of Hessian products per run.
            tolerance (`float`, *optional*, defaults to `1e-3`): A run ends when the relative change of its estimate is
                at most this.
            seed (`int`, *optional*, defaults to `0`): Seed of the initial vector.

        Raises:
            ValueError: if `max_products` is below 1.
        """
        if max_products < 1:
            raise ValueError(f"max_products counts Hessian products and must be at least 1, but is {max_products}.")
        largest = self._power_iteration(0.0, max_products, tolerance, seed)
        if largest >= 0:
            return largest
        return largest + self._power_iteration(-largest, max_products, tolerance, seed)

    def trace(self, samples: int = 30, seed: int = 0) -> tuple[float, float]:
        """
        The trace of the Hessian by Hutchinson's estimator, the mean of `v . H v` over vectors `v` of random signs.

        Args:
            samples (`int`, *optional*, defaults to `30`): Number of vectors `v`.
            seed (`int`, *optional*, defaults to `0`): Seed of the signs.

        Returns:
            The estimate and its standard error (NaN for one sample). Costs `samples` Hessian products.

        Raises:
            ValueError: if `samples` is below 1.
        """
        if samples < 1:
            raise ValueError(f"samples counts random vectors and must be at least 1, but is {samples}.")
        generator = torch.Generator().manual_seed(seed)
        values = []
        for _ in range(samples):
            signs = [torch.randint(0, 2, p.shape, generator=generator) * 2 - 1 for p in self.parameters]
            vector = [sign.to(p) for sign, p in zip(signs, self.parameters, strict=True)]
            values.append(_dot(vector, self.hessian_times(vector)))
        estimates = torch.tensor(values, dtype=torch.float64)
        return float(estimates.mean()), float(estimates.std() / math.sqrt(samples)) if samples > 1 else math.nan

    def random_direction(self, seed: int = 0) -> list[Tensor]:
        """
        A random direction with filter normalisation (Li et al., NeurIPS 2018).

        Each row of a matrix, or filter of a convolution, is scaled to the norm of the corresponding weights. The
        direction is zero for biases and the weights of normalisation layers.
        """
        generator = torch.Generator().manual_seed(seed)
        direction = []
        for parameter in self.parameters:
            if parameter.dim() < 2:
                direction.append(torch.zeros_like(parameter))
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            axes = tuple(range(1, parameter.dim()))
            lengths = torch.linalg.vector_norm(parameter.detach(), dim=axes, keepdim=True)
            direction.append(noise * (lengths / torch.linalg.vector_norm(noise, dim=axes, keepdim=True)))
        return direction

    def landscape(self, span: float = 1.0, points: int = 21, axes: int = 1, seed: int = 0) -> "Landscape":
        """
        The loss along one or two random directions, from `-span` to `span`.

        Args:
            span (`float`, *optional*, defaults to `1.0`): Largest multiple of a direction, in both senses. With 1, a
                filter moves by its own norm.
            points (`int`, *optional*, defaults to `21`): Points on each axis. Costs `points ** axes` forward passes.
            axes (`int`, *optional*, defaults to `1`): 1 for a line, 2 for a plane.
            seed (`int`, *optional*, defaults to `0`): Seed of the directions.

        Raises:
            ValueError: if `axes` is neither 1 nor 2, or `points` is below 2.
        """
        if axes not in (1, 2) or points < 2:
            raise ValueError(f"A landscape has 1 or 2 axes of at least 2 points, but axes={axes} and points={points}.")
        directions = [self.random_direction(seed + axis) for axis in range(axes)]
        places = torch.linspace(-span, span, points, dtype=torch.float64).tolist()
        if axes == 1:
            return Landscape(places, [self.loss_along(directions[0], place) for place in places])
        rows = []
        for first in places:
            with self._perturbation.moved(self.parameters, directions[0], first):
                inner = LossSurface(self.model, self.batches, self.loss_function, self.parameters)
                rows.append([inner.loss_along(directions[1], second) for second in places])
        return Landscape(places, rows)

    def _power_iteration(self, shift: float, max_products: int, tolerance: float, seed: int) -> float:
        """The eigenvalue of the largest absolute value of the Hessian plus `shift` times the identity."""
        generator = torch.Generator().manual_seed(seed)
        vector = [torch.randn(p.shape, generator=generator).to(p) for p in self.parameters]
        eigenvalue = math.inf
        for _ in range(max_products):
            length = math.sqrt(_dot(vector, vector))
            if length == 0:
                return 0.0
            vector = [v / length for v in vector]
            product = [h + shift * v for h, v in zip(self.hessian_times(vector), vector, strict=True)]
            last, eigenvalue = eigenvalue, _dot(vector, product)
            if abs(eigenvalue - last) <= tolerance * abs(eigenvalue):
                break
            vector = product
        return eigenvalue

    def _mean_loss(self) -> float:
        total, rows = 0.0, 0
        for batch in self.batches:
            batch = send_to_device(batch, self.device)
            total += float(self.loss_function(self.model, batch)) * count_rows(batch)
            rows += count_rows(batch)
        check_rows(rows)
        return total / rows

    def _mean_over_batches(self, of: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """The mean over all rows of `of(loss)`, with the mean loss of each batch."""
        sums, rows = [torch.zeros_like(parameter) for parameter in self.parameters], 0
        for batch in self.batches:
            batch = send_to_device(batch, self.device)
            torch._foreach_add_(sums, of(self.loss_function(self.model, batch)), alpha=count_rows(batch))
            rows += count_rows(batch)
        check_rows(rows)
        torch._foreach_div_(sums, rows)
        return sums


@dataclass(frozen=True)
class Landscape:
    """
    The loss along one or two directions from the weights.

    Attributes:
        places (`list[float]`): Multiples of a direction, the same for both axes; 0 is at the weights.
        losses (`list`): The loss at each place; for two axes, a list of losses for each place on the first axis.
    """

    places: list[float]
    losses: list


@contextmanager
def _evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Set the model to evaluation mode; restore the modes of its modules and the random state afterwards."""
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


def _gradient(loss: Tensor, parameters: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """The gradient of `loss`, with zeros for a parameter that it does not depend on."""
    return list(torch.autograd.grad(loss, parameters, create_graph=create_graph, materialize_grads=True))


@torch.no_grad()
def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    products = torch._foreach_mul(list(left), list(right))
    return float(torch.stack([product.sum(dtype=torch.float64) for product in products]).sum())
