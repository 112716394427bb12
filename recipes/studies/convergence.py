r"""
Convergence rates of SGD, SAM and layer-wise SAM on a function with known smoothness and variance constants.

    python recipes/studies/convergence.py outputs/convergence

writes `convergence.json`, and the picture as SVG and PNG.

The paper's theorem states that perturbing a few layers converges as fast as perturbing all of them. Such a rate needs
the standard assumptions of non-convex optimization:

- f is L-smooth. Here f(w) = mean of phi(x_j . w - y_j) over n rows, phi(t) = t^2 / (1 + t^2): regression that is
  robust to outliers. phi'' = (2 - 6 t^2) / (1 + t^2)^3 lies between -1/2 and 2, so f is not convex, and L = 2 *
  (largest eigenvalue of X^T X / n).
- Stochastic gradients are unbiased, and their variance is at most sigma^2. Here batches of b rows are drawn with
  replacement, and |phi'| <= 9 / (8 sqrt(3)), so sigma^2 = 81 / 192 * (mean of ||x_j||^2) / b.
- The step size is eta = c / (L sqrt(T)) and the perturbation rho = c' / sqrt(T) for T steps.

The mean of ||grad f(w_t)||^2 over the T steps then falls like 1 / sqrt(T): for SGD it is at most
2 f(w_0) / (eta T) + eta L sigma^2, while eta <= 1 / L. Perturbed by rho, whichever layers it moves, a gradient changes
by no more than a smoothness constant times rho, which is why the rate should stay. The paper's exact
assumption about rho was not available: c' / sqrt(T) is the usual choice.

The weights form N layers, groups of features of different scale. Each step is the trainer's own `LSAMStep`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from hf_lsam import LSAMConfig
from hf_lsam.step import LSAMStep
from hf_lsam_recipes.plot import save
from hf_lsam_recipes.support.comparison.statistics import Interval, mean_interval
from hf_lsam_recipes.support.figures.comparison import WIDTH
from hf_lsam_recipes.support.figures.palette import style
from hf_lsam_recipes.support.stamp import stamp


@dataclass(frozen=True)
class Settings:
    """The function, and the settings of the optimization."""

    rows: int = 512
    layers: int = 6
    features: int = 4  # of a layer
    batch_size: int = 16
    perturbed_layers: int = 2
    steps: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    c: float = 8.0  # eta is 1 / L for the fewest steps
    c_rho: float = 1.0
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def methods(self, steps: int) -> dict[str, LSAMConfig]:
        """The three compared methods, for a training of `steps` steps."""
        rho, k = self.c_rho / steps**0.5, self.perturbed_layers
        partial = LSAMConfig(block_selection="top_k", num_perturbed_blocks=k, rho=rho)
        return {
            "SGD": LSAMConfig(block_selection="none"),
            "SAM": LSAMConfig(block_selection="all", rho=rho),
            f"layer-wise SAM, {k} of {self.layers}": partial,
        }


class Layer(nn.Module):
    """Adds the contribution of its features to the prediction."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, total: Tensor, inputs: Tensor) -> Tensor:
        return total + inputs @ self.weight


class Model(nn.Module):
    """The mean of phi over the rows of a batch."""

    def __init__(self, start: Tensor, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(part) for part in start.chunk(layers))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        residual = -targets
        for layer, part in zip(self.layers, inputs.chunk(len(self.layers), dim=1), strict=True):
            residual = layer(residual, part)
        square = residual.square()
        return (square / (1 + square)).mean()


@dataclass(frozen=True)
class Problem:
    """The data, which determine the constants."""

    inputs: Tensor
    targets: Tensor
    batch_size: int

    @classmethod
    def of(cls, settings: Settings) -> "Problem":
        """Draw rows around a plane, every fifth an outlier. The features of the first layer have the largest scale."""
        draws = torch.Generator().manual_seed(0)
        width = settings.layers * settings.features
        scales = torch.logspace(0, -0.5, settings.layers, dtype=torch.float64).repeat_interleave(settings.features)
        inputs = torch.randn(settings.rows, width, generator=draws, dtype=torch.float64) * scales
        targets = inputs @ (0.3 * torch.randn(width, generator=draws, dtype=torch.float64))
        noise = torch.randn(settings.rows, generator=draws, dtype=torch.float64)
        spread = torch.where(torch.arange(settings.rows) % 5 == 0, 5.0, 0.3)
        return cls(inputs, targets + spread * noise, settings.batch_size)

    @property
    def smoothness(self) -> float:
        """The smoothness constant L."""
        return 2 * float(torch.linalg.eigvalsh(self.inputs.T @ self.inputs / len(self.inputs))[-1])

    @property
    def variance(self) -> float:
        """The bound sigma^2 on the variance of stochastic gradients."""
        return 81 / 192 * float(self.inputs.square().sum(1).mean()) / self.batch_size

    def bound(self, settings: Settings, steps: int, seed: int) -> float:
        """Upper bound on the expected mean of ||grad f||^2 of SGD."""
        eta = settings.c / (self.smoothness * steps**0.5)
        return 2 * self.loss(start_of(settings, seed)) / (eta * steps) + eta * self.smoothness * self.variance

    def loss(self, weights: Tensor) -> float:
        """The value f(w) of the function."""
        square = (self.inputs @ weights - self.targets).square()
        return float((square / (1 + square)).mean())

    def gradient(self, weights: Tensor) -> Tensor:
        """The gradient of f at w."""
        residual = self.inputs @ weights - self.targets
        return self.inputs.T @ (2 * residual / (1 + residual.square()).square()) / len(residual)


