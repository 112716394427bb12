"""What the tests of comparisons share; a test file asks for it with `pytest_plugins`."""

from pathlib import Path

import pytest
import yaml
from tiny_compare import RECIPE, STAMP

from hf_lsam_recipes import compare
from hf_lsam_recipes.support.comparison import config as compare_config


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes the YAML of a comparison by that recipe, two methods on one task, and returns its path."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    monkeypatch.setattr(compare_config, "RECIPES", tmp_path)
    monkeypatch.setattr(compare, "make_stamp", lambda: STAMP)

    def write(**changes) -> Path:
        content = {
            "recipe": "recipe.py",
            "output_dir": str(tmp_path / "out"),
            "tasks": {"T": {"metric": "predict_accuracy", "tuning_metric": "eval_accuracy"}},
            "methods": {"A": {"value": 1}, "B": {"value": 3}},
            "seeds": [0, 1],
            "processes": 2,
        }
        path = tmp_path / "compare.yaml"
        path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
        return path

    return write
