"""The README of a trained model: how to use it, how it was trained and evaluated, and what to cite."""

import dataclasses
import json
import math
import platform
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

import hf_lsam
from hf_lsam import LSAMTrainer
from hf_lsam_recipes.support.markdown import markdown_table
from hf_lsam_recipes.support.metric_names import find_score

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

OWN_FILES = "local files of the user"

TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

Trained by the recipe `{{ recipe }}` of `hf_lsam`.

## Usage

```python
{{ usage }}
```

## Training

{{ training }}

### Settings of layer-wise SAM

{{ lsam }}

## Results

{{ metrics }}

## Citation

Layer-wise SAM computes the gradient at weights of which only the layers with the largest gradient norms are perturbed:

```bibtex
@inproceedings{lee2024layerwise,
    title     = {Layer-wise Adaptive Gradient Norm Penalizing Method for Efficient and Accurate Deep Learning},
    author    = {Sunwoo Lee},
    booktitle = {Proceedings of the ACM SIGKDD Conference on Knowledge Discovery and Data Mining (KDD)},
    year      = {2024},
    eprint    = {2503.14205},
    archivePrefix = {arXiv},
    url       = {https://arxiv.org/abs/2503.14205}
}
```
"""


@dataclass(frozen=True)
class Subject:
    """
    What a model is for, and what it was trained on.

    Args:
        recipe (`str`): File name of the script.
        kind (`str`): The kind of model in the title of the card, such as `text classification`.
        pipeline_tag (`str`): The Hub's name of the task, such as `text-classification`.
        data (`str`): Description of the training data.
        dataset (`str` or `None`): Name of the data set on the Hub; `None` for local files.
        from_scratch (`bool`): Whether training started from random weights. The name of the model is then that of an
            architecture.
        pairs (`bool`): Whether an input is a pair of texts.
    """

    recipe: str
    kind: str
    pipeline_tag: str
    data: str
    dataset: str | None
    from_scratch: bool = False
    pairs: bool = False


def write_model_card(
    trainer: LSAMTrainer,
    model_name: str,
    subject: Subject,
    metrics: dict[str, float],
    adapter: dict[str, Any] | None = None,
):
    """
    Write `README.md` to the output directory, and to the Hub if `push_to_hub` is set.

    Args:
        trainer (`LSAMTrainer`): The trainer that trained the model.
        model_name (`str`): Name or folder of the model that was fine-tuned, or the name of an architecture.
        subject (`Subject`): What the model is for, and what it was trained on.
        metrics (`dict[str, float]`): The metrics of training and evaluation.
        adapter (`dict[str, Any]`, *optional*): The settings of the LoRA adapter, if one was trained.
    """
    args, lsam_config = trainer.args, trainer.lsam_config
    on_hub = not Path(model_name).is_dir()
    # Paths of the local machine are not published.
    shown_name = model_name if on_hub else Path(model_name).name
    output = Path(args.output_dir)
    own_name = trainer.hub_model_id if args.push_to_hub else f"path/to/{output.resolve().name}"
    results = eval_results(subject, metrics)
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag=subject.pipeline_tag,
        tags=["hf_lsam", "layer-wise-sam", "sharpness-aware-minimization"],
        datasets=subject.dataset,
        base_model=model_name if on_hub and not subject.from_scratch else None,
        model_name=own_name.rpartition("/")[2],
        eval_results=results or None,
        metrics=sorted({result.metric_type for result in results} - {"loss"}) or None,
        **({} if subject.from_scratch else find_license(model_name)),
    )
    training = {
        "model": shown_name,
        "data": subject.data,
        **(adapter or {}),
        **{name: getattr(args, name) for name in TRAINING_FIELDS},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf-lsam": hf_lsam.__version__,
    }
    kind = f"{'An' if subject.kind[0] in 'aeiou' else 'A'} {subject.kind} {'adapter' if adapter else 'model'}"
    made = "trained" if subject.from_scratch else "fine-tuned"
    method = "with layer-wise SAM" if lsam_config.enabled else "without perturbation (layer-wise SAM is off)"
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=f"{kind}, {made} {method}",
        recipe=subject.recipe,
        usage=usage(
            trainer.model, own_name, shown_name if on_hub else f"path/to/{shown_name}", subject, bool(adapter)
        ),
        training=_table("setting", training),
        lsam=_table("setting", dataclasses.asdict(lsam_config)),
        metrics=_table("metric", metrics),
    )
    card.save(output / "README.md")
    if args.push_to_hub:
        card.push_to_hub(trainer.hub_model_id, token=args.hub_token)


def eval_results(subject: Subject, metrics: dict[str, float]) -> list[EvalResult]:
    """Convert the finite scores among `metrics` to entries of the card's `model-index`."""
    return [
        EvalResult(
            task_type=subject.pipeline_tag,
            dataset_type=subject.dataset or "local",
            dataset_name=subject.data,
            metric_type=score,
            metric_name=name,
            metric_value=_rounded(value),
        )
        for name, value in metrics.items()
        if (score := find_score(name)) is not None and math.isfinite(value)
    ]


