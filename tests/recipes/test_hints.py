"""What a mistake in a command line, a YAML or a path is answered with: what was probably meant."""

import dataclasses
import re

import pytest
from transformers import TrainingArguments

from hf_lsam_recipes import run_clm, run_glue, run_image_classification
from hf_lsam_recipes.support.files import check_utf8, explain_missing
from hf_lsam_recipes.support.hints import REMOVED, choices_hint, setting_names
from hf_lsam_recipes.support.settings import parse_arguments
from hf_lsam_recipes.support.shipped import did_you_mean

RECIPES = {"glue": run_glue, "clm": run_clm, "images": run_image_classification}
MODEL = ["--model_name_or_path", "m", "--task_name", "rte"]


def parse(*argv: str):
    return parse_arguments(run_glue.SETTINGS, list(argv), "", "glue")


# Settings


@pytest.mark.parametrize("name", REMOVED)
def test_a_setting_of_older_versions_is_answered_with_what_takes_its_place(name):
    known = setting_names([kind for recipe in RECIPES.values() for kind in recipe.SETTINGS])
    assert name not in known
    # What is to be set instead is there.
    if found := re.search(r"^(?:set|it is called) ([a-z_]+)(?! in | of | environment)(?: |$)", REMOVED[name]):
        assert found[1] in known
    for option in (f"--{name}", f"--{name.replace('_', '-')}", f"--{name}=1"):
        with pytest.raises(ValueError, match=rf"Unknown setting .* This version .* has no {name}: {REMOVED[name]}\."):
            parse(*MODEL, option)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--rhoo", "1"], r"Unknown setting '--rhoo'\. Did you mean rho\?"),
        (["--perturb-strat", "1"], r"Unknown setting '--perturb-strat'\. Did you mean perturb_start"),
        (["--RHO=1"], r"Unknown setting '--RHO'\. Did you mean rho\?"),
        (["--xyzzy"], r"Unknown setting '--xyzzy'\. --help lists all settings\."),
        (["stray"], r"'stray' is neither a setting, which starts with --, nor the value of one"),
    ],
)
def test_a_misspelt_setting(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*MODEL, *argv)


def test_a_misspelt_setting_is_named_before_one_that_is_missing_for_it():
    with pytest.raises(ValueError, match=r"'--taskname'\. Did you mean task_name\?"):
        parse("--model_name_or_path", "m", "--taskname", "rte")
    with pytest.raises(ValueError, match=r"'--model_name'\. Did you mean model_name_or_path\?"):
        parse("--model_name", "m", "--task_name", "rte")


def test_every_setting_and_its_other_spellings_are_known():
    for item in dataclasses.fields(TrainingArguments):
        if item.default is True:
            for option in (f"--{item.name}", f"--no_{item.name}", f"--no-{item.name.replace('_', '-')}"):
                args = parse(*MODEL, option)[-1]
                assert getattr(args, item.name) is (not option.startswith("--no")), option


def test_misspelt_settings_of_a_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("rhoo: 1\nno_cuda: true\nxyzzy: 1\nplugh: 1\n")
    message = (
        r"run.yaml has unknown settings: rhoo, no_cuda, xyzzy, plugh\. Did you mean rho\? This version of "
        r"transformers has no no_cuda: set use_cpu\. --help lists all settings\.$"
    )
    with pytest.raises(ValueError, match=message):
        parse(str(path))


@pytest.mark.parametrize(
    "argv, near",
    [
        (["--block_selection", "lst"], "last"),
        (["--eval_strategy", "Step"], "steps"),
        (["--lr_scheduler_type", "cosin"], "cosine"),
        (["--optim", "adamw"], "adamw_torch or adamw_torch_fused or adamw_torch_xla"),
    ],
)
def test_a_value_that_is_no_choice(argv, near, capsys):
    with pytest.raises(SystemExit):
        parse(*MODEL, *argv)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{argv[0]}" in error and re.search(rf"Did you mean {near}( or [a-z_]+)*\?$", error), error


def test_choices_as_newer_versions_of_python_write_them():
    message = "argument --x: invalid choice: 'lst' (choose from none, last)"
    assert choices_hint(message) == f"{message} Did you mean last?"
    assert choices_hint("argument --x: invalid float value: 'lst'") == "argument --x: invalid float value: 'lst'"


