"""The settings of a recipe, read from a YAML and the command line, and the recipe as a script."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from hf_lsam_recipes.support.files import check_utf8
from hf_lsam_recipes.support.hints import check_names, check_places, choices_hint, explain_all_unknown, setting_names
from hf_lsam_recipes.support.shipped import find_yaml
from hf_lsam_recipes.support.yaml_text import read_yaml_text


class _Parser(HfArgumentParser):
    def error(self, message: str):
        super().error(choices_hint(message))


def parse_arguments(
    kinds: Sequence[type], argv: list[str], description: str, folder: str | None = None
) -> tuple[Any, ...]:
    """
    Read an optional YAML of settings, which comes first, and the command line, which overrides it.

    Args:
        kinds (`Sequence[type]`): The dataclasses whose fields are the settings.
        argv (`list[str]`): `[settings.yaml] [--setting value ...]`; `null` as a value is `None`.
        description (`str`): What `--help` says first.
        folder (`str`, *optional*): Where the YAMLs are that ship with the recipe, and may be given by their names.

    Of `TrainingArguments`, two defaults are others: `output_dir` is empty, for `check_output_dir` to refuse, and
    `dataloader_pin_memory` is off where there is no accelerator that memory is pinned for.

    Raises:
        ValueError: for a YAML that cannot be read or is not the first argument, or an unknown setting; says what was
            probably meant. (A value of the wrong type, or that is no choice, ends the program with one line, as
            argparse does.)
    """
    _train_together_on_cpus()
    check_names(argv, kinds)
    check_places(argv, kinds, folder)
    known = setting_names(kinds)
    parser = _Parser(
        kinds, usage="%(prog)s [settings.yaml] [--setting value ...]", description=description, allow_abbrev=False
    )
    for kind in (int, float, str, string_to_bool):
        parser.register("type", kind, lambda text, kind=kind: None if text == "null" else kind(text))
    defaults = {"output_dir": "", "dataloader_pin_memory": torch.accelerator.is_available()}
    parser.set_defaults(**{name: value for name, value in defaults.items() if name in known})
    if argv and not argv[0].startswith("-"):
        path = Path(argv[0]) if folder is None else find_yaml(argv[0], folder)
        scalars, lists = read_yaml(path, known)
        parser.set_defaults(**lists)
        argv = scalars + argv[1:]
    *parsed, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is neither a setting, which starts with --, nor the value of one. --help lists those "
            "there are."
        )
    return tuple(parsed)


def _train_together_on_cpus() -> None:
    """
    Tell Accelerate to use the CPU if several processes were launched where there is nothing else.

    Its launcher does not tell them, and otherwise each of them would train alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"


def read_yaml(path: Path, known: set[str]) -> tuple[list[str], dict[str, list[str]]]:
    """A YAML's settings as command-line arguments, read as the command line reads them, and those that are lists."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file: the first argument is a YAML of settings, or starts with --.")
    check_utf8(path)
    try:
        settings = read_yaml_text(path)
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold one `setting: value` a line.")
    if unknown := [str(name) for name in settings if name not in known]:
        raise ValueError(f"{path} has unknown settings: {', '.join(unknown)}.{explain_all_unknown(unknown, known)}")
    scalars, lists = [], {}
    for name, value in settings.items():
        if isinstance(value, list):
            lists[name] = value
        else:
            text = json.dumps(value) if isinstance(value, dict) else "null" if value in ("", "~") else value
            scalars.append(f"--{name}={text}")
    return scalars, lists


def leave_together() -> None:
    """End the communication of the processes, none of which leaves before the others are done."""
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


def run_script(prepare: Callable[[list[str]], Any], execute: Callable[[Any], Any]) -> None:
    """
    A recipe as a script: `prepare` with the command line's arguments, and `execute` with what it returns.

    An error before training is one of the settings: the script ends with its message, without a traceback.
    """
    prepared = None
    try:
        prepared = prepare(sys.argv[1:])
        execute(prepared)
        leave_together()
    except (ValueError, NotImplementedError, ImportError, OSError) as problem:
        if prepared is not None and (prepared.timer.started or not prepared.args.do_train):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {problem}")
