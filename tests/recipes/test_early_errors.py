"""What a recipe refuses before it trains, because it would go wrong late, or without a word."""

import logging
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny_clm import argv as clm_argv
from tiny_clm import questions_argv, save_model, write_text
from tiny_glue import QUICK, files_in, make_rows, rte, write_rows
from tiny_images import CLASSES, SMALL, save_vit, write_folder
from tiny_images import QUICK as QUICK_IMAGES
from transformers import AutoConfig, BertConfig, BertModel, T5Config, TrainingArguments, ViTConfig, ViTModel
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer import Trainer

from hf_lsam_recipes import run_clm, run_glue, run_glue_no_trainer, run_image_classification
from hf_lsam_recipes.support.loading import load_tokenizer
from hf_lsam_recipes.support.training import check_training

pytest_plugins = ["glue_fixtures"]

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def untrained(monkeypatch):
    """Fails if a step is taken."""

    def fail(*args, **kwargs):
        raise AssertionError("it trains")

    monkeypatch.setattr(Trainer, "train", fail)


# Tokenizers and processors


def without_tokenizer(model: str, folder: Path) -> str:
    shutil.copytree(model, folder)
    for name in TOKENIZER:
        (folder / name).unlink()
    return str(folder)


@pytest.mark.parametrize("recipe", [run_glue, run_glue_no_trainer])
def test_an_encoder_without_tokenizer_files(recipe, bert, glue, tmp_path, untrained):
    model = without_tokenizer(bert, tmp_path / "model")
    argv = [
        "--model_name_or_path",
        model,
        "--task_name",
        "rte",
        "--data_dir",
        glue,
        "--output_dir",
        str(tmp_path / "o"),
    ]
    message = (
        rf"tokenizer of model_name_or_path={model} has only special tokens.* save them with the model.*"
        rf": AutoTokenizer.from_pretrained\(ORIGINAL\).save_pretrained\('{model}'\)"
    )
    with pytest.raises(ValueError, match=message):
        recipe.main([*argv, "--do_train"])
    assert not (tmp_path / "o").exists()


def test_a_decoder_without_tokenizer_files(decoder, tmp_path, untrained):
    model = without_tokenizer(decoder, tmp_path / "model")
    text = ["--train_file", write_text(tmp_path / "a.txt"), "--block_size", "8", "--do_train"]
    with pytest.raises(ValueError, match=r"The tokenizer of model_name_or_path=.* tokenizer files are missing, save"):
        run_clm.main(clm_argv(model, tmp_path / "out", *text))


@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "t5", "gpt2", "qwen2", "deberta-v2", "mpnet", "modernbert", "xlnet"]
)
def test_families_of_models_without_tokenizer_files(kind, tmp_path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"The tokenizer of .* tokenizer files are missing, save them with"):
        load_tokenizer(str(tmp_path), False)


