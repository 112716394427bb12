"""The data of `run_clm.py`: token ids and labels, checked before a model is built."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_lsam_recipes.support.tables import SUFFIXES, check_columns, check_file, load_hub, read_table, read_texts
from hf_lsam_recipes.support.text.clm_arguments import DataArguments

NO_LABEL = -100
LARGEST_DEFAULT_BLOCK = 1024


@dataclass(frozen=True)
class Rows:
    """Rows of text, `(text,)` or `(prompt, response)`, and the name of their `source` for messages."""

    source: str
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Examples:
    """
    Tokenized examples of a split.

    Args:
        dataset (`Dataset`): The columns `input_ids` and `labels`.
        truncated (`int`): Number of rows of the whole split that were truncated to `block_size` tokens.
        dropped (`int`): Number of examples of the whole split that were left out because they have no label.
    """

    dataset: Dataset
    truncated: int
    dropped: int


def find_block_size(args: DataArguments, config, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return `block_size` or its default for the model; raises `ValueError` if it exceeds the context of the model."""
    # Models without position embeddings have no limit of their own, but their tokenizers may.
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    if args.block_size is not None and args.block_size > context:
        raise ValueError(
            f"block_size={args.block_size} is larger than the context of the model, {context} tokens: set it to that "
            "or less."
        )
    return args.block_size or min(LARGEST_DEFAULT_BLOCK, context)


def load_rows(args: DataArguments, splits: Sequence[str]) -> dict[str, Rows]:
    """
    Read the rows of `splits`: `train`, `validation` or both.

    Raises:
        ValueError: for data that is missing or does not fit the settings; names the source and the setting.
    """
    given = args.validation_split if args.dataset_name else args.validation_file
    hold_out = given is None and args.validation_fraction > 0
    if given is None and not hold_out and "validation" in splits:
        raise ValueError(
            "No validation data: set validation_file, validation_split or validation_fraction, or leave out do_eval."
        )
    needed = ["train"] if hold_out else splits
    read = _read_hub(args, needed) if args.dataset_name else _read_files(args, needed)
    if hold_out:
        read = _hold_out(read["train"], args.validation_fraction)
    return {split: read[split] for split in splits}


def prompt_and_response(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, prompt: str, response: str
) -> tuple[str, str]:
    """
    Format a row; returns the text that the model is given, and the text that it should generate.

    Raises:
        ValueError: if `use_chat_template` is set, but the tokenizer has no suitable chat template.
    """
    if args.use_chat_template:
        if tokenizer.chat_template is None:
            raise ValueError("use_chat_template: the tokenizer has no chat template. Set template instead.")
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        before = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        if not whole.startswith(before):
            raise ValueError(
                "use_chat_template: the tokenizer's chat template formats a prompt differently with and without its "
                "response, so that the response cannot be separated. Set template instead."
            )
        return before, whole[len(before) :]
    head, tail = args.template.split("{response}")
    before = head.rstrip(" ")
    return before.replace("{prompt}", prompt), head[len(before) :] + response + tail


