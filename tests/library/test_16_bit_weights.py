"""Weights and gradients of 16 bits: moves are rounded stochastically, and products are taken in float32."""

import pytest
import torch
from tiny import Examples, arguments, bert, llama, weights
from tiny_precision import METHODS

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.perturbation import Perturbation, adaptive_scores, norms, orthogonal_part
from hf_lsam.rounding import round_stochastically


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_gives_a_neighbour_and_is_right_in_the_mean(dtype):
    generator = torch.Generator().manual_seed(0)
    for value in (1.0, 1.001, -0.3333, 0.9999, -2.0001, 1e-8, -3e-8, 0.0, 100.123):
        values = torch.full((100_000,), value)
        rounded = round_stochastically(values, dtype, generator).double()
        below, above = rounded.min(), rounded.max()
        assert below <= values[0].double() <= above
        assert torch.equal(below.to(dtype).double(), below) and len(rounded.unique()) <= 2
        assert abs(rounded.mean() - values[0].double()) <= 5 * (above - below) / 2 / 100_000**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_move_that_weights_of_16_bits_would_swallow_is_right_in_the_mean(dtype):
    """To the nearest, no weight would move at all; the draws are the seed's and not those of the training."""
    weight = torch.full((200_000,), 1.0).to(dtype)
    slope = torch.ones_like(weight)
    perturbation, state = Perturbation(), torch.get_rng_state()
    length = torch.finfo(dtype).eps / 16
    moves = []
    for perturbation.seed in (0, 0, 1):
        with perturbation.moved([weight], [slope], length):
            moves.append(weight.double() - 1)
        assert bool((weight == 1).all())
    assert moves[0].mean() == pytest.approx(length, rel=0.05)
    assert torch.equal(moves[0], moves[1]) and not torch.equal(moves[0], moves[2])
    assert torch.equal(state, torch.get_rng_state())


def test_products_of_fp16_gradients_neither_underflow_nor_overflow():
    torch.manual_seed(0)
    for size in (1e-5, 1e3):
        plain, perturbed = ([(torch.randn(500) * size).half()] for _ in range(2))
        part = orthogonal_part(perturbed, plain)[0].double()
        along = (perturbed[0].double() * plain[0].double()).sum() / plain[0].double().square().sum()
        exact = perturbed[0].double() - along * plain[0].double()
        assert float((part - exact / exact.norm()).abs().max()) < 1e-6
        assert float(norms(plain)[0]) == pytest.approx(float(plain[0].double().norm()), rel=1e-6)
        scores = adaptive_scores([(torch.ones(500) / 1000).half()], plain)
        assert float(norms(scores)[0]) == pytest.approx(float(plain[0].double().norm()) / 1000, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["top 2", "adaptive", "looksam", "one pass"])
def test_models_of_16_bits_train(method, dtype, tmp_path):
    """With SGD: AdamW of torch 2.6 divides by zero in fp16, in the plain Trainer, too."""
    trainer = LSAMTrainer(
        model=bert().to(dtype),
        args=arguments(tmp_path, learning_rate=1e-3, optim="sgd"),
        train_dataset=Examples(16),
        lsam_config=LSAMConfig(**METHODS[method]),
    )
    trainer.train()
    assert trainer.model.dtype == dtype
    assert all(bool(tensor.isfinite().all()) for tensor in weights(trainer.model).values())
    line = trainer._lsam.log.line()
    assert line["lsam/active"] > 0 and line["lsam/skipped"] == 0


def test_adapters_over_a_bf16_base_are_in_float32_and_are_not_rounded(tmp_path, caplog):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama().to(torch.bfloat16), peft.LoraConfig(target_modules=["q_proj"]))
    trainer = LSAMTrainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=Examples(16, language_model=True),
        lsam_config=LSAMConfig(rho=0.001),
    )
    trainer.train()
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert trainer._lsam.log.chances == 4 and "resolve" not in caplog.text
