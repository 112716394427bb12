"""Tiny models and tiny data for the tests of the recipes."""

import csv
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hf_lsam_recipes.support.text.glue_tasks import GLUE_TASKS

QUICK = ["--use_cpu", "--disable_tqdm", "true", "--max_steps", "2", "--per_device_train_batch_size", "4"]
WORDS = ["film", "good", "bad", "the", "a", "is", '"', "NA", "null", "''", "dull", "bright"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def save_tokenizer(folder: Path, *, with_padding: bool = True):
    """A tokenizer of whole words; without padding, it is a decoder's."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", "model_max_length": 32}
    if with_padding:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        special |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        special |= {"eos_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def save_bert(folder: Path, **settings) -> str:
    """A random BERT of 3 blocks, with its tokenizer; returns its folder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        **settings,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def save_decoder(folder: Path, kind: str = "llama", **settings) -> str:
    """A random decoder of 2 blocks: a Llama without a padding token, or a Qwen2 with one."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[kind]
    torch.manual_seed(0)
    # A checkpoint of Qwen2 names no padding token: only its tokenizer does.
    config = config_class(
        vocab_size=16, eos_token_id=3, initializer_range=0.3, num_key_value_heads=1, **sizes, **settings
    )
    assert config.pad_token_id is None
    model_class(config).save_pretrained(folder)
    save_tokenizer(folder, with_padding=kind == "qwen2")
    return str(folder)


def make_rows(task: str, count: int, *, labelled: bool = True, seed: int = 0) -> list[dict]:
    """Random rows of a GLUE task, with every label among them and quotation marks in the texts."""
    rng = random.Random(seed)
    spec = GLUE_TASKS[task]
    rows = []
    for number in range(count):
        row: dict = {name: " ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for name in spec.columns}
        if labelled and spec.labels is None:
            row["label"] = number % 11 / 2
        elif labelled and spec.labels:
            row["label"] = number % len(spec.labels)
        rows.append(row)
    return rows


def write_rows(path: Path, rows: Iterable[Mapping]) -> Path:
    """Write rows in the form that the file's suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dict(row) for row in rows]
    if path.suffix == ".tsv":
        lines = [list(rows[0]), *(row.values() for row in rows)]
        path.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_task(folder: Path, task: str, count: int = 16) -> str:
    """All files of a GLUE task, as TSV; returns `data_dir`."""
    sets = ("",) if task != "mnli" else ("_matched", "_mismatched")
    write_rows(folder / task / "train.tsv", make_rows(task, count))
    for seed, name in enumerate(sets, start=1):
        write_rows(folder / task / f"dev{name}.tsv", make_rows(task, count, seed=seed))
        write_rows(folder / task / f"test{name}.tsv", make_rows(task, count // 2, labelled=False, seed=seed + 2))
    return str(folder)


def files_in(folder: Path) -> dict[str, bytes]:
    """The content of every file below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rte(model: str, data: str, output: Path) -> list[str]:
    return [
        "--model_name_or_path",
        model,
        "--task_name",
        "rte",
        "--data_dir",
        data,
        "--output_dir",
        str(output),
        *QUICK,
    ]
