"""What is installed: the wheel, the sdist and their metadata."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import tomli
import transformers
import yaml
from cards import tables_in
from packaging import version
from tiny_glue import rte, save_bert, write_task

import hf_lsam

ROOT = Path(__file__).parents[2]
CORE = {"accelerate", "numpy", "safetensors", "torch", "transformers"}
# What the sdist holds, whole folders and files.
FOLDERS = (".ci", ".github", "accelerate_configs", "docs", "hf_lsam", "recipes", "tests")
FILES = (
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "RELEASING.md",
    "constraints-oldest.txt",
    "constraints.txt",
    "mkdocs.yml",
    "pyproject.toml",
)
PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]

RECIPES = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.19"), reason="the recipes need transformers 5.19"
)

USER = """
from hf_lsam import LSAMConfig, LSAMTrainer
config = LSAMConfig(rho=0.05, num_perturbed_blocks=None)
LSAMConfig(rho="far")
LSAMConfig(rhoo=0.1)
LSAMTrainer(lsam_config=0.05)
enabled: str = config.enabled
"""

FEW_STEPS = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
before = set(sys.modules)
import hf_lsam
added = {module.partition(".")[0] for module in set(sys.modules) - before}
sizes = dict(vocab_size=9, hidden_size=8, num_attention_heads=1, num_key_value_heads=1, intermediate_size=8)
args = TrainingArguments("out", max_steps=2, logging_steps=1, use_cpu=True, report_to="none", save_strategy="no")
trainer = hf_lsam.LSAMTrainer(
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)), args,
    train_dataset=[{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8,
    lsam_config=hf_lsam.LSAMConfig(rho=0.5),
)
trainer.train()
print("#", hf_lsam.__file__, trainer.state.log_history[0]["lsam/active"], *added)
"""


LOADED = """
import sys
import hf_lsam_recipes.support.images.resnets
from transformers import AutoModelForImageClassification
print("#", *[type(AutoModelForImageClassification.from_pretrained(folder)).__name__ for folder in sys.argv[1:]])
"""

# What the script that an installer makes of the entry point does.
COMMAND = """
import importlib.metadata, sys
[command] = importlib.metadata.entry_points(group="console_scripts", name="hf-lsam")
sys.argv[0] = "hf-lsam"
sys.exit(command.load()())
"""


def run(*command, **kwargs) -> str:
    """What `command` printed; its error output is shown if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def unpacked(folder: Path) -> Path:
    """What was unpacked there of the sdist."""
    return next(path for path in folder.glob("hf_lsam-*") if path.is_dir())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist of this tree, and the wheel that is built from the sdist."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    build = "import sys, setuptools.build_meta as backend; getattr(backend, 'build_' + sys.argv[1])(sys.argv[2])"
    run(sys.executable, "-c", build, "sdist", str(folder), cwd=source)
    shutil.unpack_archive(next(folder.glob("*.tar.gz")), folder)
    run(
        sys.executable,
        "-c",
        build,
        "wheel",
        str(folder),
        cwd=next(path for path in folder.glob("hf_lsam-*") if path.is_dir()),
    )
    return folder


@pytest.fixture(scope="module")
def installed(built) -> Path:
    """An environment into which the wheel is unpacked, and nothing else is installed; returns its `site-packages`."""
    run(sys.executable, "-m", "venv", "--without-pip", str(built / "env"))
    [site] = (built / "env").glob("lib/python*/site-packages")
    zipfile.ZipFile(next(built.glob("*.whl"))).extractall(site)
    # The other packages come from where the tests run.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return site


def run_installed(site: Path, *arguments: str, cwd: Path) -> str:
    """What Python prints, run with `arguments` in the environment that `installed` made."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return run(str(site.parents[2] / "bin" / "python"), "-I", *arguments, cwd=cwd, env=environment)


