"""Images as tensors: read, resized, normalised and, for training, shifted and mirrored."""

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
    Random changes of a training image, after it is normalised.

    Args:
        crop_padding (`int`): Pad by so many pixels of the mean colour on each side, and crop to the old size.
        horizontal_flip (`bool`): Mirror half of the images.
        seed (`int`): Together with the epoch and the image it decides what is drawn.
    """

    crop_padding: int
    horizontal_flip: bool
    seed: int

    def __call__(self, pixels: Tensor, epoch: int, index: int) -> Tensor:
        """Image number `index`, of shape (channels, height, width), as it is in epoch number `epoch`."""
        generator = np.random.default_rng([self.seed, epoch, index])
        top, left = generator.integers(2 * self.crop_padding + 1, size=2)
        flip = generator.random() < 0.5
        padded = torch.nn.functional.pad(pixels, (self.crop_padding,) * 4)
        height, width = pixels.shape[-2:]
        pixels = padded[:, top : top + height, left : left + width]
        return pixels.flip(-1) if flip and self.horizontal_flip else pixels.contiguous()


class ImageExamples(torch.utils.data.Dataset):
    """
    What the Trainer gets: `pixel_values` and `labels` of one image.

    The changes of an image depend on nothing but its number, the epoch and the seed, so that runs repeat exactly in
    any number of processes and workers, and a resumed run goes on with the images that the first one would have had.

    Args:
        dataset (`Dataset`): The columns `image` and `label`.
        processor (`BaseImageProcessor`): Resizes and normalises.
        augmentation (`Augmentation`, *optional*): The changes for training.
    """

    def __init__(self, dataset: Dataset, processor: BaseImageProcessor, augmentation: Augmentation | None = None):
        self.dataset = dataset
        self.processor = processor
        self.augmentation = augmentation
        # Shared with workers, which may live longer than an epoch.
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
    """The same images as they are, in every epoch and with every seed."""
    return ImageExamples(examples.dataset, examples.processor)


class EpochCallback(TrainerCallback):
    """Tells the training images which epoch it is."""

    def __init__(self, examples: ImageExamples):
        self.examples = examples

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.examples.epoch.fill_(int(state.epoch))


def read_image(image: dict[str, Any]) -> PIL.Image.Image:
    """The image of a row, upright and in colour."""
    return Image().decode_example(image).convert("RGB")


def check_images(source: str, dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """
    Read every image once; returns mean and standard deviation of the channels.

    Raises:
        ValueError: naming the first image that cannot be read.
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

    # Sums of integers: the same in whatever order they are added.
    total = np.zeros((3, 3), dtype=np.int64)
    with ThreadPoolExecutor() as pool, tqdm(total=len(dataset), desc=f"Reading {source}", disable=None) as progress:
        for batch in dataset.iter(batch_size=256):
            for found in pool.map(moments, zip(batch["name"], batch["image"], strict=True)):
                total += found
            progress.update(len(batch["name"]))
    mean = total[1] / total[0]
    std = np.sqrt(np.maximum(total[2] / total[0] - mean**2, 0))
    return tuple((mean / 255).round(4).tolist()), tuple((std / 255).round(4).tolist())