def find_license(model_name: str) -> dict[str, Any]:
    """Read the licence from the card of the model that was fine-tuned; empty if there is none."""
    folder = Path(model_name)
    try:
        card = ModelCard.load(folder / "README.md" if folder.is_dir() else model_name, ignore_metadata_errors=True)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    names = ("license", "license_name", "license_link")
    return {name: value for name in names if (value := card.data.get(name)) is not None}


def usage(model: PreTrainedModel, name: str, base: str, subject: Subject, is_adapter: bool) -> str:
    """
    Python code that loads the model and runs it on an example.

    Args:
        model (`PreTrainedModel`): The trained model.
        name (`str`): The name that it is loaded by.
        base (`str`): The name of its base model; used for an adapter only.
        subject (`Subject`): The task.
        is_adapter (`bool`): Whether it is an adapter.
    """
    tag, is_pair = subject.pipeline_tag, subject.pairs
    if is_adapter:
        generates = tag == "text-generation"
        kind = "AutoModelForCausalLM" if generates else "AutoModelForSequenceClassification"
        # The adapter contains its own head.
        labels = "" if generates else f", num_labels={model.config.num_labels}, ignore_mismatched_sizes=True"
        lines = [
            "from peft import PeftModel",
            f"from transformers import {kind}, AutoTokenizer",
            "",
            f"model = {kind}.from_pretrained({base!r}{labels})",
            f"model = PeftModel.from_pretrained(model, {name!r}).eval()",
            f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
            f"""inputs = tokenizer("A text.", {'"Another one.", ' * is_pair}return_tensors="pt")""",
        ]
        output = "tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0])" if generates else "model(**inputs)"
        return "\n".join([*lines, f"print({output})"])
    inputs = {
        "text-classification": '{"text": "A text.", "text_pair": "Another one."}' if is_pair else '"A text."',
        "text-generation": '"A text", max_new_tokens=40',
        "image-classification": '"image.png"',
    }
    lines = ["from transformers import pipeline", "", f"pipe = pipeline({tag!r}, model={name!r})"]
    module = type(model).__module__
    if module.startswith("hf_lsam_recipes."):
        # Importing the module registers the architecture with transformers.
        lines.insert(0, f"import {module}  # {type(model).__name__}, from pip install 'hf-lsam[recipes]'")
    return "\n".join([*lines, f"print(pipe({inputs[tag]}))"])


def _table(title: str, values: dict[str, Any]) -> str:
    """A table of names and values. Values are written as in a YAML of settings: `null` is "not set"."""
    return markdown_table([{title: name, "value": _shown(value)} for name, value in values.items()])


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value.value if isinstance(value, Enum) else value
    return json.dumps(_rounded(value), ensure_ascii=False, default=str)


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value
