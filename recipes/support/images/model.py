"""The image classifier that a recipe trains: from scratch, or pretrained."""

from dataclasses import dataclass, field

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    ViTImageProcessorPil,
)

from hf_lsam_recipes.support.images import resnets
from hf_lsam_recipes.support.images.data import ImageData
from hf_lsam_recipes.support.loading import check_weights
from hf_lsam_recipes.support.shipped import did_you_mean

ARCHITECTURES = ("resnet", "wide_resnet")


@dataclass
class ModelArguments:
    """
    Which model to train.

    > Parameters for a pretrained model

    Args:
        model_name_or_path (`str`, *optional*):
            Any model that `AutoModelForImageClassification` loads, or that this recipe trained: its name on the Hub,
            or its folder. Its weights are loaded in float32, which is precise enough for a small `rho`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the model.

    > Parameters for a model from scratch

    Args:
        architecture (`str`, *optional*):
            `"resnet"`: ResNet-(6n+2) for small images (He et al., CVPR 2016). `"wide_resnet"`: WRN-(6n+4)-k
            (Zagoruyko and Komodakis, BMVC 2016).
        depth (`int`, *optional*):
            Its number of layers: 6n + 2 for a ResNet (default: 20), 6n + 4 for a wide ResNet (default: 28).
        widen_factor (`int`, *optional*, defaults to `10`):
            Factor k by which a wide ResNet multiplies the number of channels.
        dropout (`float`, *optional*, defaults to `0.0`):
            Dropout probability in the blocks of a wide ResNet.
        image_size (`int`, *optional*, defaults to `32`):
            Height and width in pixels that images are resized to.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Name on the Hub, or folder, of a model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    architecture: str | None = field(
        default=None, metadata={"help": f"Model to train from scratch: {' or '.join(ARCHITECTURES)}."}
    )
    depth: int | None = field(default=None, metadata={"help": "Its number of layers; 20, or 28 for a wide ResNet."})
    widen_factor: int = field(default=10, metadata={"help": "Factor on the channels of a wide ResNet."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability in a wide ResNet."})
    image_size: int = field(default=32, metadata={"help": "Height and width of the images, from scratch."})

    def __post_init__(self):
        if (self.model_name_or_path is None) == (self.architecture is None):
            raise ValueError(
                "Set exactly one of model_name_or_path, to start from a pretrained model, and architecture, to train "
                "one from scratch; set the other to null."
            )
        if self.architecture not in (None, *ARCHITECTURES):
            near = did_you_mean(self.architecture, list(ARCHITECTURES))
            raise ValueError(
                f"architecture must be one of {', '.join(ARCHITECTURES)}, but is {self.architecture!r}.{near}"
            )
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, but is {self.image_size}.")

    @property
    def from_scratch(self) -> bool:
        """Whether training starts from random weights."""
        return self.architecture is not None

    def new_config(self) -> PreTrainedConfig:
        """The configuration of a new model of this `architecture`."""
        depth = {} if self.depth is None else {"depth": self.depth}
        if self.architecture == "resnet":
            return resnets.CifarResNetConfig(**depth)
        return resnets.WideResNetConfig(widen_factor=self.widen_factor, dropout=self.dropout, **depth)


def find_model(model_args: ModelArguments) -> tuple[PreTrainedConfig, BaseImageProcessor | None]:
    """
    Load the configuration and the image processor of the model. A model from scratch has no processor yet: `None`.

    Raises:
        ValueError: if either cannot be loaded.
    """
    if model_args.from_scratch:
        return model_args.new_config(), None
    name, code = model_args.model_name_or_path, model_args.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=code)
    except (OSError, ValueError) as error:
        raise ValueError(f"model_name_or_path={name} cannot be loaded: {' '.join(str(error).split())}") from error
    try:
        # The PIL backend gives the same pixels whether torchvision is installed or not.
        return config, AutoImageProcessor.from_pretrained(name, trust_remote_code=code, backend="pil")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The image processor of model_name_or_path={name} cannot be loaded: {' '.join(str(error).split())} If "
            "preprocessor_config.json is missing, save it with the model, from the model that it was fine-tuned from: "
            f"AutoImageProcessor.from_pretrained(ORIGINAL).save_pretrained({str(name)!r})."
        ) from error


def make_processor(data: ImageData, image_size: int) -> BaseImageProcessor:
    """Build a processor that resizes images and normalises channels to mean 0 and standard deviation 1 in training."""
    if min(data.std) == 0:
        raise ValueError(
            "A colour channel is constant over all training images, so it cannot be normalised: check the images."
        )
    size = {"height": image_size, "width": image_size}
    return ViTImageProcessorPil(size=size, image_mean=list(data.mean), image_std=list(data.std))


def build_model(model_args: ModelArguments, config: PreTrainedConfig, data: ImageData, training: bool):
    """Build or load the model: with the classes of the data if it is trained, else with its own."""
    labels = {}
    if training:
        labels = {
            "id2label": dict(enumerate(data.labels)),
            "label2id": {name: number for number, name in enumerate(data.labels)},
        }
    if model_args.from_scratch:
        for name, value in labels.items():
            setattr(config, name, value)
        return AutoModelForImageClassification.from_config(config)
    model, loaded = AutoModelForImageClassification.from_pretrained(
        model_args.model_name_or_path,
        trust_remote_code=model_args.trust_remote_code,
        dtype=torch.float32,
        ignore_mismatched_sizes=training,
        output_loading_info=True,
        **labels,
    )
    if not training:
        check_weights(str(model_args.model_name_or_path), loaded["missing_keys"])
    return model


def describe_architecture(config: PreTrainedConfig) -> str:
    """The name that the paper gives to an architecture trained from scratch, such as `ResNet-20`."""
    if isinstance(config, resnets.WideResNetConfig):
        return f"WRN-{config.depth}-{config.widen_factor}"
    return f"ResNet-{config.depth}"
