"""Images as tensors: reading, resizing, normalisation and, for training, augmentation."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.utils.data
from datasets import Dataset, Image
from torch import Tensor
from tqdm import tqdm
from transformers import BaseImageProcessor, TrainerCallback


@dataclass(frozen=True)
class Augmentation:
    """
    Random crops and flips of a normalised training image.

    Args:
        crop_padding (`int`): Pixels of the mean colour that are added on each side before cropping to the old size.
        horizontal_flip (`bool`): Whether to flip images with probability 1/2.
        seed (`int`): Seed of the random changes, which also depend on the epoch and the image.
    """

    crop_padding: int
    horizontal_flip: bool
    seed: int

    def __call__(self, pixels: Tensor, epoch: int, index: int) -> Tensor:
        """Augment `pixels`, of shape `(channels, height, width)`: image number `index` in epoch number `epoch`."""
        generator = np.random.default_rng([self.seed, epoch, index])
        top, left = generator.integers(2 * self.crop_padding + 1, size=2)
        flip = generator.random() < 0.5
        padded = torch.nn.functional.pad(pixels, (self.crop_padding,) * 4)
        height, width = pixels.shape[-2:]
        pixels = padded[:, top : top + height, left : left + width]
        return pixels.flip(-1) if flip and self.horizontal_flip else pixels.contiguous()


class ImageExamples(torch.utils.data.Dataset):
    """
    Examples for the Trainer: `pixel_values` and `labels` of an image.

    The augmentation of an image depends on its index, the epoch and the seed only. So runs are reproducible with any
    number of processes and workers, and a resumed run sees the same images as an uninterrupted one.

    Args:
        dataset (`Dataset`): The columns `image` and `label`.
        processor (`BaseImageProcessor`): Resizes and normalises images.
        augmentation (`Augmentation`, *optional*): The augmentation for training. Default: none.
    """

    def __init__(self, dataset: Dataset, processor: BaseImageProcessor, augmentation: Augmentation | None = None):
        self.dataset = dataset
        self.processor = processor
        self.augmentation = augmentation
        # In shared memory, since workers may persist over several epochs.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.dataset[index]
        pixels = self.processor(read_image(row["image"]), return_tensors="pt")["pixel_values"][0]
        if self.augmentation is not None:
            pixels = self.augmentation(pixels, int(self.epoch), index)
        return {"pixel_values": pixels, "labels": row["label"]}


def without_augmentation(examples: ImageExamples) -> ImageExamples:
    """The same examples without augmentation."""
    return ImageExamples(examples.dataset, examples.processor)


class EpochCallback(TrainerCallback):
    """Sets the epoch of the training examples."""

    def __init__(self, examples: ImageExamples):
        self.examples = examples

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.examples.epoch.fill_(int(state.epoch))


def read_image(image: dict[str, Any]) -> PIL.Image.Image:
    """Decode an image of a data set, apply its EXIF orientation, and convert it to RGB."""
    return Image().decode_example(image).convert("RGB")


def check_images(source: str, dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """
    Read every image of `dataset`, called `source` in messages.

    Returns:
        Mean and standard deviation of each channel, from 0 to 1.

    Raises:
        ValueError: for the first image that cannot be read.
    """

    def moments(row: tuple[str, dict[str, Any]]) -> np.ndarray:
        name, image = row
        try:
            pixels = np.asarray(read_image(image)).reshape(-1, 3).astype(np.int64)
        except Exception as error:
            raise ValueError(
                f"{source}, {name}: the image cannot be read ({' '.join(str(error).split())}). Repair or remove it."
            ) from error
        return np.stack([np.full(3, len(pixels)), pixels.sum(axis=0), np.square(pixels).sum(axis=0)])

    # Integers, whose sums do not depend on the order.
    total = np.zeros((3, 3), dtype=np.int64)
    with ThreadPoolExecutor() as pool, tqdm(total=len(dataset), desc=f"Reading {source}", disable=None) as progress:
        for batch in dataset.iter(batch_size=256):
            for found in pool.map(moments, zip(batch["name"], batch["image"], strict=True)):
                total += found
            progress.update(len(batch["name"]))
    mean = total[1] / total[0]
    std = np.sqrt(np.maximum(total[2] / total[0] - mean**2, 0))
    return tuple((mean / 255).round(4).tolist()), tuple((std / 255).round(4).tolist())