def begin_texts(args: DataArguments, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokenize the beginnings of examples, with the first special token unless the chat template contains it."""
    first = tokenizer.bos_token_id
    starts = first is not None and tokenizer("").input_ids[:1] == [first] and not args.use_chat_template
    return [[first] * starts + ids for ids in _token_ids(tokenizer, texts)]


def make_examples(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, split: str, rows: Rows, block_size: int
) -> Examples:
    """
    Tokenize a split into blocks of `block_size` tokens or, without packing, into one example per row.

    Raises:
        ValueError: if no example has a label.
    """
    end = [] if args.use_chat_template or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    longest = None if args.packing else block_size

    def encode(batch: dict[str, list[str]]) -> dict[str, list]:
        if args.has_prompts:
            pairs = [prompt_and_response(args, tokenizer, *row) for row in zip(*batch.values(), strict=True)]
            given = begin_texts(args, tokenizer, [before for before, _ in pairs])
            learned = _token_ids(tokenizer, [after for _, after in pairs])
        else:
            learned = begin_texts(args, tokenizer, batch[args.columns[0]])
            given = [[] for _ in learned]
        encoded: dict[str, list] = {"input_ids": [], "labels": [], "truncated": [], "learnable": []}
        for before, after in zip(given, learned, strict=True):
            ids, labels = before + after + end, [NO_LABEL] * len(before) + after + end
            # The first token of an example is not predicted, since no token precedes it.
            labels[:1] = [NO_LABEL] if labels and not args.packing else labels[:1]
            encoded["truncated"].append(longest is not None and len(ids) > longest)
            encoded["input_ids"].append(ids[:longest])
            encoded["labels"].append(labels[:longest])
            encoded["learnable"].append(any(label != NO_LABEL for label in labels[:longest]))
        return encoded

    texts = dict(zip(args.columns, map(list, zip(*rows.rows, strict=True)), strict=True))
    encoded = Dataset.from_dict(texts).map(
        encode, batched=True, remove_columns=list(args.columns), desc=f"Tokenizing {split}"
    )
    truncated = sum(encoded["truncated"])
    if args.packing:
        dataset, dropped = _pack(encoded, block_size)
    else:
        kept = [index for index, learnable in enumerate(encoded["learnable"]) if learnable]
        dataset, dropped = encoded.select(kept), len(encoded) - len(kept)
    if len(dataset) == 0:
        raise ValueError(
            f"{rows.source}: no example has a token to learn, since the prompts fill block_size={block_size} or the "
            "responses are empty. Raise block_size, or check the columns."
        )
    limit = args.max_train_samples if split == "train" else args.max_eval_samples
    dataset = dataset.select_columns(["input_ids", "labels"]).select(range(min(limit or len(dataset), len(dataset))))
    return Examples(dataset, truncated, dropped)


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # Not verbose: long texts are truncated later, so they need no warning.
    return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids


def _pack(encoded: Dataset, block_size: int) -> tuple[Dataset, int]:
    """Concatenate all rows and cut them into blocks, the last maybe shorter; also counts blocks without a label."""
    flat = {name: pa.compute.list_flatten(encoded.data.column(name)).to_numpy() for name in ("input_ids", "labels")}
    blocks: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": []}
    starts = range(0, len(flat["labels"]), block_size)
    for start in starts:
        labels = flat["labels"][start : start + block_size].copy()
        labels[0] = NO_LABEL
        if (labels != NO_LABEL).any():
            blocks["input_ids"].append(flat["input_ids"][start : start + block_size])
            blocks["labels"].append(labels)
    return Dataset.from_dict(blocks), len(starts) - len(blocks["labels"])


def _read_hub(args: DataArguments, splits: Sequence[str]) -> dict[str, Rows]:
    hub = load_hub(f"dataset_name={args.dataset_name}", str(args.dataset_name), args.dataset_config_name, "train_file")
    read = {}
    for split in splits:
        name = str(getattr(args, f"{split}_split"))
        if name not in hub:
            raise ValueError(f"{args.dataset_name} has no split {name!r}, but {', '.join(hub)}: set {split}_split.")
        # Not `.data.table`, which ignores the selection of rows.
        read[split] = _rows(args, f"{args.dataset_name} {name}", hub[name].with_format("arrow")[:])
    return read


def _read_files(args: DataArguments, splits: Sequence[str]) -> dict[str, Rows]:
    read = {}
    for split in splits:
        if getattr(args, f"{split}_file") is None:
            raise ValueError(f"No {split} data: set {split}_file.")
        path = Path(getattr(args, f"{split}_file")).expanduser()
        check_file(path, (".txt", *SUFFIXES))
        if path.suffix != ".txt":
            read[split] = _rows(args, str(path), read_table(path, args.columns))
            continue
        if args.has_prompts or args.text_column is not None or not args.packing:
            raise ValueError(
                f"{path} is plain text without columns or rows: leave out text_column, prompt_column and "
                "packing=false, or name a file with columns."
            )
        read[split] = _check_text(Rows(str(path), [(path.read_text(encoding="utf-8"),)]))
    return read


def _rows(args: DataArguments, source: str, table: pa.Table) -> Rows:
    check_columns(source, table, args.columns, "Set text_column, or prompt_column and response_column")
    columns = [read_texts(source, name, table[name], keeps_empty=args.has_prompts) for name in args.columns]
    return _check_text(Rows(source, list(zip(*columns, strict=True))))


def _check_text(rows: Rows) -> Rows:
    """Leave out rows of empty plain text; raises `ValueError` if no row is left."""
    kept = [row for row in rows.rows if len(row) == 2 or row[0].strip()]
    if not kept:
        raise ValueError(f"{rows.source} holds no text.")
    return Rows(rows.source, kept)


def _hold_out(read: Rows, fraction: float) -> dict[str, Rows]:
    """Hold out a fraction of the rows for validation, at random with a fixed seed; of a single text, its end."""
    parts: dict[str, list[tuple[str, ...]]]
    if len(read.rows) == 1 and len(read.rows[0]) == 1:
        text = read.rows[0][0]
        place = int(len(text) * (1 - fraction))
        # Cut at the end of a line, unless it is the last one.
        cut = text.find("\n", place, len(text) - 1) + 1 or place
        parts = {"train": [(text[:cut],)], "validation": [(text[cut:],)]}
    else:
        count = max(1, round(fraction * len(read.rows)))
        chosen = set(random.Random(0).sample(range(len(read.rows)), count))
        parts = {
            "train": [row for index, row in enumerate(read.rows) if index not in chosen],
            "validation": [row for index, row in enumerate(read.rows) if index in chosen],
        }
    if any(rows in ([], [("",)]) for rows in parts.values()):
        raise ValueError(
            f"{read.source} is too short to hold out validation_fraction={fraction} of it: set validation_file or "
            "validation_split, or validation_fraction to 0 without do_eval."
        )
    return {split: Rows(f"{read.source} ({split} part)", rows) for split, rows in parts.items()}
