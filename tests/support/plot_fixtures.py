"""A comparison by a recipe that trains nothing but logs what figures are drawn from."""

import json
from pathlib import Path

import pytest
import yaml
from tiny_compare import LOGGING_RECIPE, STAMP

from hf_lsam_recipes import compare
from hf_lsam_recipes.support.comparison import config as compare_config

METHODS = {
    "plain": {"kind": "none", "value": 1},
    "SAM": {"kind": "all", "value": 2},
    "_top $k^": {"kind": "top_k", "value": 3},
}


@pytest.fixture(scope="session")
def compared(tmp_path_factory) -> Path:
    """The output of that comparison: three methods with two seeds. Read-only."""
    root = tmp_path_factory.mktemp("compared")
    (root / "recipe.py").write_text(LOGGING_RECIPE)
    content = {
        "recipe": "recipe.py",
        "output_dir": str(root / "out"),
        "tasks": {"T 1": {"metric": "predict_accuracy"}},
        "methods": METHODS,
        "seeds": [0, 1],
        "processes": 2,
    }
    (root / "compare.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_config, "RECIPES", root)
        patch.setattr(compare, "make_stamp", lambda: STAMP)
        assert compare.main([str(root / "compare.yaml")]) == 0
    return root / "out"


@pytest.fixture
def changed(compared, tmp_path):
    """Copies that report, lets a function change each run of it, or leave it out, and returns the folder."""

    def change(function) -> Path:
        content = json.loads((compared / "results.json").read_text())
        content["runs"] = [run for run in content["runs"] if function(run) is not False]
        (tmp_path / "results.json").write_text(json.dumps(content))
        (tmp_path / "runs.csv").write_bytes((compared / "runs.csv").read_bytes())
        return tmp_path

    return change
