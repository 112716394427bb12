"""Every command line of README.md and the pages parses: script, YAML, options, values, targets and extras exist."""

import argparse
import dataclasses
import re
import runpy
import shlex
import sys
from collections.abc import Iterator

import pytest
import tomli
import transformers
from accelerate.commands.launch import launch_command_parser
from packaging import version
from pages import ROOT, blocks, pages_with

from hf_lsam import LSAMConfig

if version.parse(transformers.__version__) < version.parse("5.19"):
    pytest.skip("the recipes need transformers 5.19", allow_module_level=True)

from hf_lsam_recipes.support import cli
from hf_lsam_recipes.support.shipped import find_yaml


class Parsed(BaseException):
    """A command line was parsed; what follows it would run."""


@pytest.fixture
def parses(monkeypatch):
    """Runs a script or command until its arguments are parsed; returns them, or `None` for its help."""
    parse = argparse.ArgumentParser.parse_known_args

    def stop(self, *args, **kwargs):
        settings, unknown = parse(self, *args, **kwargs)
        if unknown:  # an error of the script, or for another parser
            return settings, unknown
        raise Parsed(settings)

    def run(call, *argv: str):
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
            patch.setattr(sys, "argv", [*argv])
            patch.chdir(ROOT)
            try:
                call()
            except Parsed as parsed:
                return parsed.args[0]
            except SystemExit as ended:
                assert not ended.code, f"{shlex.join(argv)}: {ended.code}"
        return None

    return run


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each command of a page's shell blocks; a loop is run through once."""
    for block in blocks(text, "bash"):
        for name, value in re.findall(r"^for (\w+) in (\S+)", block, re.MULTILINE):
            block = block.replace(f"${name}", value)
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                if words := shlex.split(command, comments=True):
                    yield words


def check_command(words: list[str], parses) -> None:
    """Fail if a command has an option, a file or a target that there is not."""
    if words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        assert launched.config_file is None or (ROOT / launched.config_file).is_file(), launched.config_file
        script = launched.training_script
        if launched.module:
            assert script.startswith("hf_lsam_recipes."), script
            script = f"recipes/{script.partition('.')[2]}.py"
        words = ["python", script, *launched.training_script_args]
    if words[0] == "hf-lsam":
        settings = parses(cli.main, *words)
    elif words[0] == "python" and words[1].startswith("recipes/"):
        settings = parses(lambda: runpy.run_path(str(ROOT / words[1]), run_name="__main__"), *words[1:])
    elif words[0] == "make":
        targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= {*targets}, words
        return
    elif words[:2] == ["pip", "install"]:
        extras = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert {*re.findall(r"\[(\w+)\]", " ".join(words))} <= {*extras}, words
        return
    else:
        assert words[0] in ("git", "cd", "for", "done", "deepspeed"), words
        return
    if "compare" in " ".join(words[:2]):
        assert find_yaml(settings.config, "compare").is_file()
    if hasattr(settings, "block_selection"):
        names = {field.name for field in dataclasses.fields(LSAMConfig)}
        LSAMConfig(**{name: value for name, value in vars(settings).items() if name in names})


@pytest.mark.parametrize("page", pages_with("bash"))
def test_command_lines_parse(page, parses):
    for words in command_lines(page.read_text()):
        check_command(words, parses)


@pytest.mark.parametrize(
    "command",
    [
        "hf-lsam glue rte --rhoo 0.1",
        "hf-lsam glue rtee",
        "hf-lsam glues rte",
        "hf-lsam glue rte --rho -1",
        "hf-lsam compare glue_smal",
        "hf-lsam compare glue_small --seed 0",
        "hf-lsam plot outputs figures --cost money",
        "python recipes/run_glue.py recipes/glue/rtee.yaml",
        "python recipes/run_clm.py recipes/clm/shakespeare.yaml --block_sise 512",
        "python recipes/run_nothing.py",
        "python recipes/studies/staleness.py recipes/glue/sst2.yaml --max_stepss 75 --output_file staleness.json",
        "accelerate launch --config_file accelerate_configs/gpu.yaml recipes/run_glue.py recipes/glue/rte.yaml",
        "accelerate launch --processes 2 -m hf_lsam_recipes.run_glue rte",
        "accelerate launch -m hf_lsam_recipes.run_glues rte",
        "make dem",
        "pip install '.[recipe]'",
        "hf_lsam glue rte",
    ],
)
def test_a_command_that_is_wrong_fails(command, parses, capsys):
    with pytest.raises((AssertionError, ValueError, SystemExit, OSError)):
        check_command(shlex.split(command), parses)
