"""The workflow of the continuous integration: what the Makefile runs, at each point of the version matrix."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
# As text: to YAML 1.1, the key `on` is true.
WORKFLOW = yaml.load((ROOT / ".github" / "workflows" / "tests.yml").read_text(), Loader=yaml.BaseLoader)
[JOB] = WORKFLOW["jobs"].values()
MATRIX = {point["versions"]: point for point in JOB["strategy"]["matrix"]["include"]}


def test_the_matrix_has_the_three_points_of_the_makefile():
    assert {name: point["target"] for name, point in MATRIX.items()} == {
        "oldest": "test-oldest",
        "pinned": "test",
        "newest": "test-newest",
    }
    makefile = (ROOT / "Makefile").read_text()
    # The kernels are those of the machine, not versions.
    targets = set(re.findall(r"^(test[\w-]*):", makefile, re.MULTILINE)) - {"test-kernels"}
    assert targets == {point["target"] for point in MATRIX.values()}
    assert {"push", "pull_request"} <= WORKFLOW["on"].keys()
    assert JOB["strategy"]["fail-fast"] == "false"


def test_each_python_of_the_matrix_is_one_that_is_promised():
    project = (ROOT / "pyproject.toml").read_text()
    [required] = re.findall(r'^requires-python = "(.+)"$', project, re.MULTILINE)
    promised = re.findall(r'"Programming Language :: Python :: (\d\.\d+)"', project)
    assert MATRIX["oldest"]["python"] == required.removeprefix(">=")
    assert MATRIX["newest"]["python"] == max(promised, key=lambda version: int(version.partition(".")[2]))
    for point in MATRIX.values():
        assert point["python"] in SpecifierSet(required) and point["python"] in promised


@pytest.mark.parametrize("name", ["oldest", "pinned", "newest"])
def test_make_takes_the_python_that_the_workflow_set_up(name):
    *_, step = JOB["steps"]
    assert step["run"] == 'make "$TARGET"' and step["env"]["TARGET"] == "${{ matrix.target }}"
    pythons = {key: value for key, value in step["env"].items() if key != "TARGET"}
    assert {*pythons.values()} == {"${{ steps.python.outputs.python-path }}"}
    command = ["make", "--dry-run", "--always-make", MATRIX[name]["target"]]
    # What the make that runs these tests was told on its command line would go before its environment.
    outer = {"MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS"}
    environment = {key: value for key, value in os.environ.items() if key not in outer}
    environment |= dict.fromkeys(pythons, "/set/up/python")
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert "'/set/up/python' -m venv" in printed.stdout, printed.stderr
