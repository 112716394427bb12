"""The model card: what it says, and that no setting can break out of its place."""

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tiny_glue import rte
from transformers import TrainingArguments

from hf_lsam import LSAMConfig
from hf_lsam_recipes import run_clm, run_glue, run_image_classification
from hf_lsam_recipes.support import model_card
from hf_lsam_recipes.support.model_card import Subject
from hf_lsam_recipes.support.text.glue_tasks import DataArguments

pytest_plugins = ["glue_fixtures"]


def test_model_card(bert, glue, tmp_path):
    hostile = "```\n# <script>|{x}`*|.*"
    argv = [*rte(bert, glue, tmp_path), "--do_train", "--do_eval", "--perturb_start", "0.9", "--rho", "0.25"]
    metrics = run_glue.main([*argv, "--block_pattern", hostile + r"|bert\.encoder\.layer\.\d"])
    card = (tmp_path / "README.md").read_text()
    assert "2503.14205" in card and "Sunwoo Lee" in card and "fine-tuned with layer-wise SAM" in card
    training, lsam, results = map(json.loads, re.findall(r"^```json\n(.*?)\n```$", card, re.MULTILINE | re.DOTALL))
    expected = LSAMConfig(rho=0.25, perturb_start=0.9, block_pattern=hostile + r"|bert\.encoder\.layer\.\d")
    assert lsam == dataclasses.asdict(expected)
    assert (training["data"], training["seed"], training["model"]) == ("GLUE rte (local files)", 42, Path(bert).name)
    assert results["eval_accuracy"] == pytest.approx(metrics["eval_accuracy"], abs=1e-5)
    assert hostile not in card
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["library_name"] == "transformers"
    assert "base_model" not in header and "datasets" not in header


def test_model_card_of_plain_training(bert, glue, tmp_path):
    run_glue.main([*rte(bert, glue, tmp_path), "--do_train", "--block_selection", "none"])
    assert "fine-tuned without perturbation (layer-wise SAM is off)" in (tmp_path / "README.md").read_text()


def test_model_card_is_pushed_with_the_model(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        model_card.ModelCard, "push_to_hub", lambda card, repo, token: pushed.append((repo, card.content))
    )
    args = TrainingArguments(str(tmp_path), use_cpu=True, push_to_hub=True)
    trainer = SimpleNamespace(args=args, lsam_config=LSAMConfig(), hub_model_id="me/mine")
    subject = run_glue.describe(DataArguments(task_name="stsb"))
    model_card.write_model_card(trainer, "google-bert/bert-base-cased", subject, {"a": math.nan})
    content = (tmp_path / "README.md").read_text()
    assert pushed == [("me/mine", content)]
    header = yaml.safe_load(content.split("---\n")[1])
    assert (header["base_model"], header["datasets"]) == ("google-bert/bert-base-cased", "nyu-mll/glue")


HOSTILE = "x\n---\nlicense: mit\n---\n# Title `y` | ![](http://example.com/x.png) <img src=x>\n```\n{z}"


def test_fields_of_a_model_card_stay_in_their_place(tmp_path):
    plain, hostile = (card(tmp_path, name, text) for name, text in (("plain", "x"), ("hostile", HOSTILE)))
    header, body = hostile.removeprefix("---\n").split("\n---\n", 1)
    names = yaml.safe_load(header)
    assert names["base_model"] == names["datasets"] == HOSTILE
    assert names.keys() == yaml.safe_load(plain.removeprefix("---\n").split("\n---\n", 1)[0]).keys()
    assert outline(body) == outline(plain.removeprefix("---\n").split("\n---\n", 1)[1])
    training, lsam, metrics = map(json.loads, re.findall(r"^```json\n(.*?)\n```$", body, re.MULTILINE | re.DOTALL))
    assert training["data"] == training["adapter"]["lora_target_modules"] == HOSTILE
    assert lsam["block_pattern"] == re.escape(HOSTILE)
    assert metrics == {HOSTILE: None} | {"a": 1.0}


def card(folder: Path, name: str, text: str) -> str:
    """The card of a model, whose every free field is `text`."""
    args = TrainingArguments(str(folder / name), use_cpu=True)
    Path(args.output_dir).mkdir()
    config = LSAMConfig(block_pattern=re.escape(text))
    subject = Subject("run.py", "text classification", "text-classification", text, text)
    trainer = SimpleNamespace(args=args, lsam_config=config)
    metrics = {text: None, "a": 1.0}
    model_card.write_model_card(trainer, text, subject, metrics, {"lora_target_modules": text})
    return (Path(args.output_dir) / "README.md").read_text()


def outline(body: str) -> list[str]:
    """Headings and fences: what the form of a page consists of."""
    return [line for line in body.splitlines() if line.startswith(("#", "```", "---", "|", "!", "<"))]


def test_a_local_data_set_is_not_named_in_the_card(tmp_path):
    for describe in (
        lambda name: run_clm.describe(run_clm.DataArguments(dataset_name=name)),
        lambda name: run_image_classification.describe(
            run_image_classification.ModelArguments("a/b"), run_image_classification.DataArguments(dataset_name=name)
        ),
    ):
        assert describe("someone/data").dataset == "someone/data"
        subject = describe(str(tmp_path))
        assert subject.dataset is None and str(tmp_path) not in subject.data