def test_tokenizers_that_need_no_files(tmp_path):
    AutoConfig.for_model("canine").save_pretrained(tmp_path / "canine")
    assert load_tokenizer(str(tmp_path / "canine"), False)("ab").input_ids[1:-1] == [97, 98]
    T5Config().save_pretrained(tmp_path / "byt5")
    (tmp_path / "byt5" / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert load_tokenizer(str(tmp_path / "byt5"), False)("ab").input_ids == [100, 101, 1]


def test_a_model_for_images_without_its_processor(images, tmp_path, untrained):
    model = save_vit(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    argv = ["--model_name_or_path", model, "--train_images", images, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(
        ValueError, match=r"image processor of model_name_or_path=.* AutoImageProcessor.from_pretrained"
    ):
        run_image_classification.main([*argv, *QUICK_IMAGES, "--do_train"])


# Heads that are not trained


@pytest.mark.parametrize("job", ["--do_eval", "--do_predict"])
def test_a_head_without_weights_is_not_evaluated(job, bert, glue, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(bert, folder)
    BertModel(BertConfig.from_pretrained(bert)).save_pretrained(folder)
    argv = rte(str(folder), glue, tmp_path / "out")
    message = rf"={folder} has no trained weights for classifier.bias, classifier.weight: .* random. Set do_train"
    with pytest.raises(ValueError, match=message):
        run_glue.main([*argv, job])
    assert not (tmp_path / "out").exists()
    assert "eval_accuracy" in run_glue.main([*argv, "--do_train", "--do_eval"])


def test_an_image_classifier_without_weights_is_not_evaluated(images, tmp_path):
    model = save_vit(tmp_path / "vit")
    names = dict(enumerate(CLASSES))
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    config = ViTConfig.from_pretrained(model, **labels)
    ViTModel(config, add_pooling_layer=False).save_pretrained(model)
    argv = ["--model_name_or_path", model, "--validation_images", images, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"has no trained weights for classifier.bias, classifier.weight"):
        run_image_classification.main([*argv, *QUICK_IMAGES, "--do_eval"])


# Training arguments


@pytest.mark.parametrize("metric", ["f1", "eval_f1", "acuracy"])
@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_metric_that_the_task_does_not_have(metric, strategy, bert, glue, tmp_path, untrained):
    argv = [*rte(bert, glue, tmp_path / "out"), "--do_train", "--do_eval", "--eval_strategy", strategy]
    near = r" Did you mean accuracy\?" if metric == "acuracy" else ""
    message = rf"^metric_for_best_model={metric} is not a metric of this evaluation\.{near} It has loss, accuracy, "
    with pytest.raises(ValueError, match=message + r"nll, brier, ece\.$"):
        run_glue.main([*argv, "--metric_for_best_model", metric])
    assert not (tmp_path / "out").exists()


def test_the_metrics_of_other_recipes(decoder, images, tmp_path, untrained):
    best = ["--do_train", "--metric_for_best_model", "f1"]
    with pytest.raises(ValueError, match=r"=f1 is not a metric .* It has loss, perplexity, tokens"):
        run_clm.main(clm_argv(decoder, tmp_path / "out", "--train_file", write_text(tmp_path / "a.txt"), *best))
    argv = [*SMALL, *QUICK_IMAGES, "--train_images", images, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"=f1 is not a metric .* It has loss, accuracy, nll, brier, ece\."):
        run_image_classification.main([*argv, *best])


def test_the_best_model_by_each_metric(bert, glue, tmp_path):
    """Those that are let through are those that the evaluation has."""
    for number, metric in enumerate(("loss", "accuracy", "eval_f1")):
        argv = [*rte(bert, glue, tmp_path / str(number)), "--task_name", "mrpc", "--do_train", "--do_eval"]
        argv += ["--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--load_best_model_at_end"]
        run = run_glue.prepare([*argv, "--metric_for_best_model", metric])
        run_glue.execute(run)
        assert run.trainer.state.best_metric is not None


def test_every_metric_of_a_language_model_is_known(decoder, tmp_path):
    argv = ["--train_file", write_text(tmp_path / "a.txt"), "--block_size", "8", "--do_train", "--do_eval"]
    run = run_clm.prepare(clm_argv(decoder, tmp_path / "out", *argv))
    found = {name.removeprefix("eval_") for name in run.trainer.evaluate()}
    assert {*run_clm.METRICS} == found - {
        "epoch",
        "model_preparation_time",
        "runtime",
        "samples_per_second",
        "steps_per_second",
    }


@pytest.mark.parametrize("name", sorted({*INTEGRATION_TO_CALLBACK} - {*get_available_reporting_integrations()}))
def test_a_tracker_that_is_not_installed(name, bert, glue, tmp_path, untrained):
    argv = [*rte(bert, glue, tmp_path / "out"), "--do_train", "--report_to", name]
    message = rf"^report_to={name} cannot be used here: .* pip install [a-z-]+, or set report_to to none, "
    with pytest.raises(ValueError, match=message + r"or to .*tensorboard.*, which can be used here\.$"):
        run_glue.main(argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", get_available_reporting_integrations())
def test_a_tracker_that_is_installed(name):
    check_training(TrainingArguments(report_to=name), ())


def test_a_tracker_that_is_unknown(bert, glue, tmp_path, untrained):
    argv = [*rte(bert, glue, tmp_path / "out"), "--do_train", "--report_to", "tensorbord"]
    with pytest.raises(ValueError, match=r"^report_to=tensorbord is unknown\. Did you mean tensorboard\? It may be"):
        run_glue.main(argv)


@pytest.mark.parametrize("recipe", [run_glue, run_clm, run_image_classification])
def test_no_output_dir(recipe, bert, decoder, glue, images, tmp_path, untrained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = {
        run_glue: ["--model_name_or_path", bert, "--task_name", "rte", "--data_dir", glue, *QUICK],
        run_clm: ["--model_name_or_path", decoder, "--train_file", write_text(tmp_path / "a.txt"), *QUICK],
        run_image_classification: [*SMALL, *QUICK_IMAGES, "--train_images", images],
    }[recipe]
    with pytest.raises(ValueError, match=r"^output_dir is not set: name a new folder for what the run writes"):
        recipe.main([*argv, "--do_train"])
    assert [*files_in(tmp_path)] == ["a.txt"]


def test_a_package_that_an_optimizer_needs_is_named_without_a_traceback(bert, glue, tmp_path, monkeypatch, capsys):
    argv = [
        *rte(bert, glue, tmp_path / "out"),
        "--do_train",
        "--optim",
        "galore_adamw",
        "--optim_target_modules",
        "all-linear",
    ]
    monkeypatch.setattr(sys, "argv", ["run_glue.py", *argv])
    with pytest.raises(SystemExit, match=r"^run_glue.py: error: .*galore_torch"):
        run_glue.script()


# Data


def test_data_dir_that_is_the_folder_of_the_task_itself(bert, glue, tmp_path):
    argv = [*rte(bert, f"{glue}/rte", tmp_path / "out"), "--do_train"]
    message = rf"data_dir={glue}/rte has no rte/.* which belong in a folder rte in it: set data_dir to {glue}\."
    with pytest.raises(ValueError, match=message):
        run_glue.main(argv)
    shutil.copytree(f"{glue}/rte", tmp_path / "mine")
    with pytest.raises(ValueError, match=rf"in it: move them to {tmp_path}/mine/rte\."):
        run_glue.main([*argv, "--data_dir", str(tmp_path / "mine")])


def messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "hf_lsam.recipes"]


@pytest.fixture
def caplog_of_recipes(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_lsam.recipes"), "propagate", True)
    return caplog


def test_empty_texts_are_counted(bert, tmp_path, caplog_of_recipes, monkeypatch):
    texts = ["good", "", " ", "bad", "", "", "\t", " ", "dull"]
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(texts)]
    file = str(write_rows(tmp_path / "train.csv", rows))
    argv = ["--model_name_or_path", bert, "--train_file", file, "--do_train", "--output_dir", str(tmp_path), *QUICK]
    assert len(run_glue.prepare(argv).datasets["train"]) == 9
    assert messages(caplog_of_recipes) == [
        f"{file}: column 'text' is empty in 6 of 9 rows (2, 3, 5, 6, 7, ...), which are used anyway. Remove them "
        "if they are not intended."
    ]
    # Once, however many processes read the file.
    caplog_of_recipes.clear()
    monkeypatch.setenv("RANK", "1")
    run_glue.load_text_data(run_glue.DataArguments(train_file=file), ["train"], {})
    assert not messages(caplog_of_recipes)


def test_a_column_without_any_text(tmp_path):
    rows = [row | {"sentence2": " "} for row in make_rows("rte", 4)]
    write_rows(tmp_path / "rte" / "train.jsonl", rows)
    with pytest.raises(ValueError, match=r"train.jsonl: column 'sentence2' is empty in every row. Check the file"):
        run_glue.load_text_data(run_glue.DataArguments(task_name="rte", data_dir=str(tmp_path)), ["train"], {})


def test_empty_responses_are_counted_but_not_the_empty_lines_of_running_text(decoder, tmp_path, caplog_of_recipes):
    rows = [{"question": "good", "answer": "bad"}, {"question": "good", "answer": ""}]
    file = str(write_rows(tmp_path / "train.jsonl", rows))
    run_clm.prepare(questions_argv(decoder, tmp_path / "out", file))
    assert re.search(r"train.jsonl: column 'answer' is empty in 1 of 2 rows \(2\)", messages(caplog_of_recipes)[0])
    caplog_of_recipes.clear()
    file = str(write_rows(tmp_path / "text.jsonl", [{"text": "good bad dull"}, {"text": ""}]))
    run_clm.prepare(
        clm_argv(decoder, tmp_path / "out", "--train_file", file, "--do_train", "--validation_fraction", "0")
    )
    assert not messages(caplog_of_recipes)


# Devices


def test_memory_is_pinned_where_there_is_an_accelerator(bert, glue, tmp_path, monkeypatch, recwarn):
    argv = [*rte(bert, glue, tmp_path / "out"), "--do_train", "--do_eval"]
    argv.remove("--use_cpu")
    if not torch.accelerator.is_available():
        run_glue.main(argv)
        assert not [warning for warning in recwarn if "pin_memory" in str(warning.message)]
        assert not run_glue.parse_arguments(run_glue.SETTINGS, argv, "")[-1].dataloader_pin_memory
    # The user's own choice stays.
    for value in ("true", "false"):
        own = [*argv, "--dataloader_pin_memory", value]
        assert run_glue.parse_arguments(run_glue.SETTINGS, own, "")[-1].dataloader_pin_memory is (value == "true")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert run_glue.parse_arguments(run_glue.SETTINGS, argv, "")[-1].dataloader_pin_memory
