"""What is installed, and what it takes with it: the wheel and the dependencies."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
CORE = {"accelerate", "numpy", "safetensors", "torch", "transformers"}

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, **kwargs) -> str:
    """What `command` printed; its error output is shown if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    for folder in ("hf_lsam", "recipes", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", str(tmp_path), str(source))
    [wheel] = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    modules = {f"hf_lsam/{path.name}" for path in (ROOT / "hf_lsam").iterdir() if path.suffix in (".py", ".typed")}
    assert {file for file in files if ".dist-info/" not in file} == modules
    assert "hf_lsam/py.typed" in modules
    assert any(file.endswith("licenses/LICENSE") for file in files)


def test_core_dependencies_are_few():
    assert {Requirement(text).name for text in PROJECT["dependencies"]} == CORE


def test_import_brings_the_core_dependencies_only():
    """Of what transformers' Trainer has not imported itself."""
    code = (
        "import sys; from transformers import Trainer; before = set(sys.modules); import hf_lsam; "
        "print(*{module.partition('.')[0] for module in set(sys.modules) - before})"
    )
    added = set(run(sys.executable, "-c", code, cwd=ROOT).split())
    assert "hf_lsam" in added
    assert added - sys.stdlib_module_names <= CORE | {"hf_lsam"}


def test_every_requirement_is_pinned_within_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    pins = {canonicalize_name(pin.name): pin for pin in pinned}
    wanted = [Requirement(text) for text in sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])]
    for requirement in wanted:
        if requirement.name != PROJECT["name"]:
            [pin] = pins[canonicalize_name(requirement.name)].specifier
            assert pin.operator == "=="
            assert pin.version in requirement.specifier, requirement
