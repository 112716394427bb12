"""Which model a recipe fine-tunes, and how it, its tokenizer and its adapter are loaded."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import TaskType
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_lsam_recipes.support.adapters import AdapterArguments, add_adapter, find_base, load_adapter, load_config


@dataclass
class ModelArguments:
    """
    Which model to fine-tune.

    Args:
        model_name_or_path (`str`):
            Any model that transformers loads for the task: its name on the Hub, or its folder. Its weights are loaded
            as 32-bit numbers, whose steps are fine enough for a small `rho`. Without `do_train` it may be an adapter,
            whose base is loaded with it.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the model.
    """

    model_name_or_path: str = field(metadata={"help": "Name on the Hub, or folder, of the model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


@dataclass(frozen=True)
class ModelSource:
    """
    A model that is there, but not yet loaded.

    Args:
        name (`str`): Its name on the Hub, or its folder.
        trust_remote_code (`bool`): Whether to run code that comes with it.
        base (`str` or `None`): The model that it is an adapter for; `None` if it is no adapter.
        config (`PreTrainedConfig`): The configuration of the whole model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, which has a padding token.
    """

    name: str
    trust_remote_code: bool
    base: str | None
    config: Any
    tokenizer: PreTrainedTokenizerBase


def find_model(args: ModelArguments, training: bool) -> ModelSource:
    """
    Load the configuration and the tokenizer.

    Raises:
        ValueError: if there are none, if it is an adapter and is to be trained, or if nothing can serve as padding.
    """
    name, code = args.model_name_or_path, args.trust_remote_code
    try:
        base = find_base(name)
        config = load_config(name, base, code)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=code)
    except (OSError, ValueError) as error:
        raise ValueError(f"model_name_or_path={name} cannot be loaded: {' '.join(str(error).split())}") from error
    if training and base is not None:
        raise ValueError(
            f"model_name_or_path={name} is an adapter, which can be evaluated and predicts. To train, name the model "
            f"that it was made for ({base}); to go on with an interrupted run, add resume_from_checkpoint."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"The tokenizer of {name} has neither a pad_token nor an eos_token: give it a pad_token.")
        tokenizer.pad_token = tokenizer.eos_token
    return ModelSource(name, code, base, config, tokenizer)


def load_model(
    auto_class,
    source: ModelSource,
    adapter_args: AdapterArguments,
    task_type: TaskType,
    training: bool,
    **settings: Any,
):
    """The model of `auto_class`, in 32-bit numbers, with its own adapter or, for training, a fresh one if wanted."""
    model, loaded = auto_class.from_pretrained(
        source.base or source.name,
        trust_remote_code=source.trust_remote_code,
        dtype=torch.float32,
        output_loading_info=True,
        **settings,
    )
    # A decoder finds the last token of a text by it.
    model.config.get_text_config().pad_token_id = source.tokenizer.pad_token_id
    if source.base is not None:
        return load_adapter(model, source.name)
    if training and adapter_args.enabled:
        return add_adapter(model, adapter_args, set(loaded["missing_keys"]), task_type)
    return model
