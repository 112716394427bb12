"""Comparisons by the GLUE recipe: what runs of one seed have in common, and real runs."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from tiny_glue import write_task
from transformers import BertModel

from hf_lsam_recipes import compare, run_glue
from hf_lsam_recipes.support.comparison.config import read_comparison
from hf_lsam_recipes.support.comparison.plan import slug
from hf_lsam_recipes.support.settings import parse_arguments

pytest_plugins = ["glue_fixtures"]

RECIPES = Path(compare.__file__).parent
TINY = RECIPES / "compare" / "tiny.yaml"


@pytest.fixture(scope="module")
def rte_data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("rte")
    return write_task(folder, "rte", 40)


@pytest.fixture(scope="module")
def headless(bert, tmp_path_factory) -> str:
    """A model whose classifier is fresh in each run."""
    folder = tmp_path_factory.mktemp("headless")
    shutil.copytree(bert, folder, dirs_exist_ok=True)
    BertModel.from_pretrained(bert).save_pretrained(folder)
    return str(folder)


def test_every_yaml_is_one_that_the_recipe_accepts(tmp_path):
    files = sorted([*RECIPES.glob("compare/*.yaml"), *RECIPES.glob("studies/evidence/*.yaml")])
    assert len(files) >= 2
    for path in files:
        comparison = read_comparison(path, {}, {})
        settings = importlib.import_module(f"hf_lsam_recipes.{comparison.recipe.stem}").SETTINGS
        for run in [*comparison.tuning_runs(), *comparison.final_runs()]:
            own = {name: value for name, value in run.settings.items() if name != "recipe"}
            given = tmp_path / "settings.yaml"
            given.write_text(yaml.safe_dump(own))
            parse_arguments(settings, [str(given), "--output_dir", "out"], "")
        assert comparison.tuning_runs() or comparison.final_runs()


def test_runs_of_a_seed_begin_with_the_same_weights_and_see_the_same_data_in_the_same_order(
    headless, rte_data, tmp_path
):
    settings = {"model_name_or_path": headless, "data_dir": rte_data, "label_noise": "0.25", "train_fraction": "0.5"}
    seen = {}
    for run in read_comparison(TINY, {"seeds": ["0", "1"]}, settings).final_runs():
        path = tmp_path / f"{slug(run.name)}.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in run.settings.items() if name != "recipe"}))
        trainer = run_glue.prepare([str(path), "--output_dir", str(tmp_path / path.stem)]).trainer
        torch.manual_seed(run.seed)
        data = [[*batch["input_ids"].tolist(), batch["labels"].tolist()] for batch in trainer.get_train_dataloader()]
        weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
        seen[run.seed, run.method] = weights, data, sorted(trainer.train_dataset["label"])
    for seed in (0, 1):
        (weights, data, _), (others, other_data, _) = (seen[seed, method] for method in ("AdamW", "LSAM, top 2"))
        assert len(data) == 4 and data == other_data
        assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    first, second = seen[0, "AdamW"], seen[1, "AdamW"]
    assert not torch.equal(first[0]["classifier.weight"], second[0]["classifier.weight"])
    assert first[1] != second[1] and first[2] == second[2]


def test_comparison_of_real_runs(headless, rte_data, tmp_path):
    """Up to the first perturbed step, methods are the same, bit for bit: initial head, data, dropout and all."""
    command = [sys.executable, str(RECIPES / "compare.py"), str(TINY), "--output_dir", str(tmp_path / "out")]
    command += ["--set", f"model_name_or_path={headless}", f"data_dir={rte_data}"]
    environment = os.environ | {"PYTHONPATH": str(RECIPES.parent), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert "LSAM, top 2" in ended.stdout and "| LSAM, top 2 |" in (tmp_path / "out" / "report.md").read_text()
    plain, lsam = (
        json.loads((tmp_path / "out" / "rte" / name / "seed-0" / "result.json").read_text())
        for name in ("adamw", "lsam-top-2")
    )
    losses = [[line["loss"] for line in result["curve"] if "loss" in line] for result in (plain, lsam)]
    assert len(losses[0]) == 4
    # Steps 3 and 4 are perturbed: the loss of step 3 is that of the weights before it.
    assert losses[0][:3] == losses[1][:3] and losses[0][3] != losses[1][3]
    assert [row["perturbed"] for row in lsam["blocks"]] == [0, 0, 1, 1] and plain["blocks"] == []
    for result in (plain, lsam):
        assert {"predict_accuracy", "eval_accuracy"} <= result["metrics"].keys()
        assert result["versions"]["torch"] == version("torch") and result["commit"] and "CPU" in result["machine"]
        assert result["peak_memory_mib"] > 100 and result["step_seconds"] > 0
    assert lsam["flops"] > plain["flops"] > 0
    assert not [*(tmp_path / "out").rglob("*.safetensors")]


def test_comparing_needs_no_torch_itself():
    """The peak memory of a process counts that of the one that started it, up to the start."""
    code = "import sys, hf_lsam_recipes.compare; "
    code += "print([m for m in ('torch', 'matplotlib', 'scipy') if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout.strip() == "[]", ended.stderr
