"""How flat a minimum is, checked against closed forms and against a full Hessian."""

import math

import pytest
import torch
from tiny import Examples, arguments, assert_equal, bert, llama, weights
from torch import nn
from torch.utils.data import DataLoader

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam_recipes.support.sharpness import LossSurface
from hf_lsam_recipes.support.sharpness_callback import SharpnessCallback, block_surfaces

pytestmark = pytest.mark.usefixtures("float64")


class Quadratic(nn.Module):
    """The loss 1/2 w A w + b w, whatever the batch."""

    def __init__(self, eigenvalues):
        super().__init__()
        torch.manual_seed(0)
        rotation = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues))).Q
        self.matrix = rotation @ torch.diag(torch.tensor(eigenvalues)) @ rotation.T
        self.slope = torch.randn(len(eigenvalues))
        self.w = nn.Parameter(torch.randn(len(eigenvalues)))

    def forward(self):
        return self.w @ self.matrix @ self.w / 2 + self.slope @ self.w


def quadratic(*eigenvalues):
    model = Quadratic(eigenvalues)
    return model, LossSurface(model, [torch.zeros(1)], lambda model, batch: model())


def test_gradient_norm_and_sharpness_of_a_quadratic():
    model, surface = quadratic(3.0, 1.0, 0.5, -2.0)
    g = model.matrix @ model.w.detach() + model.slope
    assert surface.loss() == pytest.approx(model().item(), abs=1e-12)
    assert surface.gradient_norm() == pytest.approx(g.norm().item(), abs=1e-12)
    rho = 0.3
    expected = rho * g.norm() + rho**2 / 2 * (g @ model.matrix @ g) / (g @ g)
    assert surface.sharpness(rho) == pytest.approx(expected.item(), abs=1e-12)
    w = model.w.detach()
    eps = rho * w**2 * g / (w.abs() * g).norm()
    expected = g @ eps + eps @ model.matrix @ eps / 2
    assert surface.sharpness(rho, adaptive=True) == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("eigenvalues", [(3.0, 1.0, 0.5, -2.0), (-5.0, 2.0, 1.0), (-3.0, -1.0), (0.0, 0.0)])
def test_top_eigenvalue_and_trace_of_a_quadratic(eigenvalues):
    _, surface = quadratic(*eigenvalues)
    assert surface.top_eigenvalue(1000, 1e-10) == pytest.approx(max(eigenvalues), abs=1e-5)
    estimate, error = surface.trace(2000)
    assert abs(estimate - sum(eigenvalues)) < 4 * error + 1e-12
    assert error < 0.2
    assert math.isnan(surface.trace(1)[1])


class Net(nn.Module):
    """Two layers with a ReLU, as images of 6 numbers; `scale` moves size from the second layer to the first."""

    def __init__(self, scale=1.0):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)
        with torch.no_grad():
            for parameter in self.first.parameters():
                parameter.mul_(scale)
            self.second.weight.div_(scale)

    def forward(self, x):
        return self.second(self.first(x).relu())


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def full_hessian(model, batch):
    names, sizes = zip(*[(name, p.shape) for name, p in model.named_parameters()], strict=True)

    def loss(flat):
        parts = flat.split([size.numel() for size in sizes])
        weights = {name: part.view(size) for name, part, size in zip(names, parts, sizes, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (batch[0],)), batch[1])

    return torch.autograd.functional.hessian(loss, nn.utils.parameters_to_vector(model.parameters()).detach())


def test_curvature_equals_that_of_the_full_hessian_over_batches_of_unequal_length():
    model, (x, y) = Net(), rows(11)
    hessian = full_hessian(model, (x, y))
    surface = LossSurface(model, [(x[:7], y[:7]), (x[7:], y[7:])], cross_entropy)
    vector = [torch.randn_like(p) for p in model.parameters()]
    flat = torch.cat([v.flatten() for v in vector])
    product = torch.cat([part.flatten() for part in surface.hessian_times(vector)])
    assert float((product - hessian @ flat).abs().max()) < 1e-12
    assert surface.top_eigenvalue(2000, 1e-12) == pytest.approx(torch.linalg.eigvalsh(hessian).max().item(), rel=1e-6)
    estimate, error = surface.trace(500)
    assert abs(estimate - hessian.trace().item()) < 4 * error


def test_a_block_has_its_own_part_of_the_hessian():
    model, batch = Net(), rows(8)
    size = sum(p.numel() for p in model.first.parameters())
    part = full_hessian(model, batch)[:size, :size]
    surface = LossSurface(model, [batch], cross_entropy, list(model.first.parameters()))
    assert surface.top_eigenvalue(5000, 1e-12) == pytest.approx(torch.linalg.eigvalsh(part).max().item(), rel=1e-5)


def test_adaptive_sharpness_ignores_the_scale_of_layers_and_the_plain_one_does_not():
    surfaces = [LossSurface(Net(scale), [rows(16)], cross_entropy) for scale in (1.0, 4.0)]
    assert surfaces[0].loss() == pytest.approx(surfaces[1].loss(), abs=1e-12)
    adaptive, plain = ([s.sharpness(0.1, adaptive) for s in surfaces] for adaptive in (True, False))
    assert adaptive[0] == pytest.approx(adaptive[1], abs=1e-12)
    assert abs(plain[0] - plain[1]) > 1e-3


