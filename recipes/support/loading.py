"""Loading of the model that a recipe fine-tunes, with its tokenizer and adapter."""

from collections.abc import Iterable
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
            in float32, which is precise enough for a small `rho`. Without `do_train` it may be an adapter, whose base
            model is then loaded as well.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the model.
    """

    model_name_or_path: str = field(metadata={"help": "Name on the Hub, or folder, of the model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


@dataclass(frozen=True)
class ModelSource:
    """
    A model whose configuration and tokenizer are loaded, but not its weights.

    Args:
        name (`str`): Its name on the Hub, or its folder.
        trust_remote_code (`bool`): Whether to run code that comes with it.
        base (`str` or `None`): The base model if it is an adapter, else `None`.
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
    Load the configuration and the tokenizer of a model.

    Args:
        args (`ModelArguments`): The model.
        training (`bool`): Whether it is going to be trained.

    Raises:
        ValueError: if either cannot be loaded, if the tokenizer has no vocabulary, if the model is an adapter but is
            to be trained, or if the tokenizer has no token for padding.
    """
    name, code = args.model_name_or_path, args.trust_remote_code
    try:
        base = find_base(name)
        config = load_config(name, base, code)
    except (OSError, ValueError) as error:
        raise ValueError(f"model_name_or_path={name} cannot be loaded: {' '.join(str(error).split())}") from error
    tokenizer = load_tokenizer(name, code)
    if training and base is not None:
        raise ValueError(
            f"model_name_or_path={name} is an adapter, which can only be evaluated or used for prediction. To train, "
            f"name its base model ({base}); to resume an interrupted run, also set resume_from_checkpoint."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"The tokenizer of model_name_or_path={name} has neither a pad_token nor an eos_token: save it with a "
                "pad_token."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return ModelSource(name, code, base, config, tokenizer)


def load_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of the model `name`.

    Raises:
        ValueError: if it cannot be loaded, or has no vocabulary: transformers returns such a tokenizer for a folder
            without tokenizer files.
    """
    way_out = (
        "If its tokenizer files are missing, save them with the model, from the model that it was fine-tuned from: "
        f"AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained({name!r})."
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises plain exceptions
        raise ValueError(
            f"The tokenizer of model_name_or_path={name} cannot be loaded: {' '.join(str(error).split())} {way_out}"
        ) from error
    # "▁" is SentencePiece's mark of a space, not a word.
    if {token for token in tokenizer.get_vocab() if token.strip("▁")} <= {*tokenizer.all_special_tokens}:
        raise ValueError(
            f"The tokenizer of model_name_or_path={name} has only special tokens: all texts would be encoded alike. "
            f"{way_out}"
        )
    return tokenizer


def check_weights(name: str, missing: Iterable[str]) -> None:
    """Raise `ValueError` if weights are `missing` in the checkpoint of a model `name` that will not be trained."""
    if names := sorted(missing):
        raise ValueError(
            f"model_name_or_path={name} has no trained weights for {', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}: they, and its predictions, would be random. Set do_train to train "
            "it first, or name a model that was trained for this task."
        )


def load_model(
    auto_class,
    source: ModelSource,
    adapter_args: AdapterArguments,
    task_type: TaskType,
    training: bool,
    **settings: Any,
):
    """
    Load the model in float32, with its own adapter or, for training, a new one if `adapter_args` enable it.

    Args:
        auto_class: A class of transformers such as `AutoModelForCausalLM`.
        source (`ModelSource`): The result of `find_model`.
        adapter_args (`AdapterArguments`): Settings of a new adapter.
        task_type (`TaskType`): The task of a new adapter.
        training (`bool`): Whether the model is going to be trained.
        settings: Further arguments of `from_pretrained`.

    Raises:
        ValueError: if an adapter does not fit, or if a model that is not trained lacks weights in its checkpoint.
    """
    model, loaded = auto_class.from_pretrained(
        source.base or source.name,
        trust_remote_code=source.trust_remote_code,
        dtype=torch.float32,
        output_loading_info=True,
        **settings,
    )
    # A decoder that classifies uses it to find the last token of a text.
    model.config.get_text_config().pad_token_id = source.tokenizer.pad_token_id
    # An adapter contains what its base lacks.
    if source.base is not None:
        return load_adapter(model, source.name)
    if training and adapter_args.enabled:
        return add_adapter(model, adapter_args, set(loaded["missing_keys"]), task_type)
    if not training:
        check_weights(source.name, loaded["missing_keys"])
    return model
