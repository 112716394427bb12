"""The GLUE recipe without a Trainer, on a tiny model and tiny data."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_launch import environment, free_port, launch
from tiny import assert_equal, largest_difference
from tiny_glue import files_in, save_bert
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_lsam_recipes import run_glue_no_trainer
from hf_lsam_recipes.support.text.glue_metric import METRICS

pytest_plugins = ["glue_fixtures"]

RECIPES = Path(run_glue_no_trainer.__file__).parent


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def settings(model: str, glue: str, output: Path, *more: str) -> list[str]:
    """RTE as its YAML has it, on the tiny model and data: 2 epochs of 2 steps of 2 micro-batches of 4 rows."""
    paths = ["--model_name_or_path", model, "--data_dir", glue, "--output_dir", str(output)]
    sizes = ["--num_train_epochs", "2", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    every_step = ["--block_selection", "last", "--perturb_interval", "1", "--perturb_start", "0", "--rho", "0.1"]
    return [str(RECIPES / "glue" / "rte.yaml"), *paths, *sizes, *every_step, *more]


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", ["rte", "mnli", "stsb"])
def test_from_training_to_metrics(task, bert, glue, tmp_path):
    argv = settings(bert, glue, tmp_path, "--logging_steps", "1", "--task_name", task)
    metrics = run_glue_no_trainer.main(argv)
    prefixes = ["eval", "eval_mm"] if task == "mnli" else ["eval"]
    assert metrics.keys() == {"epoch", *(f"{prefix}_{name}" for prefix in prefixes for name in METRICS[task])}
    assert str(json.loads((tmp_path / "all_results.json").read_text())) == str(metrics)
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3, 4]
    assert all(line["lsam/active"] == 1 and line["lsam/skipped"] == 0 for line in lines if "step" in line)
    assert [line["epoch"] for line in lines if "epoch" in line] == [1, 2]
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert largest_difference(trained.state_dict(), load_file(tmp_path / "epoch_1" / "model.safetensors")) > 0
    AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("every, steps", [("0.75", [2, 3, 4]), ("3", [2, 3, 4]), ("0.2", [1, 2, 3, 4])])
def test_steps_between_lines_of_the_log_or_their_share(every, steps, bert, glue, tmp_path):
    """The end of an epoch, after 2 and 4 steps, is always one."""
    run_glue_no_trainer.main(settings(bert, glue, tmp_path, "--logging_steps", every))
    assert [line["step"] for line in log_of(tmp_path) if "step" in line] == steps


def test_a_resumed_run_is_the_uninterrupted_one(bert, glue, tmp_path, monkeypatch):
    looksam = ["--block_selection", "all", "--perturb_interval", "3", "--reuse_correction", "0.7"]
    metrics = run_glue_no_trainer.main(settings(bert, glue, tmp_path / "whole", *looksam))
    argv = settings(bert, glue, tmp_path / "part", *looksam)
    evaluate = run_glue_no_trainer.evaluate
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(run_glue_no_trainer, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_glue_no_trainer.main(argv)
    assert run_glue_no_trainer.main([*argv, "--resume_from_checkpoint", "true"]) == metrics
    whole, part = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert_equal(whole, part)
    assert log_of(tmp_path / "whole")[-2] == log_of(tmp_path / "part")[-2]


def test_settings_decide_the_weights(bert, glue, tmp_path):
    results = {}
    for name, more in (("lsam", []), ("again", []), ("plain", ["--block_selection", "none"]), ("off", ["--rho", "0"])):
        run_glue_no_trainer.main(settings(bert, glue, tmp_path / name, *more))
        results[name] = load_file(tmp_path / name / "model.safetensors")
    assert_equal(results["lsam"], results["again"])
    assert_equal(results["plain"], results["off"])
    assert largest_difference(results["lsam"], results["plain"]) > 0


@pytest.mark.parametrize(
    "more, message",
    [
        (["--do_eval", "false"], "This script always trains and evaluates: leave out"),
        (["--resume_from_checkpoint", "true"], "has no checkpoint of an epoch: leave out resume_from_checkpoint"),
        (["--fp16", "true"], "Unknown setting '--fp16'"),
        (["--rho", "-1"], "rho is the length"),
    ],
)
def test_script_ends_with_one_message(more, message, bert, glue, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_glue_no_trainer.py", *settings(bert, glue, tmp_path / "out", *more)])
    with pytest.raises(SystemExit, match=message) as error:
        runpy.run_path(str(RECIPES / "run_glue_no_trainer.py"), run_name="__main__")
    assert len(str(error.value).splitlines()) == 1
    assert not files_in(tmp_path)


def test_another_run_is_not_written_over(bert, glue, tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(
        ValueError, match="contains another run: set output_dir to a new folder, or set resume_from_checkpoint"
    ):
        run_glue_no_trainer.main(settings(bert, glue, tmp_path))


def test_two_processes_train_as_one_on_batches_twice_as_large(glue, tmp_path):
    model = save_bert(tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    results = []
    for name, size in (("cpu", "4"), ("multi_cpu", "2")):
        argv = settings(model, glue, tmp_path / name, "--per_device_train_batch_size", size, "--logging_steps", "1")
        command = [*launch(name, "--main_process_port", free_port()), str(RECIPES / "run_glue_no_trainer.py"), *argv]
        env = environment(tmp_path / "home")
        del env["ACCELERATE_USE_CPU"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        assert result.returncode == 0, result.stderr[-3000:]
        assert os.path.exists(tmp_path / name / "epoch_2" / "lsam_state.safetensors")
        results.append((log_of(tmp_path / name), load_file(tmp_path / name / "model.safetensors")))
    (one, _), (two, weights) = results
    assert len(one) == len(two) == 6
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        assert left.get("loss") == pytest.approx(right.get("loss"), abs=1e-4)
    assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())
