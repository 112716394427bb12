"""What a setting was probably meant to be: names of older transformers, misspellings, and a YAML out of place."""

import dataclasses
import itertools
import re
import typing
from collections.abc import Collection, Sequence
from pathlib import Path

from hf_lsam_recipes.support.shipped import did_you_mean, shipped_yamls

# Training arguments that transformers had once, and what takes their place.
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
    "use_mps_device": "leave it out, since the device is found",
    "warmup_ratio": "set warmup_steps to the same share, less than 1",
}


def setting_names(kinds: Sequence[type]) -> set[str]:
    """The fields of the dataclasses `kinds` that can be set."""
    return {item.name for kind in kinds for item in dataclasses.fields(kind) if item.init}


def explain_unknown(name: str, known: Collection[str]) -> str:
    """What to write instead of the setting `name`, which is not among the `known` ones."""
    plain = name.lstrip("-").replace("-", "_").lower()
    if plain in REMOVED:
        return f" This version of transformers has no {plain}: {REMOVED[plain]}."
    return did_you_mean(plain, sorted(known)) or " --help lists those there are."


def explain_all_unknown(names: Sequence[str], known: Collection[str]) -> str:
    """What to write instead of each of several settings."""
    return "".join(dict.fromkeys(explain_unknown(name, known) for name in names))


def check_names(argv: Sequence[str], kinds: Sequence[type]) -> None:
    """Raise `ValueError`, with what was probably meant, for a `--setting` that no dataclass of `kinds` has."""
    known = setting_names(kinds)
    # A switch that is on unless set can be turned off by its name, too.
    negated = {f"no_{item.name}" for kind in kinds for item in dataclasses.fields(kind) if item.default is True}
    for word in argv:
        option = word.partition("=")[0]
        if option.startswith("--") and option != "--help" and option[2:].replace("-", "_") not in known | negated:
            raise ValueError(f"Unknown setting {option!r}.{explain_unknown(option, known)}")


def check_places(argv: Sequence[str], kinds: Sequence[type], folder: str | None) -> None:
    """Raise `ValueError` if a YAML, by its path or by the name of one in `folder`, is not the first argument."""
    hints = {name: kind for owner in kinds for name, kind in typing.get_type_hints(owner).items()}
    switches = {name for name, kind in hints.items() if bool in (kind, *typing.get_args(kind))}
    shipped = shipped_yamls(folder) if folder else {}
    for before, word in itertools.pairwise(argv):
        if word.startswith("-") or (Path(word).suffix not in (".yaml", ".yml") and word not in shipped):
            continue
        # Else it is the value of the setting before it.
        if not before.startswith("--") or "=" in before or before[2:].replace("-", "_") in switches:
            rest = " ".join(other for other in argv if other is not word)
            raise ValueError(f"The YAML of settings must be the first argument, and the only one: {word} {rest}")


def choices_hint(message: str) -> str:
    """The `message` of argparse; about a value that is no choice, with the choices that look like it."""
    found = re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message)
    if found is None:
        return message
    return message + did_you_mean(found[1], [name.strip(" '") for name in found[2].split(",")])
