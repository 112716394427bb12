"""What the recipes measure on demand, and that it changes nothing of the training."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_clm import questions_argv, save_model, write_questions
from tiny_glue import rte
from tiny_images import QUICK, SMALL, write_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_lsam_recipes import run_clm, run_glue, run_image_classification
from hf_lsam_recipes.support.measures import MeasureArguments, set_up_measures
from hf_lsam_recipes.support.sharpness_callback import SharpnessCallback, block_surfaces, gradient_norms

pytest_plugins = ["glue_fixtures"]

MEASURED = ["--gradient_norm_steps", "2", "--landscape_points", "3", "--measured_samples", "6"]
FOUR_STEPS = ["--max_steps", "4", "--save_strategy", "no", "--seed", "3"]
BLOCKS = {
    "glue": [f"bert.encoder.layer.{index}" for index in range(3)],
    "clm": [f"base_model.model.model.layers.{index}" for index in range(2)],
    "images": [f"blocks.{index}" for index in range(3)],
}
WEIGHTS = {"glue": "model.safetensors", "clm": "adapter_model.safetensors", "images": "model.safetensors"}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    """Settings of a small network, and images to train it on."""
    folder = write_folder(tmp_path_factory.mktemp("images") / "train", 8)
    return [*SMALL, *QUICK, "--train_images", folder, "--do_train"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory, bert, glue, images):
    """For each recipe the folder of a measured training of 4 steps, and of the same one unmeasured."""
    root = tmp_path_factory.mktemp("measured")
    llama, questions = save_model(root / "llama"), write_questions(root / "questions.jsonl")
    for name, more in (("measured", MEASURED), ("plain", [])):
        more = [*FOUR_STEPS, *more]
        run_glue.main([*rte(bert, glue, root / "glue" / name), "--do_train", *more])
        run_clm.main(questions_argv(llama, root / "clm" / name, questions, "--lora_r", "2", *more))
        output = ["--output_dir", str(root / "images" / name), "--optim", "sgd", "--learning_rate", "0.05"]
        run_image_classification.main([*images, *output, *more])
    return root


@pytest.mark.parametrize("recipe", BLOCKS)
def test_measuring_changes_no_weight(measured, recipe):
    left, right = (load_file(measured / recipe / name / WEIGHTS[recipe]) for name in ("measured", "plain"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not (measured / recipe / "plain" / "landscapes.json").exists()


@pytest.mark.parametrize("recipe", BLOCKS)
def test_every_block_and_the_whole_model_have_norms_and_a_landscape(measured, recipe):
    folder, blocks = measured / recipe / "measured", BLOCKS[recipe]
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    lines = [line for line in history if "sharpness/seconds" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        norms = {name.rpartition("/")[2]: value for name, value in line.items() if "gradient_norm" in name}
        assert sorted(norms) == sorted([*blocks, "all"])
        # The head is outside of the blocks, but LoRA has nothing there.
        inside = sum(norms[block] ** 2 for block in blocks) / norms["all"] ** 2
        assert inside == pytest.approx(1, abs=1e-5) if recipe == "clm" else 0 < inside < 0.999
        assert not any("sam" in name for name in line)
    landscapes = json.loads((folder / "landscapes.json").read_text())
    assert [*landscapes] == [*blocks, "all"]
    assert all(landscape["places"] == [-1.0, 0.0, 1.0] for landscape in landscapes.values())
    # Where the weights are, every landscape has the same loss.
    assert len({landscape["losses"][1] for landscape in landscapes.values()}) == 1


def test_images_are_measured_as_they_are(images, tmp_path):
    seen = []
    for more in ([], ["--crop_padding", "0", "--horizontal_flip", "false"]):
        arguments = [*images, "--output_dir", str(tmp_path / "out"), "--seed", str(len(seen)), *more]
        trainer = run_image_classification.prepare([*arguments, "--gradient_norm_steps", "1"]).trainer
        callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SharpnessCallback))
        whole = torch.cat([batch["pixel_values"] for batch in callback.batches])
        seen.append((whole, torch.stack([row["pixel_values"] for row in trainer.train_dataset])))
    (left, augmented), (right, plain) = seen
    assert len(left) == 24 and torch.equal(left, right) and not torch.equal(augmented, plain)


def test_landscapes_of_images_are_measured_where_their_norms_are(images, tmp_path):
    measures = ["--gradient_norm_steps", "1", "--landscape_points", "3"]
    run = run_image_classification.prepare([*images, "--output_dir", str(tmp_path / "out"), *FOUR_STEPS, *measures])
    run_image_classification.execute(run)
    callback = next(c for c in run.trainer.callback_handler.callbacks if isinstance(c, SharpnessCallback))
    surfaces = block_surfaces(run.trainer.model, callback.batches)
    landscapes = json.loads((tmp_path / "out" / "landscapes.json").read_text())
    assert landscapes["all"]["losses"][1] == pytest.approx(surfaces["all"].loss(), rel=1e-6)


def test_norms_from_one_gradient_are_those_of_each_surface(measured, float64):
    folder = measured / "glue" / "plain"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
    tokens = AutoTokenizer.from_pretrained(folder)(["good film", "bad"], padding=True, return_tensors="pt")
    surfaces = block_surfaces(model, [{**tokens, "labels": torch.tensor([0, 1])}])
    norms = gradient_norms(surfaces)
    assert all(norms[name] == pytest.approx(surface.gradient_norm(), rel=1e-12) for name, surface in surfaces.items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--do_train", "--gradient_norm_steps", "0"], "gradient_norm_steps must be at least 1, but is 0"),
        (["--do_train", "--landscape_points", "1"], "landscape_points must be at least 2, but is 1"),
        (["--do_eval", "--landscape_points", "5"], "measure on training rows: set do_train"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(tmp_path, bert, glue, more, message):
    with pytest.raises(ValueError, match=message):
        run_glue.prepare([*rte(bert, glue, tmp_path / "out"), *more])


@pytest.mark.parametrize("plugin", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_model_that_is_shared_out_is_refused(tmp_path, bert, glue, plugin):
    run = run_glue.prepare([*rte(bert, glue, tmp_path / "out"), "--do_train"])
    trainer, rows = run.trainer, run.datasets["train"]
    assert getattr(trainer, plugin) is False
    setattr(trainer, plugin, True)
    set_up_measures(trainer, MeasureArguments(), rows)
    with pytest.raises(ValueError, match="need the whole model in each process, but FSDP and DeepSpeed shard"):
        set_up_measures(trainer, MeasureArguments(landscape_points=3), rows)
