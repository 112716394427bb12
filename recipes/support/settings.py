"""Reading the settings of a recipe from a YAML and the command line, and running the recipe as a script."""

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

    def parse_known_args(self, args=None, namespace=None):
        """As of argparse; `null` as the only value of a list is `None`."""
        namespace, rest = super().parse_known_args(args, namespace)
        for name, value in vars(namespace).items():
            setattr(namespace, name, None if value == [None] else value)
        return namespace, rest


def parse_arguments(
    kinds: Sequence[type], argv: list[str], description: str, folder: str | None = None
) -> tuple[Any, ...]:
    """
    Read an optional YAML of settings, which comes first, and the command line, which overrides it.

    Args:
        kinds (`Sequence[type]`): The dataclasses whose fields are the settings.
        argv (`list[str]`): `[settings.yaml] [--setting value ...]`; `null` as a value is `None`.
        description (`str`): The first line of `--help`.
        folder (`str`, *optional*): Folder of the YAMLs that ship with the recipe, which can be given by name.

    Two defaults differ from those of `TrainingArguments`: `output_dir` is empty, so that `check_output_dir` can
    require it, and `dataloader_pin_memory` is off if there is no accelerator.

    Returns:
        `tuple`: An instance of each of `kinds`, in their order.

    Raises:
        ValueError: for a YAML that cannot be read or is not the first argument, or an unknown setting; the message
            suggests what was meant. A value of the wrong type, or an invalid choice, ends the program with a one-line
            message, as usual for argparse.
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
        own, lists = read_yaml(path, known)
        for action in parser._actions:
            if action.nargs is not None and lists.get(action.dest):
                own += [f"--{action.dest}", *lists.pop(action.dest)]
        parser.set_defaults(**lists)  # settings that are one string on the command line
        argv = own + argv[1:]
    *parsed, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is neither a setting, which starts with --, nor the value of one. --help lists all "
            "settings."
        )
    return tuple(parsed)


def _train_together_on_cpus() -> None:
    """
    Tell Accelerate to use the CPU if several processes were launched on a machine without an accelerator.

    Its launcher does not set this, and each process would train separately without it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"


def read_yaml(path: Path, known: set[str]) -> tuple[list[str], dict[str, list[str]]]:
    """
    Read a YAML of settings.

    Args:
        path (`Path`): The file.
        known (`set[str]`): Names of all settings.

    Returns:
        The settings with a single value, as command-line arguments `--name=value`, and those with a list, by name.

    Raises:
        ValueError: if the file is missing or not a valid YAML of settings in UTF-8, or has an unknown setting.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file: the first argument is a YAML of settings, or starts with --.")
    check_utf8(path)
    try:
        settings = read_yaml_text(path)
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must have one `setting: value` per line.")
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
    Run a recipe as a script: call `prepare` with the command-line arguments, and `execute` with its result.

    An error before training is caused by the settings, so the script ends with its message, without a traceback.
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
