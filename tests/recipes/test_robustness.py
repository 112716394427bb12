"""Metrics with quantised and with noisy weights, and what is forgotten of a neutral text."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import assert_equal, weights
from tiny_clm import argv as clm_argv
from tiny_clm import save_model, write_text
from tiny_glue import QUICK, save_bert, write_task
from tiny_images import QUICK as QUICK_IMAGES
from tiny_images import SMALL, write_folder
from torch import nn
from transformers import Trainer

from hf_lsam_recipes import run_clm, run_glue
from hf_lsam_recipes import run_image_classification as images
from hf_lsam_recipes.support import robustness
from hf_lsam_recipes.support.robustness import RobustnessArguments, changed_weights, noisy, quantised

BOTH = ["--quantised_bits", "8", "4", "--weight_noise", "0.1"]


def rounded(weight: torch.Tensor, bits: int, group: int) -> list[list[float]]:
    """Number by number: the nearest multiple of a scale by which the largest of a group is the end of the range."""
    rows = []
    for row in weight.tolist():
        values: list[float] = []
        for start in range(0, len(row), group):
            part = row[start : start + group]
            scale = max(map(abs, part)) / ((2**bits - 1) / 2)
            steps = [round(value / scale) for value in part]
            values += [max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, step)) * scale for step in steps]
        rows.append(values)
    return rows


@pytest.mark.parametrize("bits, inputs, group", [(8, 128, 128), (4, 128, 64), (4, 96, 96)])
def test_quantisation_equals_its_definition(bits, inputs, group):
    torch.manual_seed(0)
    weight = torch.randn(5, inputs)
    ours = quantised(weight, bits)
    literal = torch.tensor(rounded(weight, bits, group))
    # Of two that are equally near, either is right.
    torch.testing.assert_close((ours - weight).abs(), (literal - weight).abs(), rtol=1e-4, atol=1e-5)
    assert ((ours - literal).abs() > 1e-4).sum() <= 5 and not torch.equal(ours, weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_zero_stay_zero(bits):
    """As those of a new LoRA adapter, also where the processor takes the smallest numbers for zero."""
    torch.set_flush_denormal(True)  # where the processor can
    try:
        assert torch.equal(quantised(torch.zeros(3, 64), bits), torch.zeros(3, 64))
    finally:
        torch.set_flush_denormal(False)


def test_noise_has_the_deviation_that_is_asked_for_and_is_the_same_again():
    weight = 3 * torch.randn(200, 300)
    first, second = (noisy(weight, 0.1, torch.Generator().manual_seed(7)) - weight for _ in range(2))
    assert torch.equal(first, second)
    assert float(first.std() / weight.std()) == pytest.approx(0.1, rel=0.02)
    assert abs(float(first.mean())) < 0.01


class Tied(nn.Module):
    """A linear layer of its own, one whose weight is an embedding's, and one weight that no linear layer holds."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(4, 8), nn.Linear(8, 8), nn.Linear(8, 4, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("fails", [False, True])
def test_linear_layers_change_and_are_put_back(fails):
    model = Tied()
    before = weights(model)
    try:
        with changed_weights(model, lambda weight: weight + 1):
            within = weights(model)
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert_equal(within, before | {"inner.weight": before["inner.weight"] + 1})
    assert_equal(weights(model), before)


