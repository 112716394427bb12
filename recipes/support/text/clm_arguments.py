"""Settings of the data of `run_clm.py`, and of the answers that it generates."""

import re
from dataclasses import dataclass, field

# The last line of a GSM8K solution: a number, possibly with thousands separators.
NUMBER_AFTER_HASHES = r"####\s*\$?(-?[\d,]*\.?\d+)"


@dataclass
class DataArguments:
    r"""
    Which text to train and evaluate on: plain text, or prompts with their responses.

    > Parameters for the source

    Args:
        dataset_name, dataset_config_name (`str`, *optional*):
            Name and configuration of a data set on the Hub.
        train_split, validation_split (`str`, *optional*):
            Its splits. Default: `train`, and a part of it that is held out for validation.
        train_file, validation_file (`str`, *optional*):
            Local files instead of the Hub: `.txt` (one text), or `.tsv`, `.csv`, `.jsonl` or `.parquet` with columns.
        validation_fraction (`float`, *optional*, defaults to `0.05`):
            Without validation data, this fraction of the training rows is held out (of a `.txt`, its end). The rows
            are the same for every seed, and are also left out in a run without `do_eval`.
        neutral_file (`str`, *optional*):
            Text of another domain (`.txt`, or a file with a column `text`) that measures forgetting: its loss is
            reported before training as `eval_neutral_loss_before`, and after it as `eval_neutral_loss`. Needs
            `do_eval`.
        max_train_samples, max_eval_samples (`int`, *optional*):
            Maximum number of examples, from the first on. With packing, an example is a block.

    > Parameters for the format

    Args:
        text_column (`str`, *optional*, defaults to `"text"`):
            The column of plain text.
        prompt_column, response_column (`str`, *optional*):
            The columns of prompts and responses. Only tokens of the response contribute to the loss.
        template (`str`, *optional*, defaults to `"{prompt}\n{response}"`):
            How prompt and response are joined. Spaces before `{response}` are tokenized with the response, since many
            tokenizers join a space with the next word.
        use_chat_template (`bool`, *optional*, defaults to `False`):
            Whether to join them by the tokenizer's chat template instead.

    > Parameters for the length of examples

    Args:
        packing (`bool`, *optional*, defaults to `True`):
            Whether to concatenate all texts, each followed by the end-of-text token, and cut them into blocks.
            Attention then crosses the boundaries of texts. Otherwise each row is an example, padded to the longest in
            its batch.
        block_size (`int`, *optional*):
            Number of tokens of a block, or maximum of an example. Default: the context of the model, at most 1024.

    Raises:
        ValueError: if a setting is out of range, or two settings contradict each other.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    train_split: str = field(default="train", metadata={"help": "Its split to train on."})
    validation_split: str | None = field(default=None, metadata={"help": "Its split to evaluate on."})
    train_file: str | None = field(default=None, metadata={"help": "Training data: txt, tsv, csv, jsonl, parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation data, of the same columns."})
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Fraction of the training rows to hold out if there is no validation data."}
    )
    neutral_file: str | None = field(
        default=None, metadata={"help": "Text of another domain; its loss before and after training is reported."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Maximum number of training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Maximum number of validation examples."})
    text_column: str | None = field(default=None, metadata={"help": "Column of plain text; 'text' unless set."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column of the prompts."})
    response_column: str | None = field(default=None, metadata={"help": "Column of the responses."})
    template: str = field(
        default="{prompt}\n{response}", metadata={"help": "How a prompt and its response are joined."}
    )
    use_chat_template: bool = field(default=False, metadata={"help": "Join them by the tokenizer's chat template."})
    packing: bool = field(
        default=True, metadata={"help": "Join all texts and cut them into blocks; false: pad each row."}
    )
    block_size: int | None = field(default=None, metadata={"help": "Tokens of a block, or maximum of an example."})

    def __post_init__(self):
        self._check_source()
        if (self.prompt_column is None) != (self.response_column is None):
            raise ValueError("prompt_column and response_column go together: set both, or text_column.")
        if self.has_prompts and self.text_column is not None:
            raise ValueError("text_column is for plain text, and prompt_column for prompts: leave one of them out.")
        changed = [n for n in ("template", "use_chat_template") if getattr(self, n) != getattr(type(self), n)]
        if changed and not self.has_prompts:
            raise ValueError(f"{changed[0]} is for prompts and responses: set prompt_column and response_column.")
        if len(changed) == 2:
            raise ValueError("use_chat_template uses the tokenizer's own template: leave template out.")
        prompt, response = self.template.find("{prompt}"), self.template.find("{response}")
        once = all(self.template.count(place) == 1 for place in ("{prompt}", "{response}"))
        if not once or response < prompt:
            raise ValueError(
                f"template must contain {{prompt}} once and {{response}} once after it, but is {self.template!r}."
            )
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must be at least 0 and less than 1, but is {self.validation_fraction}."
            )
        for name in ("block_size", "max_train_samples", "max_eval_samples"):
            value, least = getattr(self, name), 2 if name == "block_size" else 1
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, but is {value}.")

    @property
    def has_prompts(self) -> bool:
        """Whether the data are prompts with responses."""
        return self.prompt_column is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of plain text, or those of prompts and responses."""
        if self.prompt_column is not None and self.response_column is not None:
            return self.prompt_column, self.response_column
        return (self.text_column or "text",)

    def _check_source(self):
        files = [name for name in ("train_file", "validation_file") if getattr(self, name)]
        if self.dataset_name is None:
            if not files:
                raise ValueError("No data: set dataset_name to a data set on the Hub, or train_file to a file.")
            hub = [n for n in ("dataset_config_name", "validation_split") if getattr(self, n)]
            hub += ["train_split"] if self.train_split != "train" else []
            if hub:
                raise ValueError(f"{hub[0]} is for data on the Hub, and {files[0]} is a file: leave it out.")
        elif files:
            raise ValueError(f"dataset_name and {files[0]} both say where the data is: leave one of them out.")


@dataclass
class GenerationArguments:
    """
    Whether the model answers prompts after training, and how its answers are scored.

    Args:
        max_generation_samples (`int`, *optional*, defaults to `0`):
            Number of validation prompts, from the first on, that are answered by greedy decoding. `eval_exact_match`
            is the fraction of correct answers. 0: none.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Maximum number of tokens of an answer.
        answer_pattern (`str`, *optional*):
            Regular expression that extracts the answer from a response: its first match or, if it has groups, the
            first group. Answers are compared without surrounding space and, if both are numbers, by value. Default:
            a number after `####`, as in GSM8K. `(?s).*` compares whole responses.

    Raises:
        ValueError: if a setting is out of range, or `answer_pattern` is not a regular expression.
    """

    max_generation_samples: int = field(
        default=0, metadata={"help": "Number of validation prompts to answer; 0: none."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Maximum number of tokens of an answer."})
    answer_pattern: str = field(
        default=NUMBER_AFTER_HASHES, metadata={"help": "Regular expression that extracts the answer."}
    )

    def __post_init__(self):
        for name, least in (("max_generation_samples", 0), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, but is {getattr(self, name)}.")
        try:
            re.compile(self.answer_pattern)
        except re.error as error:
            raise ValueError(
                f"answer_pattern {self.answer_pattern!r} is not a regular expression: {error}."
            ) from error