def start_of(settings: Settings, seed: int) -> Tensor:
    """The initial weights of every method with this seed."""
    draws = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(settings.layers * settings.features, generator=draws, dtype=torch.float64)


def mean_squared_norm(problem: Problem, settings: Settings, config: LSAMConfig, steps: int, seed: int) -> float:
    """The mean of ||grad f||^2 over the steps of a training; every method gets the same batches."""
    model = Model(start_of(settings, seed), settings.layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.c / (problem.smoothness * steps**0.5))
    step = LSAMStep(model, config, steps)
    draws = torch.Generator().manual_seed(10**6 * (seed + 1) + steps)
    total = 0.0
    for index in range(steps):
        weights = torch.cat([parameter.detach() for parameter in model.parameters()])
        total += float(problem.gradient(weights).square().sum())
        rows = torch.randint(len(problem.inputs), (settings.batch_size,), generator=draws)

        def run(rows: Tensor = rows) -> Tensor:
            loss = model(problem.inputs[rows], problem.targets[rows])
            loss.backward()
            return loss.detach()

        step(run, run, index, True)
        optimizer.step()
        optimizer.zero_grad()
    return total / steps


def fitted_slope(steps: Sequence[int], values: Sequence[float]) -> float:
    """The exponent of the best-fitting power law; the rate of the theorem is -1/2."""
    return float(stats.linregress(np.log(steps), np.log(values)).slope)


def measure(settings: Settings) -> dict[str, Any]:
    """Run every method for each number of steps and seed; returns means of ||grad f||^2, and slopes with intervals."""
    problem = Problem.of(settings)
    names = list(settings.methods(1))
    values: dict[str, list[list[float]]] = {name: [] for name in names}
    with tqdm(total=len(settings.seeds) * sum(settings.steps) * len(names), unit="step") as bar:
        for seed in settings.seeds:
            for name in names:
                row = []
                for steps in settings.steps:
                    row.append(mean_squared_norm(problem, settings, settings.methods(steps)[name], steps, seed))
                    bar.update(steps)
                values[name].append(row)
    slopes = {name: [fitted_slope(settings.steps, row) for row in rows] for name, rows in values.items()}
    sgd, sam, partial = names
    difference = [one - other for one, other in zip(slopes[partial], slopes[sam], strict=True)]
    last = [one[-1] / other[-1] for one, other in zip(values[partial], values[sam], strict=True)]
    bounds = [[problem.bound(settings, steps, seed) for steps in settings.steps] for seed in settings.seeds]
    return {
        "settings": asdict(settings),
        "L": problem.smoothness,
        "sigma^2": problem.variance,
        "mean_squared_norms": values,
        "bound_of_sgd": bounds,
        "slopes": {name: asdict(mean_interval(of_seeds)) for name, of_seeds in slopes.items()},
        "slope_of_layer_wise_less_that_of_sam": asdict(mean_interval(difference)),
        "layer_wise_over_sam_after_most_steps": asdict(mean_interval(last)),
        "sgd_within_its_bound": bool((np.mean(values[sgd], 0) <= np.mean(bounds, 0)).all()),
    }


def draw(result: dict[str, Any]) -> Figure:
    """Plot mean and range over the seeds against the number of steps."""
    steps = np.array(result["settings"]["steps"])
    figure = Figure(figsize=(WIDTH, 5.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    for index, (name, rows) in enumerate(result["mean_squared_norms"].items()):
        values, slope, drawn = np.array(rows), result["slopes"][name], style(index)
        label = f"{name}: slope {Interval(**slope):.3f}"
        axes.plot(steps, values.mean(0), label=label, linewidth=1.6, markersize=6, **drawn)
        axes.fill_between(steps, values.min(0), values.max(0), color=drawn["color"], alpha=0.12, linewidth=0)
    axes.plot(steps, np.mean(result["bound_of_sgd"], 0), color="#999999", label="bound of SGD: slope -1/2")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(steps, [str(count) for count in steps])
    axes.set_xlabel("steps T; step size and perturbation fall like 1 / sqrt(T)")
    axes.set_ylabel("mean of ||grad f||^2 over the T steps")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9)
    seeds = len(result["settings"]["seeds"])
    axes.set_title(f"Rates on a smooth non-convex function, mean and range of {seeds} seeds", fontsize=11)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().partition("\n")[0], allow_abbrev=False)
    parser.add_argument("output_dir", type=Path, help="folder for convergence.json and the picture")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = Settings()
    result = stamp(settings.seeds) | measure(settings)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1) + "\n"
    (args.output_dir / "convergence.json").write_text(text, encoding="utf-8")
    for name, slope in result["slopes"].items():
        print(f"{name}: slope {Interval(**slope):.3f}")
    difference, last = result["slope_of_layer_wise_less_that_of_sam"], result["layer_wise_over_sam_after_most_steps"]
    print(f"difference of slopes, layer-wise - SAM: {Interval(**difference):.3f}")
    print(f"ratio layer-wise / SAM for the largest number of steps: {Interval(**last):.3f}")
    print(f"SGD within its bound: {result['sgd_within_its_bound']}")
    for path in save(draw(result), args.output_dir / "convergence"):
        print(path)


if __name__ == "__main__":
    main()
