"""What an installation brings with it: the dependencies of the library and of each extra, and their pins."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest
import tomli
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CORE = {"accelerate", "numpy", "safetensors", "torch", "transformers"}
# Requirements that are run, or that the Trainer imports by name, and no file here.
TOOLS = {"mypy", "pre-commit", "pytest-xdist", "ruff", "setuptools", "trackio"}
TOOLS |= {"mkdocs", "mkdocs-material", "mkdocstrings-python"}

PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_core_dependencies_are_few():
    assert {Requirement(text).name for text in PROJECT["dependencies"]} == CORE


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 cannot tell which package many modules are of")
@pytest.mark.parametrize("extra", ["demo", "recipes", "test"])
def test_an_extra_holds_what_is_imported_and_nothing_else(extra):
    """What a script imports directly is required directly."""
    scripts = {"demo": reached_from(ROOT / "recipes" / "demo.py")}
    scripts["recipes"] = {*(ROOT / "recipes").rglob("*.py")}
    scripts["test"] = {*scripts["recipes"], *(ROOT / "tests").rglob("*.py")}
    wanted = requirements(extra) - CORE - {"hf-lsam"}
    distributions = importlib.metadata.packages_distributions()
    imported = {canonicalize_name(distributions[name][0]) for path in scripts[extra] for name in foreign(path)}
    assert imported - CORE - {"hf-lsam"} == wanted - TOOLS


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


def requirements(extra: str) -> set[str]:
    """Names of what an extra asks for, by way of other extras as well."""
    names = set()
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        names.add(canonicalize_name(requirement.name))
        for other in requirement.extras:
            names |= requirements(other)
    return names


def imports(path: Path) -> set[str]:
    """Names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            # What is imported from a package may be a module of it.
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def foreign(path: Path) -> set[str]:
    """The top-level packages that a file imports and that are neither Python's nor files of this repository."""
    own = {file.stem for file in (ROOT / "tests").rglob("*.py")} | {"hf_lsam", "hf_lsam_recipes"}
    return {name.partition(".")[0] for name in imports(path)} - own - sys.stdlib_module_names


def reached_from(script: Path) -> set[Path]:
    """A script of the recipes, those that it runs, and all files that they import."""
    reached, waiting = set(), [script, ROOT / "recipes" / "run_glue.py"]
    while waiting:
        path = waiting.pop()
        if path.is_file() and path not in reached:
            reached.add(path)
            names = [name.replace("hf_lsam_recipes", "recipes", 1) for name in imports(path)]
            waiting += [ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in names]
    return reached
