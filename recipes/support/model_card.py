"""The README of a fine-tuned model: what it is, how layer-wise SAM was set, how it did, and whom to cite."""

import dataclasses
import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

import hf_lsam
from hf_lsam import LSAMTrainer

TRAINING_FIELDS = (
    "seed",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "mixed_precision",
)

OWN_FILES = "files of the user's own"

TEMPLATE = """
# {kind}, {made} {method}

Made by the recipe `{recipe}` of `hf_lsam`.

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


@dataclass(frozen=True)
class Subject:
    """
    What a model was made for, and of.

    Args:
        recipe (`str`): Name of the script.
        kind (`str`): What stands before "model" or "adapter" in the title.
        pipeline_tag (`str`): The task, as the Hub names it.
        data (`str`): The data that it was trained on.
        dataset (`str` or `None`): Its name on the Hub, if it is from there.
        from_scratch (`bool`): Whether the weights were random before; the model's name is then that of no model.
    """

    recipe: str
    kind: str
    pipeline_tag: str
    data: str
    dataset: str | None
    from_scratch: bool = False


def write_model_card(
    trainer: LSAMTrainer,
    model_name: str,
    subject: Subject,
    metrics: dict[str, float],
    adapter: dict[str, Any] | None = None,
):
    """
    Write `README.md` beside the model, and to the Hub where the Trainer pushes to it.

    Args:
        trainer (`LSAMTrainer`): The trainer that trained the model.
        model_name (`str`): Name or folder of the model that was fine-tuned.
        subject (`Subject`): What the model was made for, and of.
        metrics (`dict[str, float]`): The metrics of training and evaluation.
        adapter (`dict[str, Any]`, *optional*): The settings of the LoRA adapter, if one was trained.
    """
    args, lsam_config = trainer.args, trainer.lsam_config
    on_hub = not Path(model_name).is_dir()
    article = "An" if subject.kind[0] in "aeiou" else "A"
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag=subject.pipeline_tag,
        tags=["hf_lsam", "layer-wise-sam", "sharpness-aware-minimization"],
        datasets=subject.dataset,
        base_model=model_name if on_hub and not subject.from_scratch else None,
    )
    training = {
        "model": model_name if on_hub else Path(model_name).name,
        "data": subject.data,
        **({"adapter": adapter} if adapter else {}),
        **{name: getattr(args, name) for name in TRAINING_FIELDS},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf-lsam": hf_lsam.__version__,
        },
    }
    content = TEMPLATE.format(
        kind=f"{article} {subject.kind} {'adapter' if adapter else 'model'}",
        made="trained" if subject.from_scratch else "fine-tuned",
        recipe=subject.recipe,
        method="with layer-wise SAM" if lsam_config.enabled else "without perturbation (layer-wise SAM is off)",
        training=_json_block(training),
        lsam=_json_block(dataclasses.asdict(lsam_config)),
        metrics=_json_block(metrics),
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n{content}")
    card.save(Path(args.output_dir) / "README.md")
    if args.push_to_hub:
        card.push_to_hub(trainer.hub_model_id, token=args.hub_token)


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
