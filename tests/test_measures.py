"""What `run_glue.py` measures on demand, and that it changes nothing of the training."""

import json

import pytest
import run_glue
import torch
from measures import MeasureArguments, set_up_measures
from safetensors.torch import load_file
from tiny_glue import rte
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_lsam.sharpness_callback import block_surfaces, gradient_norms

pytest_plugins = ["glue_fixtures"]

MEASURED = ["--gradient_norm_steps", "2", "--landscape_points", "3", "--measured_samples", "6"]
BLOCKS = [f"bert.encoder.layer.{index}" for index in range(3)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory, bert, glue):
    """The folder of a measured training of 4 steps, and of the same one unmeasured."""
    root = tmp_path_factory.mktemp("measured")
    for name, more in (("measured", MEASURED), ("plain", [])):
        arguments = rte(bert, glue, root / name)
        run_glue.main([*arguments, "--do_train", "--max_steps", "4", "--save_strategy", "no", "--seed", "3", *more])
    return root


def test_measuring_changes_no_weight(measured):
    left, right = (load_file(measured / name / "model.safetensors") for name in ("measured", "plain"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not (measured / "plain" / "landscapes.json").exists()


def test_every_block_and_the_whole_model_have_norms_and_a_landscape(measured):
    history = json.loads((measured / "measured" / "trainer_state.json").read_text())["log_history"]
    lines = [line for line in history if "sharpness/seconds" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        norms = {name.rpartition("/")[2]: value for name, value in line.items() if "gradient_norm" in name}
        assert sorted(norms) == sorted([*BLOCKS, "all"])
        assert 0 < sum(norms[block] ** 2 for block in BLOCKS) < norms["all"] ** 2
        assert not any("sam" in name for name in line)
    landscapes = json.loads((measured / "measured" / "landscapes.json").read_text())
    assert [*landscapes] == [*BLOCKS, "all"]
    assert all(landscape["places"] == [-1.0, 0.0, 1.0] for landscape in landscapes.values())
    # Where the weights are, every landscape has the same loss.
    assert len({landscape["losses"][1] for landscape in landscapes.values()}) == 1


def test_norms_from_one_gradient_are_those_of_each_surface(measured, float64):
    folder = measured / "plain"
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
    trainer = run_glue.prepare([*rte(bert, glue, tmp_path / "out"), "--do_train"]).trainer
    assert getattr(trainer, plugin) is False
    setattr(trainer, plugin, True)
    set_up_measures(trainer, MeasureArguments())
    with pytest.raises(ValueError, match="need the whole model in each process, which FSDP and DeepSpeed share out"):
        set_up_measures(trainer, MeasureArguments(landscape_points=3))
