"""The language-model recipe, from its command line to what it leaves on disk, on a tiny model and tiny data."""

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import largest_difference, training_lines, weights
from tiny_clm import argv, questions_argv, save_model, write_questions, write_text
from tiny_glue import files_in, save_bert, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lsam_recipes import run_clm

RECIPES = Path(run_clm.__file__).parent
YAMLS = sorted((RECIPES / "clm").glob("*.yaml"))
HUB = ("dataset_name", "dataset_config_name", "validation_split")
FILES_OF_ONES_OWN = [part for name in HUB for part in (f"--{name}", "null")]
GENERATE = ["--max_generation_samples", "5", "--max_new_tokens", "3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> str:
    return write_questions(tmp_path_factory.mktemp("data") / "questions.jsonl")


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, model, questions) -> tuple[Path, dict]:
    """What a run on questions with LoRA and a checkpoint at each of two steps leaves, and its metrics. Read-only."""
    folder = tmp_path_factory.mktemp("lora") / "out"
    lora = ["--lora_r", "2", "--lora_dropout", "0.1", "--learning_rate", "0.05", "--save_steps", "1"]
    return folder, run_clm.main(questions_argv(model, folder, questions, *lora, *GENERATE))


def token_losses(model, examples) -> list[torch.Tensor]:
    """The losses of each example by itself, from its logits."""
    losses = []
    for row in examples:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logs = model.eval()(ids).logits[0].log_softmax(-1)
        losses.append(torch.stack([-logs[i - 1, label] for i, label in enumerate(labels) if label != -100]))
    return losses


# From the YAML to the model


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_yaml_runs_from_training_to_model_card(path, model, questions, tmp_path):
    settings = [*FILES_OF_ONES_OWN, "--block_size", "16", "--logging_steps", "1", "--perturb_start", "0"]
    if path.stem == "shakespeare":
        settings += ["--text_column", "null", "--train_file", write_text(tmp_path / "plays.txt")]
    else:
        settings += ["--train_file", questions, "--max_generation_samples", "4", "--max_new_tokens", "3"]
    out = tmp_path / "out"
    metrics = run_clm.main([str(path), *argv(model, out, *settings)])
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert metrics["eval_tokens"] > 0 and metrics["train_step_seconds"] > 0
    for result in ("train", "eval", "all"):
        assert json.loads((out / f"{result}_results.json").read_text()).keys() <= metrics.keys()
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert history[0]["lsam/active"] == 1
    AutoTokenizer.from_pretrained(out)
    assert isinstance(AutoModelForCausalLM.from_pretrained(out), torch.nn.Module)
    has_adapter = path.stem == "gsm8k_lora"
    assert (out / "adapter_model.safetensors").exists() == has_adapter
    assert (out / "model.safetensors").exists() != has_adapter
    assert ("eval_exact_match" in metrics) == has_adapter
    card = (out / "README.md").read_text()
    title = "A causal language adapter" if has_adapter else "A causal language model"
    assert f"# {title}, fine-tuned with layer-wise SAM" in card and "`run_clm.py`" in card
    assert "pipeline_tag: text-generation" in card


def test_model_card_names_the_data_set(model):
    subject = run_clm.describe(run_clm.DataArguments(dataset_name="openai/gsm8k", dataset_config_name="main"))
    assert (subject.data, subject.dataset) == ("openai/gsm8k main (Hub)", "openai/gsm8k")
    assert run_clm.describe(run_clm.DataArguments(train_file="a.txt")).dataset is None


# Losses


def test_perplexity_counts_every_token_the_same(model, questions, tmp_path):
    more = ["--do_train", "false", "--per_device_eval_batch_size", "5"]
    run = run_clm.prepare(questions_argv(model, tmp_path, questions, *more))
    metrics = run_clm.execute(run)
    losses = token_losses(AutoModelForCausalLM.from_pretrained(model), run.examples["validation"].dataset)
    mean = torch.cat(losses).mean().item()
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(mean, rel=1e-5)
    assert metrics["eval_tokens"] == sum(map(len, losses))
    by_row = torch.stack([loss.mean() for loss in losses]).mean().item()
    assert abs(by_row - mean) > 1e-3


