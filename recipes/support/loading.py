"""Which model a recipe fine-tunes, and how it, its tokenizer and its adapter are loaded."""

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
            in float32, which is precise enough for a small `rho`. Without `do_train` it may be an adapter,
            whose base is loaded with it.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the model.
    """

    model_name_or_path: str = field(metadata={"help": "Name on the Hub, or folder, of the model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


@dataclass(frozen=True)
class ModelSource:
    """
    A model that was found, but is not loaded yet.

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
        ValueError: if there are none, if the tokenizer has no vocabulary, if the model is an adapter and is to be
            trained, or if nothing can serve as padding.
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
            f"model_name_or_path={name} is an adapter, which can be evaluated and predicts. To train, name the model "
            f"that it was made for ({base}); to go on with an interrupted run, add resume_from_checkpoint."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"The tokenizer of {name} has neither a pad_token nor an eos_token: give it a pad_token.")
        tokenizer.pad_token = tokenizer.eos_token
    return ModelSource(name, code, base, config, tokenizer)


def load_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """
    The tokenizer of the model `name`.

    Raises:
        ValueError: if there is none. Of a folder without its files, transformers makes a tokenizer that knows no word.
    """
    way_out = (
        "If its tokenizer files are missing, save them beside the model, from the model that it was made of: "
        f"AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained({name!r})."
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises plain exceptions
        raise ValueError(
            f"The tokenizer of model_name_or_path={name} cannot be loaded: {' '.join(str(error).split())} {way_out}"
        ) from error
    # SentencePiece's mark of a space is not a word.
    if {token for token in tokenizer.get_vocab() if token.strip("▁")} <= {*tokenizer.all_special_tokens}:
        raise ValueError(
            f"The tokenizer of model_name_or_path={name} knows no token but its special ones: every text would look "
            f"the same. {way_out}"
        )
    return tokenizer


def check_weights(name: str, missing: Iterable[str]) -> None:
    """Raise `ValueError` if weights are `missing` in the checkpoint of the model `name`, which is not trained here."""
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
    The model of `auto_class`, in float32, with its own adapter or, for training, a fresh one if wanted.

    Raises:
        ValueError: if it is not to be trained, and its checkpoint lacks some of its weights.
    """
    model, loaded = auto_class.from_pretrained(
        source.base or source.name,
        trust_remote_code=source.trust_remote_code,
        dtype=torch.float32,
        output_loading_info=True,
        **settings,
    )
    # A decoder uses it to find the last token of a text.
    model.config.get_text_config().pad_token_id = source.tokenizer.pad_token_id
    # An adapter contains what its base lacks.
    if source.base is not None:
        return load_adapter(model, source.name)
    if training and adapter_args.enabled:
        return add_adapter(model, adapter_args, set(loaded["missing_keys"]), task_type)
    if not training:
        check_weights(source.name, loaded["missing_keys"])
    return model
