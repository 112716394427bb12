"""The settings that say which text `run_clm.py` works on, and how it is formatted."""

import re
from dataclasses import dataclass, field

# The last line of a solution in GSM8K: a number, perhaps with commas.
NUMBER_AFTER_HASHES = r"####\s*\$?(-?[\d,]*\.?\d+)"


@dataclass
class DataArguments:
    r"""
    Which text to train and evaluate on: running text, or prompts with their responses.

    > Parameters that say where it is

    Args:
        dataset_name, dataset_config_name (`str`, *optional*):
            A data set on the Hub.
        train_split, validation_split (`str`, *optional*):
            Its splits; `train`, and part of it, unless set.
        train_file, validation_file (`str`, *optional*):
            Files instead: `.txt` (one text), or `.tsv`, `.csv`, `.jsonl` or `.parquet` with named columns.
        validation_fraction (`float`, *optional*, defaults to `0.05`):
            Without validation data, this share of the training rows is held out (of a `.txt`, the end): always the
            same rows, whatever the seed, and in a run without `do_eval`, too.
        neutral_file (`str`, *optional*):
            Text of another kind (`.txt`, or a file with a column `text`), to see what training makes the model forget:
            its loss is `eval_neutral_loss_before` and, after training, `eval_neutral_loss`. Needs do_eval.
        max_train_samples, max_eval_samples (`int`, *optional*):
            Use the first so many examples only: blocks, where they are packed.

    > Parameters that say what it is

    Args:
        text_column (`str`, *optional*, defaults to `"text"`):
            The column of running text.
        prompt_column, response_column (`str`, *optional*):
            The columns of prompts and responses. The loss is on the response only.
        template (`str`, *optional*, defaults to `"{prompt}\n{response}"`):
            How the two are put together. Its spaces before `{response}` count as part of the response, as tokenizers
            want it.
        use_chat_template (`bool`, *optional*, defaults to `False`):
            Whether the tokenizer's chat template puts them together instead.

    > Parameters that say how it is cut

    Args:
        packing (`bool`, *optional*, defaults to `True`):
            Whether to join all texts, each ended by the end-of-text token, and cut them into blocks; attention then
            reaches across texts. Otherwise each row is an example, padded to the longest of its batch.
        block_size (`int`, *optional*):
            Tokens of a block, or of the longest example. Not set: the model's context, but at most 1024.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    train_split: str = field(default="train", metadata={"help": "Its split to train on."})
    validation_split: str | None = field(default=None, metadata={"help": "Its split to evaluate on."})
    train_file: str | None = field(default=None, metadata={"help": "Training data: txt, tsv, csv, jsonl, parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation data, of the same columns."})
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the training rows to hold out, without validation data."}
    )
    neutral_file: str | None = field(
        default=None, metadata={"help": "Text of another kind, whose loss before and after training is reported."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many examples."})
    text_column: str | None = field(default=None, metadata={"help": "Column of running text; 'text' unless set."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column of the prompts."})
    response_column: str | None = field(default=None, metadata={"help": "Column of the responses."})
    template: str = field(
        default="{prompt}\n{response}", metadata={"help": "How a prompt and its response are put together."}
    )
    use_chat_template: bool = field(default=False, metadata={"help": "The tokenizer's chat template does that."})
    packing: bool = field(default=True, metadata={"help": "Join all texts and cut them; false pads each row."})
    block_size: int | None = field(default=None, metadata={"help": "Tokens of a block, or of the longest example."})

    def __post_init__(self):
        self._check_source()
        if (self.prompt_column is None) != (self.response_column is None):
            raise ValueError("prompt_column and response_column go together: set both, or text_column.")
        if self.has_prompts and self.text_column is not None:
            raise ValueError("text_column is for running text, and prompt_column is not: leave one of them out.")
        changed = [n for n in ("template", "use_chat_template") if getattr(self, n) != getattr(type(self), n)]
        if changed and not self.has_prompts:
            raise ValueError(f"{changed[0]} is for prompts and responses: set prompt_column and response_column.")
        if len(changed) == 2:
            raise ValueError("use_chat_template takes the tokenizer's own template: leave template out.")
        prompt, response = self.template.find("{prompt}"), self.template.find("{response}")
        once = all(self.template.count(place) == 1 for place in ("{prompt}", "{response}"))
        if not once or response < prompt:
            raise ValueError(
                f"template must hold {{prompt}} once, and {{response}} once behind it, but is {self.template!r}."
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
        """The column of running text, or those of the prompts and of the responses."""
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
            How many prompts of the validation data, from the first on, are answered greedily: the share of answers
            that match is `eval_exact_match`. 0: none.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Tokens after which an answer is cut off.
        answer_pattern (`str`, *optional*):
            Regular expression that finds the answer in a response: its first match, or the first group of that. Both
            sides are stripped, and compared as numbers, without commas, where they are. Default: GSM8K's, a number
            after `####`. `(?s).*` compares whole responses.
    """

    max_generation_samples: int = field(default=0, metadata={"help": "Validation prompts to answer; 0 is none."})
    max_new_tokens: int = field(default=256, metadata={"help": "Tokens after which an answer is cut off."})
    answer_pattern: str = field(
        default=NUMBER_AFTER_HASHES, metadata={"help": "Regular expression that finds the answer in a response."}
    )

    def __post_init__(self):
        for name, least in (("max_generation_samples", 0), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, but is {getattr(self, name)}.")
        try:
            re.compile(self.answer_pattern)
        except re.error as error:
            raise ValueError(f"answer_pattern {self.answer_pattern!r} is no regular expression: {error}.") from error
