"""The command `hf-lsam`: what it teaches, what it refuses, and that it runs the recipes as their scripts do."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import assert_equal
from tiny_glue import rte

import hf_lsam
from hf_lsam_recipes import run_glue
from hf_lsam_recipes.support import cli
from hf_lsam_recipes.support.shipped import RECIPES, find_yaml, shipped_yamls

pytest_plugins = ["glue_fixtures"]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line; returns what was printed, or what the command ended with."""

    def run(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["/somewhere/hf-lsam", *argv])
        try:
            cli.main()
        except SystemExit as ended:
            if ended.code not in (None, 0):
                return str(ended.code)
        return capsys.readouterr().out

    return run


def ended(code: str, **environment: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


# Help


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",)])
def test_help_shows_each_command_with_an_example_and_the_yamls(run, argv):
    printed = run(*argv)
    assert len(cli.COMMANDS) == 7
    for name, (does, example) in cli.COMMANDS.items():
        assert f"  {name} " in printed and does in printed and example in printed
        assert example.startswith(f"hf-lsam {name} ")
    assert str(RECIPES) in printed and "accelerate launch --num_processes 2 -m hf_lsam_recipes.run_glue" in printed
    for path in [path for folder in cli.FOLDERS for path in (ROOT / "recipes" / folder).glob("*.yaml")]:
        assert path.stem in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_examples_of_the_help_name_yamls_that_ship():
    for name in cli.FOLDERS:
        yaml = cli.COMMANDS[name][1].split()[2]
        assert yaml in shipped_yamls(name)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_each_command_has_a_help_of_its_own(run, name):
    assert run(name, "--help").startswith(f"usage: hf-lsam {name} ")


def test_version(run):
    assert run("--version") == f"hf-lsam {hf_lsam.__version__}\n"


def test_help_and_what_starts_processes_need_no_torch():
    """Help comes at once; and the peak memory of a process counts that of the one that started it."""
    for argv in ([], ["--version"], ["compare", "--help"], ["demo", "--help"]):
        code = f"import sys; sys.argv = ['hf-lsam', *{argv}]\n"
        code += "from hf_lsam_recipes.support.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        code += "print(any(name in sys.modules for name in ('torch', 'transformers', 'matplotlib')))"
        assert ended(code).stdout.splitlines()[-1] == "False", argv


# Names that are unknown


@pytest.mark.parametrize(
    "argv, message",
    [
        (["glu", "rte"], r"^hf-lsam: error: there is no command 'glu'\. Did you mean glue\? The commands are "),
        (["nothing"], r"^hf-lsam: error: there is no command 'nothing'\. The commands are glue, clm, images, "),
        (["glue", "rtee"], r"^hf-lsam glue: error: rtee is not a file, .* Did you mean rte\? Name a file of your own"),
        (["glue", "stb"], r"^hf-lsam glue: error: stb is not a file, .* Did you mean stsb"),
        (["clm", "gsm8k"], r"^hf-lsam clm: error: gsm8k is not a file, .* Did you mean gsm8k_lora\?"),
        (["images", "cifar10"], r"^hf-lsam images: error: .* Did you mean cifar100_wrn28 or cifar10_resnet20\?"),
        (["images", "./vit"], r"^hf-lsam images: error: \./vit is not a file"),
        (
            ["glue", "vit"],
            r"^hf-lsam glue: error: vit is not a file, .* ships with this recipe\. Name a file of your own",
        ),
        (["compare", "glue_smal"], r"glue_smal is not a file, .* Did you mean glue_small\?"),
    ],
)
def test_an_unknown_name_ends_with_one_message_that_names_its_like(run, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    error = run(*argv)
    assert re.search(message, error), error
    assert len(error.splitlines()) == 1
    assert not [*tmp_path.iterdir()]


def test_a_package_that_is_missing_is_named_with_the_extra():
    code = "import sys; sys.modules['peft'] = None; sys.argv = ['hf-lsam', 'glue', 'rte']\n"
    result = ended(code + "from hf_lsam_recipes.support.cli import main; main()")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "hf-lsam glue needs peft, which is not installed: pip install 'hf-lsam[recipes]'" in result.stderr


# YAMLs by name


def test_a_yaml_that_ships_goes_by_its_name_unless_there_is_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rte").mkdir()
    shipped = RECIPES / "glue" / "rte.yaml"
    assert find_yaml("rte", "glue") == find_yaml("rte.yaml", "glue") == find_yaml(str(shipped), "glue") == shipped
    (tmp_path / "rte.yaml").touch()
    assert find_yaml("rte.yaml", "glue") == Path("rte.yaml")
    with pytest.raises(ValueError, match="elsewhere/rte.yaml is not a file"):
        find_yaml("elsewhere/rte.yaml", "glue")


@pytest.mark.parametrize("name", ["own/first_rnu.yaml", "own/first_run", "own/first_run.yml"])
def test_a_yaml_of_ones_own_that_is_misspelt(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "first_run.yaml").touch()
    with pytest.raises(ValueError, match=rf"{name} is not a file, .* Did you mean own/first_run.yaml\? Name a file"):
        find_yaml(name, "glue")


def test_a_comparison_that_ships_goes_by_its_name(run, tmp_path):
    assert run("compare", "tiny", "--report_only", "--output_dir", str(tmp_path)) == (
        f"compare.py: output_dir={tmp_path} holds no finished run to report: run it first."
    )


# Runs


def test_the_command_trains_what_the_script_trains(run, bert, glue, tmp_path):
    every_step = ["--perturb_start", "0", "--perturb_interval", "1", "--logging_steps", "1"]
    argv = [*rte(bert, glue, tmp_path / "command"), *every_step]
    printed = run("glue", "rte", *argv)
    assert "train_loss" in printed
    run_glue.main([str(ROOT / "recipes" / "glue" / "rte.yaml"), *argv, "--output_dir", str(tmp_path / "script")])
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("command", "script"))
    assert_equal(one, other)
    assert json.loads((tmp_path / "command" / "trainer_state.json").read_text())["global_step"] == 2
    # The YAML evaluates, too, and its method is on.
    assert (tmp_path / "command" / "eval_results.json").is_file()
    rows = (tmp_path / "command" / "lsam_blocks.jsonl").read_text().splitlines()
    assert [json.loads(row)["perturbed"] for row in rows] == [1, 1]


def test_two_processes_train_the_module_under_accelerate_launch(bert, glue, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / "multi_cpu.yaml"), "--num_processes", "2"]
    command += ["-m", "hf_lsam_recipes.run_glue", "rte", *rte(bert, glue, tmp_path / "out")]
    command += ["--max_steps", "2", "--per_device_train_batch_size", "4"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    # Both take 4 of the 16 rows a step.
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["epoch"] == 1