def test_near_names_are_few_and_whatever_their_case():
    assert did_you_mean("RTE", ["rte", "cola"]) == " Did you mean rte?"
    assert did_you_mean("a", ["a1", "a2", "a3", "a4"]) == " Did you mean a1 or a2 or a3?"
    assert did_you_mean("xyzzy", ["rte"]) == ""
    with pytest.raises(ValueError, match=r"task_name must be one of .*, but is 'RTE'\. Did you mean rte\?"):
        parse("--model_name_or_path", "m", "--task_name", "RTE")
    model = run_image_classification.ModelArguments
    with pytest.raises(ValueError, match=r"architecture must be one of .* Did you mean wide_resnet or resnet\?"):
        model(architecture="wideresnet")


# The place of the YAML


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--rho", "0.1", "rte.yaml"], "rte.yaml --rho 0.1"),
        (["--rho=0.1", "my/own.yml"], "my/own.yml --rho=0.1"),
        (["--rho", "0.1", "rte"], "rte --rho 0.1"),
        (["--do_train", "rte.yaml", "--rho", "1"], "rte.yaml --do_train --rho 1"),
        (["--torch_compile", "rte"], "rte --torch_compile"),
        (["rte", "--rho", "1", "cola.yaml"], "cola.yaml rte --rho 1"),
    ],
)
def test_a_yaml_that_is_not_first(argv, expected):
    with pytest.raises(ValueError, match=rf"must be the first argument, and the only one: {re.escape(expected)}$"):
        parse(*argv)


def test_a_value_that_looks_like_a_yaml_is_none():
    *_, lsam, _args = parse(*MODEL, "--block_pattern", "own.yaml", "--output_dir", "rte")
    assert lsam.block_pattern == "own.yaml"


# Files


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "a\ncafé\n".encode("latin-1"),
            r"line 2 has bytes of another .*iconv -f WINDOWS-1252 -t UTF-8",
        ),
        ("a\ncafé".encode("utf-16"), r"looks like UTF-16.* iconv -f UTF-16 -t UTF-8 .*a.csv > .*a_utf8.csv"),
        ("a\nb".encode("utf-16-le"), r"looks like UTF-16"),
        ("a\nb".encode("utf-16-be"), r"looks like UTF-16"),
        ("a\né".encode()[:-1], r"line 2 has bytes of another"),
    ],
)
@pytest.mark.parametrize("setting", ["data", "text", "settings"])
def test_text_that_is_not_utf_8(tmp_path, content, message, setting):
    path = tmp_path / {"data": "a.csv", "text": "a.txt", "settings": "a.yaml"}[setting]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} is not UTF-8: .*{message.replace('csv', path.suffix[1:])}"):
        if setting == "data":
            run_glue.load_text_data(run_glue.DataArguments(train_file=str(path)), ["train"], {})
        elif setting == "text":
            run_clm.load_rows(run_clm.DataArguments(train_file=str(path)), ["train"])
        else:
            parse(str(path))


def test_text_that_is_utf_8(tmp_path):
    for content in (b"", "é\n€ 𝄞".encode(), "\ufeffa".encode()):
        (tmp_path / "a.csv").write_bytes(content)
        check_utf8(tmp_path / "a.csv")


def test_what_is_missing_of_a_path(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").touch()
    monkeypatch.chdir(tmp_path)
    for start in (tmp_path, tmp_path.relative_to(tmp_path)):
        assert explain_missing(start / "dat" / "sub" / "a.csv") == (
            f"there is no folder dat in {tmp_path}. Did you mean data?"
        )
        assert explain_missing(start / "data" / "trian.csv") == (
            f"there is no such file in {tmp_path / 'data'}. Did you mean train.csv?"
        )
        assert explain_missing(start / "data") == "it is a folder."
    with pytest.raises(ValueError, match=r"dat/train.csv is not a file: there is no folder dat in .* mean data\?"):
        run_glue.load_text_data(run_glue.DataArguments(train_file="dat/train.csv"), ["train"], {})
    with pytest.raises(ValueError, match=r"data_dir=dat has .* There is no such folder: there is no .* mean data\?"):
        run_glue.load_text_data(run_glue.DataArguments(task_name="rte", data_dir="dat"), ["train"], {})