def test_accumulation_changes_nothing(model, questions, tmp_path):
    """The mean is taken over the response tokens of a step, however its rows are split."""
    results = []
    for size, accumulation in ((8, 1), (2, 4)):
        split = ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(accumulation)]
        more = ["--optim", "sgd", "--learning_rate", "0.1", "--train_sampling_strategy", "sequential"]
        out = tmp_path / str(size)
        trainer = run_clm.prepare(questions_argv(model, out, questions, *split, *more, "--logging_steps", "1")).trainer
        trainer.model.double()
        trainer.train()
        results.append(([line["loss"] for line in training_lines(trainer)], weights(trainer.model)))
    (left_losses, left), (right_losses, right) = results
    # The Trainer adds losses up in float32.
    assert len(left_losses) == 2 and left_losses == pytest.approx(right_losses, rel=1e-6)
    assert largest_difference(left, right) < 1e-12


def test_rows_are_padded_to_their_batch_and_padding_is_not_learned(model, questions, tmp_path):
    run = run_clm.prepare(questions_argv(model, tmp_path, questions))
    tokenizer = run.trainer.processing_class
    # The padding token ends texts, too, and that is learned.
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 3
    for batch in run.trainer.get_train_dataloader():
        lengths = batch["attention_mask"].sum(1)
        assert lengths.max() == batch["input_ids"].shape[1]
        for ids, labels, length in zip(batch["input_ids"], batch["labels"], lengths, strict=True):
            assert (ids[length:] == 3).all() and (labels[length:] == -100).all()
            assert labels[length - 1] == 3


# Answers