def literal_metrics(run, model: nn.Module, change, split: str) -> dict[str, float]:
    """Metrics of a plain Trainer with a copy of the model whose linear layers are `change`d."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for module in copy.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(change(module.weight))
    trainer = Trainer(
        copy, run.args, compute_metrics=run.trainer.compute_metrics, data_collator=run.trainer.data_collator
    )
    output = trainer.predict(run.datasets[split], metric_key_prefix="x")
    return {name[2:]: value for name, value in output.metrics.items() if not name.endswith(robustness.TIMES)}


def test_a_run_reports_metrics_under_each_change_and_saves_the_plain_weights(tmp_path):
    argv = ["--model_name_or_path", save_bert(tmp_path / "bert", initializer_range=0.5), "--task_name", "sst2", *QUICK]
    argv += ["--data_dir", write_task(tmp_path, "sst2"), "--do_train", "--do_eval"]
    results, saved = {}, {}
    for name, options in (("plain", []), ("changed", BOTH)):
        run = run_glue.prepare([*argv, *options, "--output_dir", str(tmp_path / name)])
        results[name], saved[name] = run_glue.execute(run), weights(run.trainer.model)
    assert_equal(saved["plain"], saved["changed"])
    timeless = {
        name: value
        for name, value in results["plain"].items()
        if not name.endswith((*robustness.TIMES, "_seconds", "_mib"))
    }
    assert timeless.items() <= {name: results["changed"][name] for name in timeless}.items()
    for bits in (8, 4):
        expected = literal_metrics(
            run, run.trainer.model, lambda weight, bits=bits: quantised(weight, bits), "validation"
        )
        assert {name: results["changed"][f"eval_int{bits}_{name}"] for name in expected} == pytest.approx(expected)
    draws = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        draws.append(literal_metrics(run, run.trainer.model, lambda w, g=generator: noisy(w, 0.1, g), "validation"))
    for name in draws[0]:
        assert results["changed"][f"eval_noise_0.1_{name}"] == pytest.approx(np.mean([draw[name] for draw in draws]))
    assert len({results["changed"][f"eval_{change}loss"] for change in ("", "int8_", "int4_", "noise_0.1_")}) == 4


def test_images_are_evaluated_so_too(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    argv = [*SMALL, *QUICK_IMAGES, "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--do_train", *BOTH]
    for seed, name in enumerate(("train", "test")):
        argv += [f"--{name}_images", write_folder(tmp_path / name, 4, seed)]
    metrics = images.main([*argv, "--do_predict"])
    assert {"test_loss", "test_int8_loss", "test_int4_accuracy", "test_noise_0.1_nll"} <= metrics.keys()


def test_what_is_forgotten_of_a_neutral_text(tmp_path):
    model, neutral = save_model(tmp_path / "llama"), write_text(tmp_path / "neutral.txt")
    train = tmp_path / "train.txt"
    train.write_text("film good bad the a is dull bright\n" * 60)
    argv = clm_argv(
        model, tmp_path / "out", "--train_file", str(train), "--neutral_file", neutral, "--block_size", "16"
    )
    train_so = ["--learning_rate", "0.01", "--do_train", "--do_eval", "--lora_r", "2", "--lora_dropout", "0.5"]
    run = run_clm.prepare([*argv, "--quantised_bits", "4", *train_so])
    before = run.trainer.predict(run.neutral).metrics["test_loss"]
    state = torch.get_rng_state()
    metrics = run_clm.execute(run)
    assert metrics["eval_neutral_loss_before"] == pytest.approx(before, abs=1e-6)
    assert metrics["eval_neutral_loss"] == pytest.approx(
        run.trainer.predict(run.neutral).metrics["test_loss"], abs=1e-6
    )
    assert metrics["eval_neutral_loss"] != metrics["eval_neutral_loss_before"]
    assert {"eval_int4_loss", "eval_int4_perplexity", "eval_neutral_int4_loss"} <= metrics.keys()
    # To look before training changes nothing of it.
    torch.set_rng_state(state)
    left_out = ("--neutral_file", neutral, str(tmp_path / "out"), "--output_dir")
    plain = [part for part in argv if part not in left_out]
    again = run_clm.prepare([*plain, "--output_dir", str(tmp_path / "again"), *train_so])
    torch.set_rng_state(state)
    run_clm.execute(again)
    assert_equal(weights(again.trainer.model), weights(run.trainer.model))
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert results["eval_neutral_loss"] == metrics["eval_neutral_loss"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quantised_bits": [3]}, "quantised_bits must be 8, 4 or both, but one is 3"),
        ({"weight_noise": [0.0]}, "weight_noise must be numbers above 0, but one is 0.0"),
        ({"weight_noise": [math.nan]}, "weight_noise must be numbers above 0, but one is nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RobustnessArguments(**settings)


@pytest.mark.parametrize("sharded", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_weights_are_refused(sharded):
    trainer = SimpleNamespace(**{"is_fsdp_enabled": False, "is_deepspeed_enabled": False} | {sharded: True})
    robustness.check_robustness(trainer, RobustnessArguments())
    with pytest.raises(ValueError, match="quantised_bits and weight_noise need the whole model"):
        robustness.check_robustness(trainer, RobustnessArguments(quantised_bits=[8]))


def test_a_neutral_text_needs_do_eval(tmp_path):
    argv = ["--model_name_or_path", "none", "--train_file", "a.txt", "--neutral_file", "b.txt", "--do_train"]
    with pytest.raises(ValueError, match="neutral_file is used in the evaluation: set do_eval, or leave it out"):
        run_clm.prepare([*argv, "--output_dir", str(tmp_path / "out"), "--use_cpu"])
