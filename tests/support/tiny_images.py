"""Tiny images, whose class is their colour, and tiny models for the tests of the recipe for images."""

import io
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, Features, Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

CLASSES = ("blue", "green", "red")
QUICK = ["--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--per_device_train_batch_size", "4"]
SMALL = ["--architecture", "resnet", "--depth", "8", "--image_size", "8", "--crop_padding", "1"]


def picture(kind: int, seed: int, size: tuple[int, int] = (8, 8), form: str = "PNG") -> bytes:
    """A noisy image of class number `kind`, as a file."""
    pixels = np.random.default_rng([kind, seed]).integers(0, 80, (*size, 3), dtype=np.uint8)
    pixels[..., kind] += 150
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def write_folder(folder: Path, count: int = 4, seed: int = 0, classes=CLASSES) -> str:
    """`count` images of each class in a folder of its name; returns the folder."""
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            content = picture(CLASSES.index(name) if name in CLASSES else 0, 1000 * seed + number)
            (folder / name / f"{number}.png").write_bytes(content)
    return str(folder)


def write_zip(path: Path, folder: str) -> str:
    """The files of `folder` as a zip; returns its path."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(Path(folder).rglob("*.png")):
            archive.write(file, file.relative_to(folder))
    return str(path)


def write_hub(folder: Path, image_column: str, label_column: str, splits=("train", "test"), count: int = 12) -> str:
    """A data set as the Hub holds it, one file of Parquet a split; returns its folder."""
    features = Features({image_column: Image(), label_column: ClassLabel(names=list(CLASSES))})
    folder.mkdir()
    for seed, split in enumerate(splits):
        kinds = [number % len(CLASSES) for number in range(count)]
        images = [{"bytes": picture(kind, 1000 * seed + n), "path": None} for n, kind in enumerate(kinds)]
        dataset = Dataset.from_dict({image_column: images, label_column: kinds}, features=features)
        dataset.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def save_vit(folder: Path) -> str:
    """A random ViT of 3 blocks without a fitting head, and its image processor; returns its folder."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)
