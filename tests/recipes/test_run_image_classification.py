"""The recipe for images, from its command line to what it leaves on disk, on tiny models and generated images."""

import dataclasses
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cards import tables_of
from tiny import largest_difference, weights
from tiny_glue import files_in
from tiny_images import CLASSES, QUICK, SMALL, save_vit, write_folder, write_hub
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from hf_lsam import LSAMConfig
from hf_lsam.blocks import find_blocks, find_candidates
from hf_lsam_recipes import run_image_classification as recipe
from hf_lsam_recipes.support.images.data import DataArguments, load_image_data
from hf_lsam_recipes.support.images.examples import read_image
from hf_lsam_recipes.support.images.resnets import CifarResNet, WideResNet
from hf_lsam_recipes.support.settings import parse_arguments

RECIPES = Path(recipe.__file__).parent
YAMLS = sorted((RECIPES / "images").glob("*.yaml"))
KINDS = (recipe.ModelArguments, DataArguments, LSAMConfig, TrainingArguments)
# What the YAMLs call the columns, what splits their data has, and what makes their models tiny.
SHAPES = {
    "cifar10_resnet20": (("img", "label"), ("train", "test"), ["--depth", "8"]),
    "cifar100_wrn28": (("img", "fine_label"), ("train", "test"), ["--depth", "10", "--widen_factor", "1"]),
    "flowers102_wrn16": (
        ("image", "label"),
        ("train", "validation", "test"),
        ["--depth", "10", "--widen_factor", "1", "--image_size", "8", "--per_device_train_batch_size", "4"],
    ),
    "vit": (("image", "labels"), ("train", "validation", "test"), []),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`load_dataset` leaves nothing in the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    """Settings that name images to train, evaluate and predict on."""
    folder = tmp_path_factory.mktemp("images")
    splits = {"train": 8, "validation": 4, "test": 4}
    paths = [(name, write_folder(folder / name, count, seed)) for seed, (name, count) in enumerate(splits.items())]
    return [text for name, path in paths for text in (f"--{name}_images", path)]


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> str:
    return save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images) -> Path:
    """What a run of two epochs of six steps with a checkpoint at each fourth step leaves. Read-only."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    recipe.main([*small(images, folder), "--do_eval", "--do_predict"])
    return folder


def small(images: list[str], output: Path) -> list[str]:
    schedule = ["--max_steps", "12", "--save_steps", "4", "--learning_rate", "0.05", "--rho", "0.1"]
    optimizer = ["--optim", "sgd", "--optim_args", "momentum=0.9", "--logging_steps", "1"]
    return [*SMALL, *QUICK, *images, *schedule, *optimizer, "--output_dir", str(output), "--do_train"]


# Settings


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_yaml_holds_only_what_differs_from_the_defaults(path):
    parsed = parse_arguments(KINDS, [str(path)], "")
    for name in yaml.safe_load(path.read_text()):
        [settings] = [settings for settings in parsed if hasattr(settings, name)]
        default = next(item.default for item in dataclasses.fields(settings) if item.name == name)
        assert getattr(settings, name) != default, name


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_yaml_runs_from_training_to_predictions(path, vit, tmp_path):
    (image, label), splits, tiny = SHAPES[path.stem]
    hub = write_hub(tmp_path / "hub", image, label, splits, count=30)
    model = ["--model_name_or_path", vit] if path.stem == "vit" else []
    argv = [str(path), "--dataset_name", hub, "--output_dir", str(tmp_path / "out"), *QUICK[:-2], *tiny, *model]
    metrics = recipe.main([*argv, "--max_steps", "2"])
    assert {"train_loss", "eval_accuracy", "test_accuracy", "train_step_seconds"} <= metrics.keys()
    for name in ("train", "eval", "test", "all"):
        saved = json.loads((tmp_path / "out" / f"{name}_results.json").read_text())
        assert saved.keys() <= metrics.keys()
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "out").config
    assert config.id2label == dict(enumerate(CLASSES))
    header, *lines = (tmp_path / "out" / "predictions.tsv").read_text().splitlines()
    assert header == "image\tprediction" and len(lines) == 30
    assert all(re.fullmatch(r"row \d+\t(blue|green|red)", line) for line in lines)


@pytest.mark.parametrize("path", YAMLS[:3], ids=lambda path: path.stem)
def test_yaml_is_the_network_of_the_paper(path):
    """At full size: ResNet-20 and WRN-28 with 4 perturbed convolutions, WRN-16 with 2; SGD with momentum."""
    model_args, _, lsam, args = parse_arguments(KINDS, [str(path)], "")
    config = model_args.new_config()
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    widths = {"cifar10_resnet20": (20, None, 4), "cifar100_wrn28": (28, 10, 4), "flowers102_wrn16": (16, 8, 2)}
    assert type(model) is (CifarResNet if path.stem == "cifar10_resnet20" else WideResNet)
    found = (config.depth, getattr(config, "widen_factor", None), lsam.num_perturbed_blocks)
    assert found == widths[path.stem]
    candidates = find_candidates(model, find_blocks(model), lsam.block_pattern)
    assert {c.name for c in candidates} == {n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    assert kind is torch.optim.SGD and settings["momentum"] == 0.9 and args.weight_decay == 5e-4


def test_settings_of_the_model_that_make_no_sense():
    for settings, message in (
        ({}, "Set exactly one of model_name_or_path, .*, and architecture"),
        ({"architecture": "resnet", "model_name_or_path": "x"}, "set the other to null"),
        ({"architecture": "vgg"}, "architecture must be one of resnet, wide_resnet"),
        ({"architecture": "resnet", "image_size": 0}, "image_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.ModelArguments(**settings)


# Training


def test_a_small_network_learns_the_colours(trained):
    results = json.loads((trained / "all_results.json").read_text())
    assert results["eval_accuracy"] >= 0.9 and results["test_accuracy"] >= 0.9
    assert (results["train_samples"], results["eval_samples"], results["test_samples"]) == (24, 12, 12)
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    assert [line["lsam/active"] for line in history if "loss" in line] == [1.0] * 12


def test_seed_and_settings_decide_the_weights(trained, images, tmp_path):
    for name, more, same in (
        ("again", ["--dataloader_num_workers", "1", "--dataloader_persistent_workers"], True),
        ("plain", ["--block_selection", "none"], False),
        ("unflipped", ["--horizontal_flip", "false"], False),
        ("seed", ["--data_seed", "7"], False),
    ):
        recipe.main([*small(images, tmp_path / name), *more])
        file = "model.safetensors"
        assert (files_in(tmp_path / name)[file] == files_in(trained)[file]) is same, name


@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_equals_the_uninterrupted_one(step, trained, images, tmp_path):
    """From within the first epoch, and from within the second."""
    checkpoint = ["--resume_from_checkpoint", str(trained / f"checkpoint-{step}")]
    recipe.main([*small(images, tmp_path / "out"), *checkpoint])
    for file in ("model.safetensors", "checkpoint-12/optimizer.pt"):
        assert files_in(tmp_path / "out")[file] == files_in(trained)[file]


def test_images_change_from_epoch_to_epoch_but_not_where_they_are_evaluated(images, tmp_path):
    argv = [*small(images, tmp_path), "--do_eval", "--train_sampling_strategy", "sequential"]
    run = recipe.prepare([*argv, "--block_selection", "none"])
    seen = []
    run.trainer.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    run.trainer.train()
    first, second = torch.cat(seen[:6]), torch.cat(seen[6:])
    assert first.shape == second.shape == (24, 3, 8, 8)
    changed = [not torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    assert sum(changed) > 12
    plain = run.examples["validation"][5]["pixel_values"]
    data = run.data.splits["validation"]
    expected = np.asarray(read_image(data[5]["image"])).transpose(2, 0, 1) / 255
    expected = (expected - np.array(run.data.mean)[:, None, None]) / np.array(run.data.std)[:, None, None]
    assert np.allclose(plain.numpy(), expected, atol=1e-5)


def test_pretrained_model_is_fine_tuned_with_a_new_head(vit, images, tmp_path):
    argv = [*small(images, tmp_path / "out")[len(SMALL) :], "--model_name_or_path", vit, "--max_steps", "2"]
    recipe.main([*argv, "--save_strategy", "no"])
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == dict(enumerate(CLASSES)) and model.dtype == torch.float32
    start = weights(AutoModelForImageClassification.from_pretrained(vit).base_model)
    assert 0 < largest_difference(weights(model.base_model), start) < 0.2
    assert AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil").image_mean == (0.5, 0.5, 0.5)


def test_a_trained_model_is_evaluated_by_its_folder(trained, images, tmp_path):
    model = ["--model_name_or_path", str(trained), "--output_dir", str(tmp_path / "out"), *QUICK]
    metrics = recipe.main([*model, *images[2:], "--do_eval", "--do_predict"])
    before = json.loads((trained / "all_results.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    assert files_in(tmp_path / "out")["predictions.tsv"] == files_in(trained)["predictions.tsv"]
    lines = (tmp_path / "out" / "predictions.tsv").read_text().splitlines()
    assert lines[1].startswith("blue/0.png\t") and len(lines) == 13


def test_predictions_are_those_of_the_saved_model(trained, images):
    model = AutoModelForImageClassification.from_pretrained(trained).eval()
    processor = AutoImageProcessor.from_pretrained(trained, backend="pil")
    test = load_image_data(DataArguments(test_images=images[5]), ["test"], model.config.label2id).splits["test"]
    lines = ["image\tprediction"]
    for row in test:
        with torch.no_grad():
            logits = model(**processor(read_image(row["image"]), return_tensors="pt")).logits
        lines.append(f"{row['name']}\t{model.config.id2label[int(logits.argmax())]}")
    assert (trained / "predictions.tsv").read_text().splitlines() == lines


def test_model_card_tells_how_it_was_trained(trained):
    card = (trained / "README.md").read_text()
    assert "# An image classification model, trained with layer-wise SAM" in card
    assert "Trained by the recipe `run_image_classification.py`" in card
    training, lsam, results = tables_of(card)
    assert (training["model"], training["optim"], training["optim_args"]) == ("ResNet-8", "sgd", "momentum=0.9")
    assert lsam == dataclasses.asdict(LSAMConfig(rho=0.1)) and results["test_accuracy"] >= 0.9
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["pipeline_tag"] == "image-classification"
    assert "base_model" not in header and "datasets" not in header


def test_model_card_names_model_and_data_of_the_hub(tmp_path):
    subject = recipe.describe(recipe.ModelArguments("google/vit"), DataArguments(dataset_name="uoft-cs/cifar10"))
    assert (subject.data, subject.dataset, subject.from_scratch) == ("uoft-cs/cifar10 (Hub)", "uoft-cs/cifar10", False)
    wide = recipe.ModelArguments(architecture="wide_resnet", depth=16, widen_factor=8).new_config()
    assert recipe.describe_architecture(wide) == "WRN-16-8"


# Errors


@pytest.mark.parametrize(
    "settings, message",
    [
        (["--train_images", "nowhere"], r"train_images=nowhere is neither"),
        (["--depth", "9"], r"depth must be 6n \+ 2"),
        (["--rho", "-1"], r"rho is the length"),
        (["--architecture", "null", "--model_name_or_path", "./nowhere"], r"model_name_or_path=./nowhere cannot be"),
        (["--do_train", "false", "--do_eval"], r"A model from scratch has random weights: set do_train"),
        (["--do_train", "false"], r"Nothing to do: set do_train"),
        (["--block_pattern", "conv1"], r"block_pattern 'conv1' matches no module"),
    ],
)
def test_script_ends_with_one_message_and_writes_nothing(images, tmp_path, monkeypatch, settings, message):
    argv = [*small(images, tmp_path / "out"), *settings]
    monkeypatch.setattr(sys, "argv", ["run_image_classification.py", *argv])
    with pytest.raises(SystemExit, match=rf"^run_image_classification.py: error: .*{message}") as error:
        runpy.run_path(str(RECIPES / "run_image_classification.py"), run_name="__main__")
    assert len(str(error.value).splitlines()) == 1
    assert not files_in(tmp_path)


def test_nothing_is_written_over(trained, images):
    before = files_in(trained)
    with pytest.raises(ValueError, match=r"already holds .*predictions.tsv.*resume_from_checkpoint=true"):
        recipe.main([*small(images, trained), "--do_predict"])
    with pytest.raises(ValueError, match=r"already holds predictions.tsv, test_results.json"):
        recipe.main([*images, "--model_name_or_path", str(trained), "--do_predict", "--output_dir", str(trained)])
    assert files_in(trained) == before


def test_the_model_card_names_the_configuration_of_a_data_set():
    data_args = recipe.DataArguments(dataset_name="some/images", dataset_config_name="fine")
    subject = recipe.describe(recipe.ModelArguments(architecture="resnet"), data_args)
    assert (subject.data, subject.dataset) == ("some/images fine (Hub)", "some/images")
