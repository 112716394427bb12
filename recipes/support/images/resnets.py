"""
The residual networks of the CIFAR benchmarks, as models of transformers.

`CifarResNet` is ResNet-(6n+2) of He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
`WideResNet` is WRN-(6n+4)-k of Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016. Importing this module
registers them with `AutoConfig` and `AutoModelForImageClassification`. Without it, a saved network is loaded with
`trust_remote_code=True`: this file is saved with the weights, so it must import nothing but torch and transformers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput


class CifarResNetConfig(PreTrainedConfig):
    """
    Configuration of a [`CifarResNet`].

    Args:
        depth (`int`, *optional*, defaults to `20`):
            Number of layers with weights, 6n + 2 for n residual blocks in each of the three stages.
    """

    model_type = "cifar_resnet"

    depth: int = 20

    def __post_init__(self, **kwargs):
        _blocks_in_stage(self.depth, 2)
        super().__post_init__(**kwargs)


class WideResNetConfig(PreTrainedConfig):
    """
    Configuration of a [`WideResNet`].

    Args:
        depth (`int`, *optional*, defaults to `28`):
            Number of convolutions, 6n + 4 for n residual blocks in each of the three stages.
        widen_factor (`int`, *optional*, defaults to `10`):
            The factor k that multiplies the 16, 32 and 64 channels of the stages.
        dropout (`float`, *optional*, defaults to `0.0`):
            Dropout between the two convolutions of a block.
    """

    model_type = "wide_resnet"

    depth: int = 28
    widen_factor: int = 10
    dropout: float = 0.0

    def __post_init__(self, **kwargs):
        _blocks_in_stage(self.depth, 4)
        if self.widen_factor < 1:
            raise ValueError(f"widen_factor must be at least 1, but is {self.widen_factor}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, but is {self.dropout}.")
        super().__post_init__(**kwargs)


class ResidualBlock(nn.Module):
    """
    Two convolutions, each followed by batch normalisation, and a shortcut without weights.

    If the size changes, the shortcut subsamples the pixels and pads the channels with zeros: option A of the paper.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, hidden_states: Tensor) -> Tensor:
        shortcut = hidden_states[:, :, :: self.stride, :: self.stride]
        shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        hidden_states = self.norm1(self.conv1(hidden_states)).relu()
        return (shortcut + self.norm2(self.conv2(hidden_states))).relu()


class WideResidualBlock(nn.Module):
    """Two convolutions, each after batch normalisation, and a shortcut: a 1x1 convolution if the size changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.shortcut = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        activated = self.norm1(hidden_states).relu()
        shortcut = hidden_states if self.shortcut is None else self.shortcut(activated)
        hidden_states = self.dropout(self.norm2(self.conv1(activated)).relu())
        return shortcut + self.conv2(hidden_states)


class _ImageClassifier(PreTrainedModel):
    """The common part of both networks: the layers around the blocks, and the initialisation of the weights."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config, blocks: Sequence[nn.Module], norm_channels: int, channels: int):
        super().__init__(config)
        self.stem = _conv3x3(3, 16)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.BatchNorm2d(norm_channels)
        self.classifier = nn.Linear(channels, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # He et al., ICCV 2015, with the fan-out.
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _classify(self, hidden_states: Tensor, labels: Tensor | None) -> ImageClassifierOutput:
        logits = self.classifier(hidden_states.mean(dim=(2, 3)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class CifarResNet(_ImageClassifier):
    """ResNet-(6n+2) for small images: n blocks each of 16, 32 and 64 channels; 0.27 M weights for ResNet-20."""

    config_class = CifarResNetConfig

    def __init__(self, config: CifarResNetConfig):
        blocks = [ResidualBlock(*size) for size in _block_sizes(1, _blocks_in_stage(config.depth, 2))]
        super().__init__(config, blocks, norm_channels=16, channels=64)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        hidden_states = self.norm(self.stem(pixel_values)).relu()
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self._classify(hidden_states, labels)


class WideResNet(_ImageClassifier):
    """WRN-(6n+4)-k: n blocks each of 16k, 32k and 64k channels; 36.5 M weights for WRN-28-10."""

    config_class = WideResNetConfig

    def __init__(self, config: WideResNetConfig):
        sizes = _block_sizes(config.widen_factor, _blocks_in_stage(config.depth, 4))
        blocks = [WideResidualBlock(*size, config.dropout) for size in sizes]
        channels = 64 * config.widen_factor
        super().__init__(config, blocks, norm_channels=channels, channels=channels)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        hidden_states = self.stem(pixel_values)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self._classify(self.norm(hidden_states).relu(), labels)


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def _blocks_in_stage(depth: int, other_layers: int) -> int:
    """The n of a depth of 6n + `other_layers`; raises `ValueError` if there is none."""
    number, rest = divmod(depth - other_layers, 6)
    if rest or number < 1:
        raise ValueError(
            f"depth must be 6n + {other_layers} with n of at least 1, as in {12 + other_layers} or "
            f"{18 + other_layers}, but is {depth}."
        )
    return number


def _block_sizes(widen_factor: int, blocks_in_stage: int) -> list[tuple[int, int, int]]:
    """Channels in, channels out and stride of every block; the second and the third stage halve the image."""
    sizes = []
    channels = 16
    for stage in range(3):
        out_channels = 16 * 2**stage * widen_factor
        for index in range(blocks_in_stage):
            sizes.append((channels, out_channels, 2 if stage > 0 and index == 0 else 1))
            channels = out_channels
    return sizes


for _config, _model in ((CifarResNetConfig, CifarResNet), (WideResNetConfig, WideResNet)):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForImageClassification.register(_config, _model)
    # This file is saved with the weights.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForImageClassification")