def test_answers_of_a_padded_batch_are_those_given_alone(model, questions, tmp_path):
    """Each by a plain loop over the likeliest token."""
    more = ["--do_train", "false", "--max_generation_samples", "6", "--max_new_tokens", "4"]
    run = run_clm.prepare(questions_argv(model, tmp_path, questions, *more))
    run_clm.execute(run)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    expected = []
    for prompt in run.questions.ids:
        ids = list(prompt)
        while len(ids) < len(prompt) + 4 and (len(ids) == len(prompt) or ids[-1] != 3):
            with torch.no_grad():
                ids.append(int(plain(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    lines = [json.loads(line) for line in (tmp_path / run_clm.GENERATIONS).read_text().splitlines()]
    assert [line["generated"] for line in lines] == expected
    assert len({len(prompt) for prompt in run.questions.ids}) > 2 and len(set(expected)) > 1
    assert tokenizer.padding_side == run.trainer.processing_class.padding_side == "right"


def test_what_was_learned_is_answered_and_counted(model, tmp_path):
    """Three of four questions have the answer that the same words have in training."""
    learned = {"film good": "bad", "the a is": "dull", "bright": "film is", "dull dull": "a the"}
    train = write_rows(tmp_path / "train.csv", [{"question": q, "answer": a} for q, a in learned.items()])
    asked = learned | {"bright": "good"}
    dev = write_rows(tmp_path / "dev.csv", [{"question": q, "answer": a} for q, a in asked.items()])
    more = ["--validation_file", str(dev), "--max_steps", "40", "--learning_rate", "0.03", "--rho", "0.01"]
    more += ["--max_generation_samples", "4", "--max_new_tokens", "5", "--answer_pattern", "(?s).*"]
    metrics = run_clm.main(questions_argv(model, tmp_path / "out", str(train), *more))
    lines = [json.loads(line) for line in (tmp_path / "out" / run_clm.GENERATIONS).read_text().splitlines()]
    assert [line["generated"] for line in lines] == list(learned.values())
    assert [line["match"] for line in lines] == [True, True, False, True]
    assert (metrics["eval_exact_match"], metrics["eval_generation_samples"]) == (0.75, 4)


# The folder that a run leaves


def test_only_the_adapter_is_trained(model, questions, tmp_path):
    run = run_clm.prepare(questions_argv(model, tmp_path, questions, "--lora_r", "2"))
    assert isinstance(run.trainer.model, PeftModel)
    trained = [name for name, parameter in run.trainer.model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_an_adapter_is_evaluated_by_its_folder(lora_run, questions, tmp_path):
    folder, metrics = lora_run
    again = run_clm.main(questions_argv(str(folder), tmp_path, questions, "--do_train", "false", *GENERATE))
    assert again["eval_perplexity"] == pytest.approx(metrics["eval_perplexity"], rel=1e-5)
    assert files_in(tmp_path)[run_clm.GENERATIONS] == files_in(folder)[run_clm.GENERATIONS]
    with pytest.raises(ValueError, match="is an adapter.* To train, name its base model"):
        run_clm.main(questions_argv(str(folder), tmp_path / "out", questions))


def test_an_interrupted_run_resumes_to_the_same_adapter(lora_run, model, questions, tmp_path):
    folder, metrics = lora_run
    shutil.copytree(folder / "checkpoint-1", tmp_path / "checkpoint-1")
    more = ["--lora_r", "2", "--lora_dropout", "0.1", "--learning_rate", "0.05", "--save_steps", "1"]
    run = run_clm.prepare(questions_argv(model, tmp_path, questions, *more, "--resume_from_checkpoint", "true"))
    again = run_clm.execute(run)
    assert len(run.timer.seconds) == 1
    assert files_in(tmp_path)["adapter_model.safetensors"] == files_in(folder)["adapter_model.safetensors"]
    assert again["eval_perplexity"] == metrics["eval_perplexity"]


def test_nothing_is_written_over(lora_run, model, questions):
    before = files_in(lora_run[0])
    with pytest.raises(ValueError, match="already holds .*adapter_model.safetensors"):
        run_clm.main(questions_argv(model, lora_run[0], questions))
    assert files_in(lora_run[0]) == before


def test_two_launched_processes_evaluate_and_answer_as_one(lora_run, questions, tmp_path):
    folder, metrics = lora_run
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = questions_argv(str(folder), tmp_path, questions, "--do_train", "false", *GENERATE)
    env = os.environ | {"PYTHONPATH": str(RECIPES.parent), "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*launch, str(RECIPES / "run_clm.py"), *command], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    together = json.loads((tmp_path / "eval_results.json").read_text())
    for name in ("eval_perplexity", "eval_loss", "eval_tokens", "eval_exact_match"):
        assert together[name] == pytest.approx(metrics[name], rel=1e-5)
    assert files_in(tmp_path)[run_clm.GENERATIONS] == files_in(folder)[run_clm.GENERATIONS]


# Errors


@pytest.mark.parametrize(
    "settings, message",
    [
        (["--response_column", "reply"], "must have one column 'reply', but has question, answer"),
        (["--train_file", "./nowhere.txt"], "nowhere.txt is not a file"),
        (["--block_size", "65"], "block_size=65 is larger than the context of the model, 64 tokens"),
        (["--block_size", "2", "--template", "the film is {prompt} {response}"], "no example has a token to learn"),
        (["--block_pattern", "nothing"], "block_pattern"),
        (["--do_train", "false", "--do_eval", "false"], "does not predict: set do_train or do_eval only"),
        (["--do_predict"], "does not predict: set do_train or do_eval only"),
        (
            [*GENERATE, "--do_eval", "false"],
            "max_generation_samples generates answers to validation prompts: set do_eval",
        ),
        ([*GENERATE, "--answer_pattern", "yes|no"], "row 1: answer_pattern 'yes.no' finds no answer"),
        ([*GENERATE, "--max_new_tokens", "60"], "max_new_tokens=60 and a prompt of .* the context of the model, 64"),
        (["--model_name_or_path", "./nowhere"], "model_name_or_path=./nowhere cannot be loaded"),
    ],
)
def test_script_ends_with_one_message(model, questions, tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr(sys, "argv", ["run_clm.py", *questions_argv(model, tmp_path, questions, *settings)])
    with pytest.raises(SystemExit, match=f"^run_clm.py: error: .*{message}") as error:
        runpy.run_path(str(RECIPES / "run_clm.py"), run_name="__main__")
    assert len(str(error.value).splitlines()) == 1
    assert not files_in(tmp_path)


def test_a_model_that_sees_what_it_is_to_predict_is_refused(questions, tmp_path):
    with pytest.raises(ValueError, match="is not a causal language model: bert attends to the tokens"):
        run_clm.main(questions_argv(save_bert(tmp_path / "bert"), tmp_path / "out", questions))