def test_wheel_holds_the_package_and_the_recipes_and_nothing_else(built):
    """Of the recipes all but the studies: neither evidence nor results, and no tests."""
    files = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    modules = {f"hf_lsam/{path.name}" for path in (ROOT / "hf_lsam").iterdir() if path.suffix in (".py", ".typed")}
    recipes = {path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*")}
    kept = {path for path in recipes if path.suffix in (".py", ".yaml") and path.parts[0] != "studies"}
    assert {file for file in files if ".dist-info/" not in file} == modules | {
        f"hf_lsam_recipes/{path.as_posix()}" for path in kept
    }
    assert {"hf_lsam/py.typed", "hf_lsam_recipes/run_glue.py", "hf_lsam_recipes/glue/rte.yaml"} <= {*files}
    assert not [file for file in files if file.endswith((".csv", ".json")) or "evidence" in file or "test" in file]
    assert any(file.endswith("licenses/LICENSE") for file in files)
    [commands] = [file for file in files if file.endswith("entry_points.txt")]
    assert "hf-lsam = hf_lsam_recipes.support.cli:main" in (
        zipfile.ZipFile(next(built.glob("*.whl"))).read(commands).decode()
    )


def test_sdist_holds_all_that_it_takes_to_test_and_no_leftovers(built):
    folder = unpacked(built)
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        there = {Path(*Path(member.name).parts[1:]).as_posix() for member in archive if member.isfile()}
    wanted = {file.relative_to(ROOT).as_posix() for name in FOLDERS for file in (ROOT / name).rglob("*")}
    wanted = {name for name in wanted if (ROOT / name).is_file() and "__pycache__" not in name} | {*FILES}
    made = {"PKG-INFO", "setup.cfg", *(name for name in there if name.startswith("hf_lsam.egg-info/"))}
    assert there == wanted | made
    assert (folder / "tests" / "support" / "tiny.py").is_file()


def test_the_wheel_trains_by_itself_and_brings_the_core_dependencies_only(installed, tmp_path):
    """Of what transformers' Trainer has not imported itself."""
    output = run_installed(installed, "-c", FEW_STEPS, cwd=tmp_path)
    [line] = [line for line in output.splitlines() if line.startswith("#")]
    _, file, active, *added = line.split()
    assert Path(file) == installed / "hf_lsam" / "__init__.py"
    assert float(active) == 1
    assert {"hf_lsam"} <= set(added) - sys.stdlib_module_names <= CORE | {"hf_lsam"}


def test_the_wheel_brings_the_command_and_its_yamls(installed, tmp_path):
    output = run_installed(installed, "-c", COMMAND, "--version", cwd=tmp_path)
    assert output == f"hf-lsam {hf_lsam.__version__}\n"
    output = run_installed(installed, "-c", COMMAND, "--help", cwd=tmp_path)
    assert str(installed / "hf_lsam_recipes") in output and " rte, " in output


@RECIPES
def test_a_recipe_of_the_wheel_trains_by_the_name_of_a_yaml(installed, tmp_path):
    model, data = save_bert(tmp_path / "bert"), write_task(tmp_path / "glue", "rte")
    argv = ["glue", "rte", *rte(model, data, tmp_path / "out")]
    run_installed(installed, "-c", COMMAND, *argv, cwd=tmp_path)
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 2
    assert tables_in(tmp_path / "out")[0]["hf-lsam"] == hf_lsam.__version__


@RECIPES
def test_a_trained_resnet_loads_where_the_wheel_is_installed(installed, tmp_path):
    from hf_lsam_recipes.support.images import resnets

    resnets.CifarResNet(resnets.CifarResNetConfig(depth=8)).save_pretrained(tmp_path / "one")
    resnets.WideResNet(resnets.WideResNetConfig(depth=10, widen_factor=1)).save_pretrained(tmp_path / "two")
    output = run_installed(installed, "-c", LOADED, str(tmp_path / "one"), str(tmp_path / "two"), cwd=tmp_path)
    assert output.splitlines()[-1] == "# CifarResNet WideResNet"


def test_results_of_an_installed_package_carry_its_version_and_no_commit_of_others(installed, tmp_path):
    """Neither does those of a package inside the clone of another project."""
    code = "from hf_lsam_recipes.support.stamp import stamp; print(stamp([0])['commit'])"
    subprocess.run(["git", "init", "--quiet", str(installed)], check=True)
    assert run_installed(installed, "-c", code, cwd=tmp_path) == f"hf-lsam {hf_lsam.__version__}\n"
    shutil.rmtree(installed / ".git")


def test_mypy_honours_the_types_of_the_wheel_in_the_file_of_a_user(installed, tmp_path):
    """The types of this package: those of torch and transformers take minutes to read."""
    others = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\nignore_missing_imports = true\n" for name in CORE)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n{others}")
    (tmp_path / "user.py").write_text(USER)
    python = installed.parents[2] / "bin" / "python"
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), "user.py"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    output = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment).stdout
    assert re.findall(r"^user.py:(\d+): error: .*\[([\w-]+)\]$", output, re.MULTILINE) == [
        ("4", "arg-type"),
        ("5", "call-arg"),
        ("6", "arg-type"),
        ("7", "assignment"),
    ], output


def test_metadata_is_complete(built):
    [wheel] = built.glob("*.whl")
    content = zipfile.ZipFile(wheel).read(f"hf_lsam-{hf_lsam.__version__}.dist-info/METADATA").decode()
    metadata = email.message_from_string(content)
    for name in ("Name", "Version", "Summary", "Author", "Keywords", "Project-URL", "Requires-Python"):
        assert metadata[name], f"{name} is missing"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    least = metadata["Requires-Python"].removeprefix(">=")
    classifiers = metadata.get_all("Classifier")
    assert {"Typing :: Typed", f"Programming Language :: Python :: {least}"} <= set(classifiers)
    # With a license expression, a license classifier is refused by the package index.
    assert not any(classifier.startswith("License ::") for classifier in classifiers)


def test_one_version_everywhere():
    version = hf_lsam.__version__
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
