"""The model card: what it says, and that no setting can break out of its place."""

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import model_card
import pytest
import run_glue
import yaml
from glue_tasks import DataArguments
from tiny_glue import rte
from transformers import TrainingArguments

from hf_lsam import LSAMConfig

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
