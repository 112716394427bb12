"""What the documents name is there: files, functions, tests and links; and every public name is documented."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_lsam
from hf_lsam.step_log import Perturbed, StepLog

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/*.md")])
# Paths of this repository, as the documents write them.
PATH = re.compile(r"`((?:hf_lsam|recipes|tests|docs|accelerate_configs)/[\w./-]+)(?:::([\w.]+))?`")


def defined_in(path: Path) -> set[str]:
    """Functions and classes of a file, methods as `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    for path, name in PATH.findall(text):
        assert (ROOT / path).exists(), path
        assert not name or name in defined_in(ROOT / path), f"{path}::{name}"
    for link in re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link


def test_every_line_of_the_equations_names_code_and_a_test():
    lines = (ROOT / "docs" / "equations.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and "| in the code |" not in line]
    assert len(rows) == 18 + 12
    for *_, code, test in rows:
        assert re.match(r"`(hf_lsam|recipes)/(support/)?\w+\.py", code), code
        assert re.match(r"`tests/\w+/test_\w+\.py::test_\w+`", test), test


def test_every_setting_and_figure_is_on_the_page_of_settings():
    page = (ROOT / "docs" / "settings.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1] for line in page.splitlines() if line[:3] == "| `"}
    documented = {}
    for names, values in rows.items():
        documented |= zip(re.findall(r"`([\w/]+)`", names), values.split(", "), strict=False)
    for field in dataclasses.fields(hf_lsam.LSAMConfig):
        assert documented[field.name] == str(field.default), field.name
    figures = set(re.findall(r"^- `(lsam/\w+)`", inspect.getdoc(hf_lsam.LSAMMixin), re.MULTILINE))
    assert figures == {name for name in documented if name.startswith("lsam/")}
    log = StepLog(["a"], ["a"])
    log.add(Perturbed(torch.tensor(True), [0], torch.ones(1), [1], 0.1, 0, 0.5))
    assert log.line().keys() == figures


def test_every_test_file_of_the_table_of_features_is_there():
    text = (ROOT / "docs" / "features.md").read_text()
    assert text.count("| feature |") == 1
    table = text.split("| feature |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) > 30
    for row in table:
        assert re.search(r"`tests/\w+/test_\w+\.py`", row), row


def build_site(source: Path, site: Path) -> subprocess.CompletedProcess:
    """What `make docs` runs, in the tree `source`."""
    pytest.importorskip("mkdocs", reason="the oldest versions are tested without the documentation site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, capture_output=True, text=True, cwd=source)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build_site(ROOT, folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_make_docs_builds_a_page_of_each_file(site):
    assert "-m mkdocs build --strict\n" in (ROOT / "Makefile").read_text()
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert pages | {"404.html"} == {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert not (site / "hooks.py").exists()


def test_a_page_of_the_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?([^\"'\s>]+)", page.read_text()
        )
        assert len(loaded) > 3 and [name for name in loaded if re.match(r"(\w+:)?//", name)] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?(https?:)?//", style.read_text()), style


def test_the_page_of_the_api_holds_every_public_name_and_argument(site):
    page = (site / "api.html").read_text()
    measuring = importlib.import_module("hf_lsam_recipes.support.sharpness")
    names = [f"hf_lsam.{name}" for name in hf_lsam.__all__]
    names += [f"{measuring.__name__}.{own.__name__}" for own in public(measuring)]
    assert len(names) > 6
    for name in names:
        assert f'id="{name}"' in page, name
    text = re.sub(r"<[^>]+>", "", page)
    for field in dataclasses.fields(hf_lsam.LSAMConfig):
        assert re.search(rf"\b{field.name}\s*\(\w+, optional", text), field.name
    # What the docstrings mark is rendered, and the defaults are those of the docstrings.
    assert "*optional*" not in text and "[LSAM" not in text and "HfArg" not in text


@pytest.mark.parametrize(
    ("page", "text", "message"),
    [
        ("quickstart.md", "[gone](gone.md)", "gone.md"),
        ("quickstart.md", "[gone](cost.md#gone)", "gone"),
        ("api.md", "::: hf_lsam.Gone", "hf_lsam.Gone"),
        ("gone.md", "# In no menu", "gone.md"),
    ],
)
def test_a_warning_of_the_build_is_an_error(page, text, message, tmp_path):
    for name in ("docs", "hf_lsam", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    (tmp_path / "hf_lsam_recipes").symlink_to("recipes")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / page).open("a") as file:
        file.write(f"\n{text}\n")
    built = build_site(tmp_path, tmp_path / "site")
    assert built.returncode == 1 and message in built.stdout + built.stderr, built.stdout + built.stderr


def test_the_walk_of_contributing_starts_from_the_code_as_it_is():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    with pytest.raises(ValueError) as refusal:
        hf_lsam.LSAMConfig(block_selection="first")
    assert str(refusal.value).rstrip(".") in page
    places = {
        "hf_lsam/reference.py": ("def last(k: int) -> Rule:",),
        "hf_lsam/config.py": ("BLOCK_SELECTIONS = ", "def _check_combinations("),
        "hf_lsam/selection.py": ("def select(", "alive = ", "return alive[-limit:]"),
        "tests/library/test_right.py": (
            "METHODS = {",
            '"last 2": (dict(rho=0.1, block_selection="last"), lambda m, n: lsam(m',
        ),
        "tests/library/test_selection.py": (
            "def test_a_block_without_gradient_is_never_selected(",
            "def chosen(squared_norms",
        ),
        "recipes/support/cost/methods.py": ("METHODS: ", '"last-2": {"block_selection": "last"'),
        "Makefile": (".venv/.installed-%:",),
    }
    for file, texts in places.items():
        content = (ROOT / file).read_text()
        assert [text for text in texts if content.count(text) != 1] == [], file


MODULES = [name for _, name, _ in pkgutil.iter_modules(hf_lsam.__path__, "hf_lsam.")]
# What of the recipes a user's own program imports.
MODULES += [f"hf_lsam_recipes.support.{name}" for name in ("sharpness", "sharpness_callback")]


@pytest.mark.parametrize("name", ["hf_lsam", *MODULES])
def test_every_public_name_is_documented(name):
    module = importlib.import_module(name)
    assert inspect.getdoc(module)
    for own in public(module):
        assert vars(own).get("__doc__") if inspect.isclass(own) else inspect.getdoc(own), own
        if inspect.isclass(own):
            for attribute, value in vars(own).items():
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if inspect.isfunction(function) and not attribute.startswith("_"):
                    assert inspect.getdoc(getattr(own, attribute)), f"{own}.{attribute}"


def public(module) -> list:
    """Classes and functions that a module itself defines, without those of a leading underscore."""
    return [
        value
        for key, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
        and not key.startswith("_")
    ]


def test_arguments_in_a_docstring_are_those_that_there_are():
    """`Args:` names every argument of its function in their order; that of a class, arguments of its `__init__`."""
    seen = 0
    for name in MODULES:
        for own in public(importlib.import_module(name)):
            functions = (
                [value for value in vars(own).values() if inspect.isfunction(value)] if inspect.isclass(own) else []
            )
            for function in [own, *functions]:
                documented = re.findall(r"^ {4}(\w+)(?: \([^\n]*\))?:", arguments_of(function), re.MULTILINE)
                if documented:
                    seen += 1
                    there = [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
                    assert documented == there or (inspect.isclass(function) and {*documented} <= {*there}), function
    assert seen > 10


def arguments_of(function) -> str:
    """The parts of a docstring that list the arguments."""
    parts = (inspect.getdoc(function) or "").split("\nArgs:\n")
    return "\n".join(part.split("\n\n")[0] for part in parts[1:])
