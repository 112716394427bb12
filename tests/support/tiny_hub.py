"""Tiny models and data in folders that have the names of those on the Hub, for code that loads them by these names."""

from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model
from tiny_glue import make_rows, save_bert, save_decoder, write_rows
from transformers import AutoModelForSequenceClassification

from hf_lsam_recipes.support.images.resnets import CifarResNet, CifarResNetConfig

ENCODERS = ("google-bert/bert-base-cased", "sentence-transformers/all-MiniLM-L6-v2")
DECODERS = ("HuggingFaceTB/SmolLM2-135M",)
TASKS = ("rte", "sst2")


def write_hub(folder: Path) -> None:
    """Models, tasks of GLUE, and what the recipes of the pages leave; whoever runs in `folder` finds them by name."""
    for name in ENCODERS:
        save_bert(folder / name)
    for name in DECODERS:
        save_decoder(folder / name, "qwen2")
    glue = folder / "nyu-mll" / "glue"
    configs = []
    for task in TASKS:
        write_rows(glue / task / "train.jsonl", make_rows(task, 640))
        write_rows(glue / task / "validation.jsonl", make_rows(task, 16, seed=1))
        configs.append({"config_name": task, "data_dir": task})
    (glue / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    CifarResNet(CifarResNetConfig(depth=8)).save_pretrained(folder / "outputs" / "images" / "cifar10_resnet20")
    base = AutoModelForSequenceClassification.from_pretrained(folder / ENCODERS[0])
    base.name_or_path = base.config._name_or_path = ENCODERS[0]
    adapter = folder / "outputs" / "glue" / "rte_lora"
    base.config.save_pretrained(adapter / "model_config")
    get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear")).save_pretrained(adapter)


def rows(count: int) -> list[dict]:
    """Tokenised rows with two labels, for the encoders."""
    tokens = torch.randint(4, 16, (count, 8), generator=torch.Generator().manual_seed(0))
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": torch.tensor(number % 2)}
        for number, row in enumerate(tokens)
    ]
