"""On a GPU: precision, bitwise promises, memory, waits and compilation. Skipped where there is none."""

import itertools
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, Examples, arguments, assert_equal, bert, largest_difference, training_lines, weights
from tiny_glue import save_bert, write_task
from tiny_passes import distance, length, share_of_rounding
from tiny_precision import METHODS, Replays, Watch
from transformers import BertConfig, BertForSequenceClassification, Trainer, set_seed

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam_recipes import benchmark

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture
def deterministic():
    """Kernels that give the same bits at every run."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(kind, folder, settings, model=None, rows=64, **options):
    """A trainer of a tiny BERT, with eager attention, whose kernels can be deterministic."""
    extra = {} if kind is Trainer else dict(lsam_config=LSAMConfig(**settings))
    return kind(
        model=model if model is not None else bert(dropout=0.1, attn_implementation="eager"),
        args=arguments(folder, **{"use_cpu": DEVICE == "cpu", "logging_steps": 1, **options}),
        train_dataset=Examples(rows),
        **extra,
    )


def losses(trainer):
    return [line["loss"] for line in training_lines(trainer)]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("method", list(METHODS))
def test_autocast_trains(method, precision, tmp_path):
    options = dict(max_steps=24, learning_rate=1e-3, **{precision: True})
    trainer = make(LSAMTrainer, tmp_path, METHODS[method], **options)
    # Without dropout, and where the weights are: from 1.21 to between 1.08 and 1.15.
    before = trainer.evaluate(Examples(64))["eval_loss"]
    trainer.train()
    assert next(trainer.model.parameters()).device.type == DEVICE
    assert trainer.evaluate(Examples(64))["eval_loss"] < before - 0.04
    assert any(line.get("lsam/active", 0) > 0 for line in trainer.state.log_history)


@pytest.mark.parametrize("method", list(METHODS))
def test_fp16_steps_change_the_weights_unless_the_scale_fell(method, tmp_path):
    """A scale far too large at first overflows for a few steps; each of them only halves it."""
    trainer = make(LSAMTrainer, tmp_path, METHODS[method], max_steps=32, fp16=True)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**24)
    trainer.accelerator.scaler = scaler
    trainer.watch = Watch(trainer)
    trainer.add_callback(trainer.watch)
    trainer.train()
    scales, states = [2.0**24, *trainer.watch.scales], trainer.watch.weights
    fell = [after < before for before, after in itertools.pairwise(scales)]
    for was_skipped, (before, after) in zip(fell, itertools.pairwise(states), strict=True):
        assert was_skipped == all(torch.equal(before[name].cpu(), after[name].cpu()) for name in before)
    assert any(fell) and not fell[-1]
    assert all(bool(tensor.isfinite().all()) for tensor in states[-1].values())
    norms = [line["lsam/grad_norm"] for line in trainer.state.log_history if "lsam/grad_norm" in line]
    assert norms and max(norms) < 1000


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("precision", [{}, dict(bf16=True)])
def test_replay_is_exact_with_dropout(precision, tmp_path):
    results = []
    for replays in (True, False):
        settings = dict(rho=0.2, block_selection="last", num_perturbed_blocks=1)
        trainer = make(LSAMTrainer, tmp_path, settings, max_steps=5, **precision)
        trainer.add_callback(Replays(trainer, replays))
        trainer.train()
        assert trainer._lsam.second_pass.replays == replays
        results.append(weights(trainer.model))
    assert_equal(*results)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("precision", [{}, dict(bf16=True)])
def test_off_is_the_plain_trainer_and_perturbed_runs_draw_the_same_numbers(precision, tmp_path):
    results, states = [], []
    for kind, settings in ((Trainer, {}), (LSAMTrainer, dict(rho=0.0)), (LSAMTrainer, dict(rho=0.2))):
        trainer = make(kind, tmp_path, settings, max_steps=5, **precision)
        trainer.train()
        results.append(weights(trainer.model))
        states.append(torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state())
    assert_equal(results[0], results[1])
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])
    assert largest_difference(results[0], results[2]) > 0


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", list(METHODS))
def test_float64_is_that_of_the_cpu(method, tmp_path):
    results = []
    for use_cpu in (True, DEVICE == "cpu"):
        trainer = make(LSAMTrainer, tmp_path, METHODS[method], bert(), max_steps=5, use_cpu=use_cpu, optim="sgd")
        trainer.train()
        results.append({name: tensor.cpu() for name, tensor in weights(trainer.model).items()})
    assert largest_difference(*results) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["top 2", "adaptive", "looksam", "one pass"])
def test_models_of_16_bits_train(method, dtype, tmp_path):
    trainer = make(LSAMTrainer, tmp_path, METHODS[method], bert().to(dtype), learning_rate=1e-3)
    trainer.train()
    assert all(bool(tensor.isfinite().all()) for tensor in weights(trainer.model).values())
    assert sum(line.get("lsam/active", 0) for line in trainer.state.log_history) > 0


def test_two_of_twelve_blocks_take_little_more_memory(tmp_path):
    peaks = []
    size = dict(hidden_size=256, intermediate_size=1024, num_attention_heads=4, num_hidden_layers=12)
    for kind in (Trainer, LSAMTrainer):
        set_seed(0)
        model = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=3, **size))
        options = dict(per_device_train_batch_size=64, max_steps=4)
        trainer = make(kind, tmp_path, dict(rho=0.2, block_selection="last"), model, rows=256, **options)
        trainer.train_dataset = Examples(256, length=64)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        peaks.append(torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 1)
        del trainer, model
    assert peaks[1] <= 1.1 * peaks[0]


@pytest.mark.parametrize(("method", "waits_of_its_own"), [("top 2", 1), ("all", 1), ("last 2", 0), ("one pass", 1)])
def test_a_step_waits_for_the_device_where_it_selects_by_norms(method, waits_of_its_own, tmp_path):
    """
    A model may wait within its forward pass, so the waits of a plain step count for each pass.

    SAM waits at its end, to see whether the gradients for which it let go of pass 1's are finite.
    """
    most = []
    for kind in (Trainer, LSAMTrainer):
        trainer = make(kind, tmp_path, METHODS[method], max_steps=5, logging_steps=100)
        waits, inner = [], trainer.training_step

        def counted(*args, inner=inner, waits=waits):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if DEVICE == "cuda":
                    torch.cuda.set_sync_debug_mode("warn")
                try:
                    return inner(*args)
                finally:
                    if DEVICE == "cuda":
                        torch.cuda.set_sync_debug_mode("default")
                    waits.append(sum("synchronizing" in str(warning.message) for warning in caught))

        trainer.training_step = counted
        trainer.train()
        # The first step also checks replay, and fills caches.
        most.append(max(waits[2:]))
    passes = 1 if method == "one pass" else 2
    assert most[1] <= passes * most[0] + waits_of_its_own


def test_torch_compile_steps_as_eager(tmp_path):
    """Without dropout, whose numbers are others when it is compiled; and in the first step, since rounding adds up."""
    states = []
    for compiled in (True, False):
        model = bert(attn_implementation="eager")
        options = dict(max_steps=6, optim="sgd", max_grad_norm=0.0, torch_compile=compiled)
        trainer = make(LSAMTrainer, tmp_path, METHODS["top 2"], model, **options)
        watch = Watch(trainer)
        trainer.add_callback(watch)
        try:
            trainer.train()
        except NotImplementedError as error:
            pytest.skip(str(error))
        assert len(losses(trainer)) == 6 and all(map(math.isfinite, losses(trainer)))
        states.append([{name: tensor.cpu() for name, tensor in state.items()} for state in watch.weights[:2]])
    (start, one), (_, other) = states
    # Of the two passes, and of the weights themselves.
    rounding = 2 * share_of_rounding(model, torch.float32) * distance(one, start)
    rounding += torch.finfo(torch.float32).eps * length(start)
    assert distance(one, start) > 1000 * rounding
    assert distance(one, other) <= rounding


def test_the_benchmark_measures_time_and_memory_of_the_device():
    size = ["--num_hidden_layers", "4", "--hidden_size", "128", "--batch_size", "4", "--sequence_length", "16"]
    size += ["--rounds", "1", "--steps", "1", "--bf16", "true"]
    figures = benchmark.main([*size, "--methods", "plain,sam,pasted-sam"])
    assert all(row["seconds"] > 0 for row in figures.values())
    # Weights and gradients of the embedding alone take more.
    assert all(60 < row["memory_mib"] < 1000 for row in figures.values())
    assert figures["sam"]["memory_ratio"] > 1


@pytest.mark.skipif(DEVICE == "cpu", reason="Accelerate trains in float32 there")
@pytest.mark.parametrize("name", ["fp16", "multi_gpu", "fsdp2"])
def test_the_recipe_trains_under_launch(name, tmp_path):
    """With one process, as there may be one device only."""
    root = Path(benchmark.__file__).parents[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    # Any port that is free: tests may run beside each other.
    command += ["--main_process_port", "0"]
    command += ["--config_file", str(root / "accelerate_configs" / f"{name}.yaml")]
    command += ["--fsdp_transformer_layer_cls_to_wrap", "BertLayer"] if name == "fsdp2" else []
    command += [str(root / "recipes" / "run_glue.py"), str(root / "recipes" / "glue" / "rte.yaml")]
    command += ["--model_name_or_path", save_bert(tmp_path / "bert"), "--data_dir", write_task(tmp_path, "rte")]
    command += ["--max_steps", "6", "--logging_steps", "1", "--perturb_start", "0", "--rho", "0.1"]
    command += ["--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    lines = [line for line in lines if "loss" in line]
    assert len(lines) == 6 and all(math.isfinite(line["loss"]) for line in lines)
    # A scale that is too large at first skips a step or two.
    assert sum(line["lsam/active"] for line in lines) >= (3 if name == "fp16" else 6)
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_loss"] > 0