def test_m_sharpness_is_the_mean_over_groups_of_rows():
    model, (x, y) = Net(), rows(10)
    surface = LossSurface(model, [(x[:6], y[:6]), (x[6:], y[6:])], cross_entropy)
    groups = [(0, 4), (4, 6), (6, 10)]
    by_hand = 0.0
    for start, end in groups:
        loss = cross_entropy(model, (x[start:end], y[start:end]))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        moved = {name: p + 0.1 * g / norm for (name, p), g in zip(model.named_parameters(), gradients, strict=True)}
        logits = torch.func.functional_call(model, moved, (x[start:end],))
        by_hand += (nn.functional.cross_entropy(logits, y[start:end]) - loss).item() * (end - start) / 10
    assert surface.m_sharpness(4, 0.1) == pytest.approx(by_hand, abs=1e-12)
    assert surface.m_sharpness(4, 0.1) > surface.sharpness(0.1)


def test_random_directions_have_the_filters_norms():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    surface = LossSurface(model, [torch.zeros(1)], lambda model, batch: model(batch))
    for parameter, direction in zip(model.parameters(), surface.random_direction(), strict=True):
        lengths = parameter.detach().flatten(1).norm(dim=1) if parameter.dim() > 1 else torch.zeros(len(parameter))
        found = direction.flatten(1).norm(dim=1) if parameter.dim() > 1 else direction.abs()
        assert float((lengths - found).abs().max()) < 1e-12


def test_a_landscape_is_the_loss_along_its_directions():
    model, batch = Net(), rows(9)
    surface = LossSurface(model, [batch], cross_entropy)
    line, plane = surface.landscape(0.5, 5), surface.landscape(0.5, 3, axes=2)
    assert line.places == [-0.5, -0.25, 0.0, 0.25, 0.5]
    assert line.losses[2] == plane.losses[1][1] == surface.loss()
    first, second = surface.random_direction(0), surface.random_direction(1)
    moved = {
        name: p + 0.5 * one - 0.5 * other
        for (name, p), one, other in zip(model.named_parameters(), first, second, strict=True)
    }
    logits = torch.func.functional_call(model, moved, (batch[0],))
    assert plane.losses[2][0] == pytest.approx(nn.functional.cross_entropy(logits, batch[1]).item(), abs=1e-12)


@pytest.mark.parametrize("make", [bert, llama])
def test_measuring_leaves_everything_as_it_was(make):
    model = make(dropout=0.2).train()
    model.get_input_embeddings().eval()
    batch = Examples(4, language_model=make is llama).batch(0, 4)
    model(**batch).loss.backward()
    before, gradients = weights(model), [p.grad.clone() for p in model.parameters()]
    modes, random_state = [m.training for m in model.modules()], torch.get_rng_state()
    for surface in block_surfaces(model, [batch]).values():
        assert surface.sharpness(0.1) > 0
        assert math.isfinite(surface.top_eigenvalue(3))
    surface.trace(2), surface.landscape(0.1, 2, axes=2), surface.m_sharpness(2)
    assert_equal(before, weights(model))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert surface.loss() == surface.loss()


def test_weights_are_restored_when_the_loss_fails():
    model = Net()
    before = weights(model)
    calls = iter([1, 1, 0])

    def fails(model, batch):
        if next(calls) == 0:
            raise ArithmeticError
        return cross_entropy(model, batch)

    surface = LossSurface(model, [rows(4)], fails)
    with pytest.raises(ArithmeticError):
        surface.landscape(0.5, 5)
    assert_equal(before, weights(model))


def test_bad_input_says_what_is_wrong():
    model = Net()
    with pytest.raises(ValueError, match="parameters is empty"):
        LossSurface(model, [rows(4)], cross_entropy, [])
    with pytest.raises(ValueError, match="batches is empty"):
        LossSurface(model, [], cross_entropy).sharpness()
    with pytest.raises(ValueError, match="m counts rows"):
        LossSurface(model, [rows(4)], cross_entropy).m_sharpness(0)
    with pytest.raises(ValueError, match="1 or 2 axes"):
        LossSurface(model, [rows(4)], cross_entropy).landscape(axes=3)
    with pytest.raises(ValueError, match="max_products counts"):
        LossSurface(model, [rows(4)], cross_entropy).top_eigenvalue(max_products=0)
    with pytest.raises(ValueError, match="samples counts"):
        LossSurface(model, [rows(4)], cross_entropy).trace(samples=0)
    with pytest.raises(ValueError, match="interval counts"):
        SharpnessCallback(None, [], interval=0)


def test_the_callback_logs_and_changes_nothing_of_the_training(tmp_path):
    results = []
    for watched in (False, True):
        trainer = LSAMTrainer(
            model=bert(dropout=0.1),
            args=arguments(tmp_path, max_steps=6, logging_steps=1),
            train_dataset=Examples(24),
            lsam_config=LSAMConfig(rho=0.3),
        )
        if watched:
            batches = DataLoader(Examples(8, seed=5), batch_size=4)
            trainer.add_callback(SharpnessCallback(trainer, batches, interval=3, top_eigenvalue=True))
        trainer.train()
        results.append(trainer)
    plain, watched = results
    assert_equal(weights(plain.model), weights(watched.model))
    losses = [[line for line in t.state.log_history if "loss" in line] for t in results]
    assert [line["step"] for line in losses[1]] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in losses[0]] == [line["loss"] for line in losses[1]]
    lines = [line for line in watched.state.log_history if "sharpness/top_eigenvalue" in line]
    assert [line["step"] for line in lines] == [3, 6]
    names = [f"bert.encoder.layer.{i}" for i in range(4)]
    for line in lines:
        assert all(line[f"sharpness/{figure}/{n}"] > 0 for figure in ("gradient_norm", "sam") for n in [*names, "all"])
        norms = [line[f"sharpness/gradient_norm/{name}"] for name in names]
        assert sum(norm**2 for norm in norms) < line["sharpness/gradient_norm/all"] ** 2
