"""The convergence check's function has the constants that it is said to have, and its steps are the algorithm's."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hf_lsam import reference
from hf_lsam_recipes.studies import convergence
from hf_lsam_recipes.studies.convergence import (
    Model,
    Problem,
    Settings,
    draw,
    fitted_slope,
    mean_squared_norm,
    start_of,
)

SETTINGS = Settings(rows=64, layers=3, features=2, batch_size=4, steps=(4, 8, 16), c=2.0, c_rho=0.5, seeds=(0, 1))


@pytest.fixture
def problem() -> Problem:
    return Problem.of(SETTINGS)


def points(count: int) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randn(6, generator=draws, dtype=torch.float64) for _ in range(count)]


def test_gradient_and_loss_are_those_of_the_model(problem):
    for weights in points(5):
        model = Model(weights, SETTINGS.layers)
        loss = model(problem.inputs, problem.targets)
        gradient = torch.cat(torch.autograd.grad(loss, list(model.parameters())))
        assert abs(loss.item() - problem.loss(weights)) < 1e-12
        assert float((gradient - problem.gradient(weights)).abs().max()) < 1e-12


def test_curvature_is_within_the_smoothness_constant_and_of_both_signs(problem):
    lowest, highest = [], []
    for weights in points(20):
        eigenvalues = torch.linalg.eigvalsh(torch.autograd.functional.jacobian(problem.gradient, weights))
        lowest.append(float(eigenvalues[0])), highest.append(float(eigenvalues[-1]))
    assert max(highest) <= problem.smoothness and min(lowest) >= -problem.smoothness
    assert min(lowest) < 0 < max(highest)
    # It is attained where every row is met: phi'' = 2 there.
    exact = Problem(problem.inputs, torch.zeros(64, dtype=torch.float64), 4)
    hessian = torch.autograd.functional.jacobian(exact.gradient, torch.zeros(6, dtype=torch.float64))
    assert abs(float(torch.linalg.eigvalsh(hessian)[-1]) - problem.smoothness) < 1e-12


def test_variance_of_a_batch_is_within_its_bound(problem):
    """Of rows drawn with replacement it is a single row's, over the size of the batch."""
    for weights in points(20):
        residual = problem.inputs @ weights - problem.targets
        rows = problem.inputs * (2 * residual / (1 + residual.square()).square())[:, None]
        assert float((rows - problem.gradient(weights)).square().sum(1).mean()) / 4 <= problem.variance


class WithLoss(nn.Module):
    """As the reference calls a model."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return SimpleNamespace(loss=self.model(**batch))


@pytest.mark.parametrize("method", range(3))
def test_trajectories_are_those_of_the_reference(problem, method):
    steps = 16
    config = [*SETTINGS.methods(steps).values()][method]
    model = WithLoss(Model(start_of(SETTINGS, 1), SETTINGS.layers))
    optimizer = torch.optim.SGD(model.parameters(), lr=SETTINGS.c / (problem.smoothness * steps**0.5))
    draws, total = torch.Generator().manual_seed(2 * 10**6 + steps), 0.0
    for _ in range(steps):
        weights = torch.cat([parameter.detach() for parameter in model.parameters()])
        total += float(problem.gradient(weights).square().sum()) / steps
        rows = torch.randint(64, (4,), generator=draws)
        batches = [{"inputs": problem.inputs[rows], "targets": problem.targets[rows]}]
        if method == 0:
            reference.plain_step(model, batches, optimizer)
        elif method == 1:
            reference.sam_step(model, batches, optimizer, config.rho)
        else:
            blocks = [list(layer.parameters()) for layer in model.model.layers]
            reference.lsam_step(model, batches, optimizer, blocks, config.rho, 1.0, reference.top_k(2))
    assert mean_squared_norm(problem, SETTINGS, config, steps, seed=1) == pytest.approx(total, rel=1e-12)


def test_slope_of_a_power_law():
    assert fitted_slope([16, 64, 256], [3 * steps**-0.5 for steps in (16, 64, 256)]) == pytest.approx(-0.5, abs=1e-12)


def test_the_script_writes_its_result_and_draws_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convergence, "Settings", lambda: SETTINGS)
    convergence.main([str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "convergence.json").read_text())
    assert {"commit", "versions", "machine", "seeds"} <= result.keys()
    assert np.shape([*result["mean_squared_norms"].values()]) == (3, 2, 3)
    assert (tmp_path / "out" / "convergence.svg").exists() and (tmp_path / "out" / "convergence.png").exists()
    assert "layer-wise SAM, 2 of 3: slope " in capsys.readouterr().out
    lines = draw(result).axes[0].lines
    assert len(lines) == 4
    for line, rows in zip(lines, result["mean_squared_norms"].values(), strict=False):
        assert line.get_xdata().tolist() == [4, 8, 16]
        assert line.get_ydata().tolist() == np.mean(rows, 0).tolist()
