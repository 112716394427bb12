"""Hints for wrong settings: names of older transformers, misspellings, and a YAML in the wrong place."""

import dataclasses
import itertools
import re
import typing
from collections.abc import Collection, Sequence
from pathlib import Path

from hf_lsam_recipes.support.shipped import did_you_mean, shipped_yamls

# Training arguments that transformers has removed, and their replacements.
REMOVED = {
    "adafactor": "set optim to adafactor",
    "evaluate_during_training": "set eval_strategy to steps or epoch",
    "evaluation_strategy": "it is called eval_strategy now",
    "fp16_backend": "leave it out, since fp16 has one implementation",
    "fp16_opt_level": "leave it out, since fp16 has one implementation",
    "fsdp_min_num_params": "set min_num_params in fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "set transformer_layer_cls_to_wrap in fsdp_config",
    "group_by_length": "set train_sampling_strategy to group_by_length",
    "half_precision_backend": "leave it out, since fp16 and bf16 have one implementation",
    "include_inputs_for_metrics": "set include_for_metrics to inputs",
    "include_tokens_per_second": "set include_num_input_tokens_seen to non_padding",
    "jit_mode_eval": "set torch_compile",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "no_cuda": "set use_cpu",
    "overwrite_output_dir": "set output_dir to a new folder, or remove the old one",
    "per_gpu_eval_batch_size": "it is called per_device_eval_batch_size now",
    "per_gpu_train_batch_size": "it is called per_device_train_batch_size now",
    "push_to_hub_model_id": "set hub_model_id to <user>/<model>",
    "push_to_hub_organization": "set hub_model_id to <organization>/<model>",
    "push_to_hub_token": "it is called hub_token now",
    "save_safetensors": "leave it out, since weights are always saved as safetensors",
    "sharded_ddp": "set fsdp",
    "torchdynamo": "set torch_compile_backend",
    "tpu_num_cores": "set num_processes of accelerate launch",
    "use_ipex": "leave it out",
    "use_mps_device": "leave it out, since the device is detected",
    "warmup_ratio": "set warmup_steps to the same fraction, below 1",
}


def setting_names(kinds: Sequence[type]) -> set[str]:
    """The fields of the dataclasses `kinds` that can be set."""
    return {item.name for kind in kinds for item in dataclasses.fields(kind) if item.init}


def explain_unknown(name: str, known: Collection[str]) -> str:
    """Suggest what to write instead of the unknown setting `name`: its replacement, or one of `known`."""
    plain = name.lstrip("-").replace("-", "_").lower()
    if plain in REMOVED:
        return f" This version of transformers has no {plain}: {REMOVED[plain]}."
    return did_you_mean(plain, sorted(known)) or " --help lists all settings."


def explain_all_unknown(names: Sequence[str], known: Collection[str]) -> str:
    """Suggest what to write instead of each of the unknown settings `names`."""
    return "".join(dict.fromkeys(explain_unknown(name, known) for name in names))


def check_names(argv: Sequence[str], kinds: Sequence[type]) -> None:
    """Raise `ValueError`, with a suggestion, for a `--setting` that is not a field of the dataclasses `kinds`."""
    known = setting_names(kinds)
    # A switch that is on by default can also be turned off with `--no_<name>`.
    negated = {f"no_{item.name}" for kind in kinds for item in dataclasses.fields(kind) if item.default is True}
    for word in argv:
        option = word.partition("=")[0]
        if option.startswith("--") and option != "--help" and option[2:].replace("-", "_") not in known | negated:
            raise ValueError(f"Unknown setting {option!r}.{explain_unknown(option, known)}")


def check_places(argv: Sequence[str], kinds: Sequence[type], folder: str | None) -> None:
    """
    Raise `ValueError` if a YAML is not the first argument.

    Args:
        argv (`Sequence[str]`): The command-line arguments.
        kinds (`Sequence[type]`): The dataclasses of the settings.
        folder (`str` or `None`): Folder of shipped YAMLs, which are recognised by their names as well.
    """
    hints = {name: kind for owner in kinds for name, kind in typing.get_type_hints(owner).items()}
    switches = {name for name, kind in hints.items() if bool in (kind, *typing.get_args(kind))}
    shipped = shipped_yamls(folder) if folder else {}
    for before, word in itertools.pairwise(argv):
        if word.startswith("-") or (Path(word).suffix not in (".yaml", ".yml") and word not in shipped):
            continue
        # Otherwise it is the value of the setting before it.
        if not before.startswith("--") or "=" in before or before[2:].replace("-", "_") in switches:
            rest = " ".join(other for other in argv if other is not word)
            raise ValueError(f"The YAML of settings must be the first argument, and the only one: {word} {rest}")


def choices_hint(message: str) -> str:
    """The `message` of argparse. If it is about an invalid choice, similar choices are added."""
    found = re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message)
    if found is None:
        return message
    return message + did_you_mean(found[1], [name.strip(" '") for name in found[2].split(",")])
