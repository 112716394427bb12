"""The GLUE recipe, from its command line to what it leaves on disk, on a tiny model and tiny data."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import largest_difference, training_lines, weights
from tiny_glue import QUICK, files_in, make_rows, rte, save_bert, save_tokenizer, write_rows
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from hf_lsam_recipes import run_glue
from hf_lsam_recipes.support.text.glue_metric import METRICS
from hf_lsam_recipes.support.text.glue_tasks import GLUE_TASKS, DataArguments

pytest_plugins = ["glue_fixtures"]

RECIPES = Path(run_glue.__file__).parent
YAMLS = sorted(path for path in (RECIPES / "glue").glob("*.yaml") if "_lora" not in path.stem)


def read_predictions(path: Path) -> list[str]:
    """The predictions of a submission, whose form is checked."""
    header, *lines = path.read_text().splitlines()
    assert header == "index\tprediction"
    rows = [line.split("\t") for line in lines]
    assert [row[0] for row in rows] == [str(index) for index in range(len(rows))]
    return [row[1] for row in rows]


@pytest.mark.parametrize("task", ["cola", "stsb"])
def test_accumulation_changes_nothing(task, glue, tmp_path):
    """The mean is taken over the rows of a step, however they are split: in the logged loss and in the weights."""
    bert = save_bert(tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    results = []
    for size, accumulation in ((8, 1), (2, 4)):
        data = ["--task_name", task, "--data_dir", glue, "--output_dir", str(tmp_path / str(size)), "--do_train"]
        data += ["--model_name_or_path", bert, *QUICK, "--logging_steps", "1", "--learning_rate", "1e-3"]
        split = ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(accumulation)]
        # The key's bias has a gradient of nothing but rounding, which Adam would blow up.
        more = ["--optim", "sgd", "--train_sampling_strategy", "sequential"]
        trainer = run_glue.prepare([*data, *split, *more]).trainer
        trainer.model.double()
        trainer.train()
        results.append(([line["loss"] for line in training_lines(trainer)], weights(trainer.model)))
    (left_losses, left), (right_losses, right) = results
    # The Trainer adds losses up in float32.
    assert len(left_losses) == 2 and left_losses == pytest.approx(right_losses, rel=1e-6)
    assert largest_difference(left, right) < 1e-12


# Tasks


def test_every_task_has_a_yaml():
    assert {path.stem for path in YAMLS} == set(GLUE_TASKS)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_yaml_runs_from_training_to_submission(path, bert, glue, tmp_path):
    argv = [str(path), "--model_name_or_path", bert, "--data_dir", glue, "--output_dir", str(tmp_path), *QUICK]
    metrics = run_glue.main([*argv, "--do_predict", "--rho", "0.1"])
    task = path.stem
    prefixes = ["eval", "eval_mm"] if task == "mnli" else ["eval"]
    for key in [f"{prefix}_{name}" for prefix in prefixes for name in (*METRICS[task], "samples")]:
        assert key in metrics
    for result in ("train", "eval", "all"):
        saved = json.loads((tmp_path / f"{result}_results.json").read_text())
        assert saved.keys() <= metrics.keys()
    assert metrics["train_step_seconds"] > 0
    assert metrics["train_peak_memory_mib"] > 10
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path).config
    AutoTokenizer.from_pretrained(tmp_path)
    spec = GLUE_TASKS[task]
    if spec.labels:
        assert config.id2label == dict(enumerate(spec.labels))
        assert config.label2id == {name: number for number, name in enumerate(spec.labels)}
    else:
        assert (config.num_labels, config.problem_type) == (1, "regression")
    assert {file.name for file in tmp_path.glob("*.tsv")} == set(spec.submissions)
    for name in spec.submissions:
        predictions = read_predictions(tmp_path / name)
        assert len(predictions) == 8
        if spec.labels is None:
            assert all(0 <= float(value) <= 5 for value in predictions)
        else:
            assert set(predictions) <= set(spec.labels if spec.submits_names else "012"[: len(spec.labels)])


# Models


def test_seed_decides_the_head(bert, glue, tmp_path):
    def head(seed: str, *more: str) -> torch.Tensor:
        argv = [*rte(bert, glue, tmp_path / "out"), "--do_train", "--seed", seed, *more]
        return run_glue.prepare(argv).trainer.model.classifier.weight

    # The head of the saved model would be loaded, were it not for another number of labels.
    mnli = ["--task_name", "mnli"]
    assert torch.equal(head("1", *mnli), head("1", *mnli, "--block_selection", "none", "--max_train_samples", "9"))
    assert not torch.equal(head("1", *mnli), head("2", *mnli))


def test_seed_and_settings_decide_the_weights(bert, glue, tmp_path, trained):
    run_glue.main([*rte(bert, glue, tmp_path / "out"), "--do_train"])
    assert files_in(tmp_path / "out")["model.safetensors"] == files_in(trained)["model.safetensors"]
    run_glue.main([*rte(bert, glue, tmp_path / "plain"), "--do_train", "--block_selection", "none"])
    assert files_in(tmp_path / "plain")["model.safetensors"] != files_in(trained)["model.safetensors"]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_decoder_without_padding_token(name, glue, tmp_path):
    folder, classifier = tmp_path / "model", tmp_path / "classifier"
    if name == "gpt2":
        config = GPT2Config(vocab_size=16, n_embd=16, n_layer=2, n_head=2, n_positions=32)
        GPT2Model(config).save_pretrained(folder)
        GPT2ForSequenceClassification(config).save_pretrained(classifier)
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=16, pad_token_id=0, **sizes)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        LlamaForSequenceClassification(config).save_pretrained(classifier)
    for path in (folder, classifier):
        save_tokenizer(path, with_padding=False)
    # What is evaluated without being trained pads in the same way.
    run_glue.main([*rte(str(classifier), glue, tmp_path / "untrained"), "--do_eval"])
    metrics = run_glue.main([*rte(str(folder), glue, tmp_path / "out"), "--do_train", "--do_eval"])
    assert math.isfinite(metrics["train_loss"]) and math.isfinite(metrics["eval_loss"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.pad_token == "[SEP]"
    assert model.config.pad_token_id == tokenizer.pad_token_id == 3
    assert model.dtype == torch.float32


def test_head_of_another_task_is_replaced(glue, tmp_path):
    model = save_bert(tmp_path / "model", num_labels=5)
    run_glue.main([*rte(model, glue, tmp_path / "out"), "--do_train"])
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 2


def test_model_of_another_task_is_not_evaluated(glue, tmp_path):
    swapped = {"id2label": {0: "not_entailment", 1: "entailment"}, "label2id": {"not_entailment": 0, "entailment": 1}}
    for settings in ({"num_labels": 5}, swapped):
        model = save_bert(tmp_path / "model", **settings)
        with pytest.raises(ValueError, match=r"The model predicts .* but the data of rte needs entailment, not_ent"):
            run_glue.main([*rte(model, glue, tmp_path / "out"), "--do_eval"])


def test_remote_code_is_not_run(glue, tmp_path):
    folder = tmp_path / "model"
    save_tokenizer(folder)
    trace = tmp_path / "ran"
    (folder / "foreign.py").write_text(f"open({str(trace)!r}, 'w')\nclass Config: pass\n")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.Config"}})
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        run_glue.main([*rte(str(folder), glue, tmp_path / "out"), "--do_train"])
    assert not trace.exists()


def test_texts_are_truncated_and_padded_to_their_batch(bert, glue, tmp_path):
    trainer = run_glue.prepare([*rte(bert, glue, tmp_path), "--do_train", "--max_seq_length", "9"]).trainer
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert max(lengths) == 9 and min(lengths) < 9
    shapes = {tuple(batch["input_ids"].shape) for batch in trainer.get_train_dataloader()}
    assert {rows for rows, _ in shapes} == {4} and max(length for _, length in shapes) == 9
    # The tokenizer's own limit holds, too.
    write_rows(tmp_path / "rte" / "train.tsv", [row | {"sentence1": "film " * 99} for row in make_rows("rte", 4)])
    argv = [*rte(bert, str(tmp_path), tmp_path / "out"), "--do_train", "--max_seq_length", "999"]
    assert {len(ids) for ids in run_glue.prepare(argv).trainer.train_dataset["input_ids"]} == {32}


# Data of one's own


def test_classes_of_ones_own(bert, tmp_path):
    def file(name: str, labels: str) -> str:
        rows = [{"review": f"the film {number}", "stars": label} for number, label in enumerate(labels)]
        return str(write_rows(tmp_path / name, rows))

    model = ["--model_name_or_path", bert, "--output_dir", str(tmp_path / "out"), *QUICK]
    columns = ["--text_column", "review", "--label_column", "stars"]
    files = ["--train_file", file("train.csv", "5135" * 4), "--validation_file", file("dev.tsv", "135")]
    test = ["--test_file", file("test.jsonl", "11115")]
    metrics = run_glue.main([*model, *columns, *files, *test, "--do_train", "--do_eval", "--do_predict"])
    assert {"eval_accuracy", "eval_macro_f1"} <= metrics.keys()
    predictions = read_predictions(tmp_path / "out" / "predictions.tsv")
    assert len(predictions) == 5 and set(predictions) <= {"1", "3", "5"}

    # The folder knows its labels, so that it predicts the same without the training file.
    again = ["--model_name_or_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "again"), *QUICK]
    run_glue.main([*again, *columns, *test, "--do_predict"])
    assert read_predictions(tmp_path / "again" / "predictions.tsv") == predictions


def test_numbers_of_ones_own(bert, tmp_path):
    rows = [row | {"label": 100 * row["label"]} for row in make_rows("stsb", 16)]
    file = str(write_rows(tmp_path / "data.parquet", rows))
    argv = ["--model_name_or_path", bert, "--output_dir", str(tmp_path / "out"), *QUICK, "--regression"]
    argv += ["--text_column", "sentence1", "--text_pair_column", "sentence2", "--train_file", file]
    metrics = run_glue.main([*argv, "--validation_file", file, "--do_train", "--do_eval"])
    assert {"eval_pearson", "eval_spearmanr"} <= metrics.keys()
    assert metrics["eval_loss"] > 1000


# Predictions


@pytest.mark.parametrize(
    "settings, labels, logits, expected",
    [
        ({"task_name": "cola"}, ("unacceptable", "acceptable"), [[2, 1], [0, 1]], ["0", "1"]),
        ({"task_name": "qnli"}, ("entailment", "not_entailment"), [[2, 1], [0, 1]], ["entailment", "not_entailment"]),
        ({"task_name": "mnli"}, GLUE_TASKS["mnli"].labels, [[0, 0, 1], [0, 2, 1]], ["contradiction", "neutral"]),
        ({"task_name": "stsb"}, None, [[-0.1], [2.34567], [5.2]], ["0.000", "2.346", "5.000"]),
        ({"test_file": "t.csv", "regression": True}, None, [[-0.1], [7]], ["-0.100", "7.000"]),
        ({"test_file": "t.csv"}, ("cat", "dog"), [[2, 1], [0, 1]], ["cat", "dog"]),
    ],
)
def test_form_of_predictions(tmp_path, settings, labels, logits, expected):
    run_glue.write_predictions(tmp_path / "p.tsv", np.array(logits, dtype=float), DataArguments(**settings), labels)
    assert read_predictions(tmp_path / "p.tsv") == expected


def test_predictions_are_those_of_the_saved_model(bert, glue, tmp_path):
    argv = [*rte(bert, glue, tmp_path), "--do_train", "--do_predict", "--learning_rate", "0.1"]
    run_glue.main([*argv, "--block_selection", "none"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    lines = (Path(glue) / "rte" / "test.tsv").read_text().splitlines()[1:]
    with torch.no_grad():
        outputs = [model(**tokenizer(*line.split("\t"), return_tensors="pt")).logits for line in lines]
    names = [GLUE_TASKS["rte"].labels[int(logits.argmax())] for logits in outputs]
    assert read_predictions(tmp_path / "RTE.tsv") == names


# Errors


def test_nothing_to_do(bert, glue, tmp_path):
    with pytest.raises(ValueError, match="Nothing to do: set do_train, do_eval or do_predict"):
        run_glue.main(rte(bert, glue, tmp_path))


@pytest.mark.parametrize(
    "settings, message",
    [
        (["--task_name", "RTE"], r"task_name must be one of cola"),
        (["--data_dir", "nowhere"], r"No train data: data_dir=nowhere has no rte/"),
        (["--rho", "-1"], r"rho is the length"),
        (["--block_pattern", "nothing"], r"block_pattern"),
        (["--model_name_or_path", "./nowhere"], r"model_name_or_path=./nowhere cannot be loaded: .*"),
    ],
)
def test_script_ends_with_one_message(bert, glue, tmp_path, monkeypatch, settings, message):
    argv = [*rte(bert, glue, tmp_path / "out"), "--do_train", *settings]
    monkeypatch.setattr(sys, "argv", ["run_glue.py", *argv])
    with pytest.raises(SystemExit, match=rf"^run_glue.py: error: .*{message}") as error:
        runpy.run_path(str(RECIPES / "run_glue.py"), run_name="__main__")
    assert len(str(error.value).splitlines()) == 1
    assert not files_in(tmp_path)


def test_exit_status(tmp_path):
    command = [sys.executable, str(RECIPES / "run_glue.py"), "--model_name_or_path", "m", "--task_name", "glue"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(RECIPES.parent), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("run_glue.py: error: task_name must be one of cola")
    assert not files_in(tmp_path)
