"""The README of a fine-tuned model: what it is, how layer-wise SAM was set, how it did, and whom to cite."""

import dataclasses
import json
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from glue_tasks import HUB_NAME, DataArguments
from huggingface_hub import ModelCard, ModelCardData

from hf_lsam import LSAMTrainer

TRAINING_FIELDS = (
    "seed",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "mixed_precision",
)

TEMPLATE = """
# A text {kind}, fine-tuned {method}

Made by the recipe `run_glue.py` of `hf_lsam`.

## Training

{training}

### Settings of layer-wise SAM

{lsam}

## Results

{metrics}

## Citation

Layer-wise SAM perturbs only the layers whose gradients are largest before it takes the gradient:

```bibtex
@inproceedings{{lee2024layerwise,
    title     = {{Layer-wise Adaptive Gradient Norm Penalizing Method for Efficient and Accurate Deep Learning}},
    author    = {{Sunwoo Lee}},
    booktitle = {{Proceedings of the ACM SIGKDD Conference on Knowledge Discovery and Data Mining (KDD)}},
    year      = {{2024}},
    eprint    = {{2503.14205}},
    archivePrefix = {{arXiv}},
    url       = {{https://arxiv.org/abs/2503.14205}}
}}
```
"""


def write_model_card(
    trainer: LSAMTrainer,
    model_name: str,
    data_args: DataArguments,
    metrics: dict[str, float],
    adapter: dict[str, Any] | None = None,
):
    """
    Write `README.md` beside the model, and to the Hub where the Trainer pushes to it.

    Args:
        trainer (`LSAMTrainer`): The trainer that trained the model.
        model_name (`str`): Name or folder of the model that was fine-tuned.
        data_args (`DataArguments`): The data that it was trained on.
        metrics (`dict[str, float]`): The metrics of training and evaluation.
        adapter (`dict[str, Any]`, *optional*): The settings of the LoRA adapter, if one was trained.
    """
    args, lsam_config = trainer.args, trainer.lsam_config
    on_hub = not Path(model_name).is_dir()
    task, from_hub = data_args.task_name, data_args.task_name is not None and data_args.data_dir is None
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification",
        tags=["hf_lsam", "layer-wise-sam", "sharpness-aware-minimization"],
        datasets=HUB_NAME if from_hub else None,
        base_model=model_name if on_hub else None,
    )
    training = {
        "model": model_name if on_hub else Path(model_name).name,
        "data": f"GLUE {task} ({'Hub' if from_hub else 'local files'})" if task else "files of the user's own",
        **({"adapter": adapter} if adapter else {}),
        **{name: getattr(args, name) for name in TRAINING_FIELDS},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf-lsam": _own_version(),
        },
    }
    content = TEMPLATE.format(
        kind=("regression" if data_args.is_regression else "classification") + (" adapter" if adapter else " model"),
        method="with layer-wise SAM" if lsam_config.enabled else "without perturbation (layer-wise SAM is off)",
        training=_json_block(training),
        lsam=_json_block(dataclasses.asdict(lsam_config)),
        metrics=_json_block(metrics),
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n{content}")
    card.save(Path(args.output_dir) / "README.md")
    if args.push_to_hub:
        card.push_to_hub(trainer.hub_model_id, token=args.hub_token)


def _own_version() -> str:
    try:
        return version("hf-lsam")
    except PackageNotFoundError:
        return "not installed"


def _json_block(values: dict) -> str:
    """
    A fenced block of JSON, in which no value can end the block or pass for markup.

    JSON escapes line breaks, so each line starts with a key or a bracket, and never with the fence.
    """
    rounded = {
        name: float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value
        for name, value in values.items()
    }
    return f"```json\n{json.dumps(rounded, indent=2, ensure_ascii=False, default=str)}\n```"
