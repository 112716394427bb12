"""LoRA adapters for the recipes: settings, adding an adapter to a model, and loading a saved one with its model."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, Trainer
from transformers.pytorch_utils import Conv1D
from transformers.utils.peft_utils import find_adapter_config_file

# Subfolder of the adapter's folder for the configuration of the whole model: its labels and its padding token. A
# `config.json` in the adapter's folder itself would make it look like the folder of a whole model.
MODEL_CONFIG = "model_config"
# Modules of a text classifier that PEFT trains in full by default.
_HEADS = {"classifier", "score"}


@dataclass
class AdapterArguments:
    """
    Settings of a LoRA adapter (Hu et al., ICLR 2022). With one, only it and a classifier's head are trained.

    Args:
        lora_r (`int`, *optional*):
            Rank of the adapter. If not set, the whole model is trained, without an adapter.
        lora_alpha (`int`, *optional*, defaults to `8`):
            The output of the adapter is scaled by `lora_alpha / lora_r`. The default is PEFT's.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout probability on the input of the adapter. The default is PEFT's.
        lora_target_modules (`list[str]`, *optional*):
            Names of the layers that get an adapter, or suffixes of the names; `all-linear` is every linear layer
            except the head. If not set, PEFT's choice for the model type.
        use_dora (`bool`, *optional*, defaults to `False`):
            Whether to use DoRA (Liu et al., ICML 2024), which also trains the norms of the columns of each weight.
    """

    lora_r: int | None = field(default=None, metadata={"help": "Train a LoRA adapter of this rank."})
    lora_alpha: int = field(default=8, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the adapter's input."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Layers that get an adapter, or all-linear; PEFT's choice unless set."},
    )
    use_dora: bool = field(default=False, metadata={"help": "Use DoRA: also train the norms of the weights' columns."})

    def __post_init__(self):
        if self.lora_target_modules == [None]:
            self.lora_target_modules = None
        if self.lora_r is None:
            changed = [item.name for item in dataclasses.fields(self) if getattr(self, item.name) != item.default]
            if changed:
                raise ValueError(f"{changed[0]} is a setting of LoRA, which is off: set lora_r, or leave it out.")
            return
        if self.lora_r < 1:
            raise ValueError(f"lora_r must be at least 1, or null for no adapter, but is {self.lora_r}.")
        if self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be more than 0, but is {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and less than 1, but is {self.lora_dropout}.")

    @property
    def enabled(self) -> bool:
        """Whether an adapter is trained."""
        return self.lora_r is not None


def add_adapter(
    model: PreTrainedModel,
    args: AdapterArguments,
    new_parameters: set[str],
    task_type: TaskType = TaskType.SEQ_CLS,
) -> PeftModel:
    """
    Add a new adapter to `model`. Only it, a classifier's head and modules with new parameters are trained.

    Args:
        model (`PreTrainedModel`): A text classifier, or a language model.
        args (`AdapterArguments`): The settings of the adapter.
        new_parameters (`set[str]`): Names of the parameters that are missing in the checkpoint. They are initialised
            at random, so the modules that contain them are trained in full, such as the pooler of DeBERTa.
        task_type (`TaskType`, *optional*, defaults to `TaskType.SEQ_CLS`): PEFT's name for the task of the model.

    Raises:
        ValueError: if the model lacks a layer of `lora_target_modules`, or PEFT has no default for its type; the
            message lists the layers that it has.
    """
    targets: list[str] | str | None = args.lora_target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"
    new_modules = {name.rpartition(".")[0] for name in new_parameters}
    config = LoraConfig(
        task_type=task_type,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        use_dora=args.use_dora,
        modules_to_save=sorted(name for name in new_modules if not _HEADS & set(name.split("."))) or None,
    )
    try:
        if isinstance(targets, list):
            # PEFT ignores a name without a layer if another name has one.
            names = [f".{name}" for name, _ in model.named_modules()]
            unknown = [t for t in targets if not any(name.endswith(f".{t}") for name in names)]
            if unknown:
                raise ValueError(f"it has no {', '.join(unknown)}.")
        return get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        ends = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        raise ValueError(
            f"{type(model).__name__} cannot get an adapter with lora_target_modules={args.lora_target_modules}: "
            f"{' '.join(str(error).split())} Set lora_target_modules to all-linear, or to some of its linear layers: "
            f"{', '.join(sorted(ends))}."
        ) from error


def find_base(name: str) -> str | None:
    """The base model of the adapter `name`, a Hub name or folder; `None` if it is not an adapter."""
    if find_adapter_config_file(name) is None:
        return None
    return PeftConfig.from_pretrained(name).base_model_name_or_path


def load_config(name: str, base: str | None, trust_remote_code: bool):
    """Load the configuration of the model `name`; for an adapter of `base`, the one that `save_model_config` wrote."""
    if base is not None and PreTrainedConfig.get_config_dict(name, subfolder=MODEL_CONFIG)[0]:
        return AutoConfig.from_pretrained(name, subfolder=MODEL_CONFIG, trust_remote_code=trust_remote_code)
    # An adapter that was trained with other software has no label names. They come from the data.
    return AutoConfig.from_pretrained(base or name, trust_remote_code=trust_remote_code)


def load_adapter(model: PreTrainedModel, name: str) -> PeftModel:
    """
    Load the adapter `name` into `model`.

    Raises:
        ValueError: if their sizes differ, for instance in the number of labels.
    """
    try:
        return PeftModel.from_pretrained(model, name)
    except RuntimeError as error:
        raise ValueError(f"The adapter {name} does not fit its model: {' '.join(str(error).split())}") from error


def save_model_config(trainer: Trainer) -> None:
    """Write the configuration of the whole model to a subfolder of a saved adapter, where `load_config` reads it."""
    if isinstance(trainer.model, PeftModel) and trainer.is_world_process_zero():
        trainer.model.config.save_pretrained(Path(trainer.args.output_dir) / MODEL_CONFIG)
