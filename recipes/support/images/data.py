"""The data of `run_image_classification.py`: labelled images from folders, zips or the Hub, checked at the start."""

import lzma
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value

from hf_lsam_recipes.support.images.examples import check_images
from hf_lsam_recipes.support.tables import load_hub

NEEDED_BY = {"train": "do_train", "validation": "do_eval", "test": "do_predict"}
# Seed of the images that are held out or selected, which are the same in every run.
_SPLIT_SEED = 0
# Errors of a zip file that is damaged, encrypted or compressed in an unsupported way. (bzip2 raises OSError.)
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, zlib.error, lzma.LZMAError)
_CLASSES_ARE = "The top-level folders, or the values of label_column, are the classes."


@dataclass
class DataArguments:
    """
    Which images to train, evaluate and predict on: a data set of the Hub, or your own folders or zips.

    > Parameters for a data set of the Hub

    Args:
        dataset_name (`str`, *optional*):
            Its name, or a folder that `load_dataset` reads; the splits are `train`, `validation` and `test`.
        dataset_config_name (`str`, *optional*):
            Its configuration, if it has several.
        image_column (`str`, *optional*, defaults to `"image"`):
            The column of the image.
        label_column (`str`, *optional*, defaults to `"label"`):
            The column of the class.

    > Parameters for your own images

    Args:
        train_images, validation_images, test_images (`str`, *optional*):
            A folder with one subfolder of images per class, named after the class, or a zip of such subfolders.

    > Parameters for both

    Args:
        validation_fraction (`float`, *optional*):
            Fraction of the training images, the same for each class, that is held out for `do_eval` if there are no
            validation images. The held-out images are the same in every run.
        calibration_fraction (`float`, *optional*):
            Fraction of the validation images, the same for each class, that is only used to fit a temperature after
            training. Metrics then also include the negative log-likelihood and the Brier score of the scaled logits.
        crop_padding (`int`, *optional*, defaults to `4`):
            Training images are padded by this many pixels on each side and cropped at random to their old size. The
            default is that of He et al. (CVPR 2016).
        horizontal_flip (`bool`, *optional*, defaults to `True`):
            Whether to flip training images horizontally with probability 1/2.
        max_train_samples, max_eval_samples (`int`, *optional*):
            Maximum number of images, drawn at random with a fixed seed.

    Raises:
        ValueError: if a setting is out of range, or two settings contradict each other.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Name on the Hub, or folder, of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    image_column: str = field(default="image", metadata={"help": "Column of the image."})
    label_column: str = field(default="label", metadata={"help": "Column of the class."})
    train_images: str | None = field(default=None, metadata={"help": "Folder or zip of <class>/<image>."})
    validation_images: str | None = field(
        default=None, metadata={"help": "Images to evaluate on, in the same format."}
    )
    test_images: str | None = field(default=None, metadata={"help": "Images to predict, in the same format."})
    validation_fraction: float | None = field(
        default=None, metadata={"help": "Fraction of the training images to evaluate on if there are no others."}
    )
    calibration_fraction: float | None = field(
        default=None,
        metadata={"help": "Fraction of the validation images that is only used to fit a temperature."},
    )
    crop_padding: int = field(default=4, metadata={"help": "Maximum random shift of training images, in pixels."})
    horizontal_flip: bool = field(default=True, metadata={"help": "Flip training images at random."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Maximum number of training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Maximum number of validation images."})

    def __post_init__(self):
        own = [name for name in ("train_images", "validation_images", "test_images") if getattr(self, name)]
        if self.dataset_name is None and not own:
            raise ValueError("No data: set dataset_name, or train_images, validation_images or test_images.")
        if self.dataset_name is not None and own:
            raise ValueError(f"dataset_name={self.dataset_name} and {own[0]} are both set: set one of them to null.")
        for name in ("validation_fraction", "calibration_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} must lie between 0 and 1, but is {value}.")
        if self.validation_fraction is not None and self.validation_images is not None:
            raise ValueError("validation_fraction and validation_images are both set: set one of them to null.")
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding must be at least 0, but is {self.crop_padding}.")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, but is {value}.")


@dataclass(frozen=True)
class ImageData:
    """
    Checked images: all can be read, and all classes are known.

    Args:
        labels (`tuple[str, ...]`): The classes in the order of their ids.
        splits (`dict[str, Dataset]`):
            `train`, `validation` and `test` as requested, and `calibration` if `calibration_fraction` is set. The
            columns are `image` (for `read_image`), `label` (the class id) and `name` (a file, or a row on the Hub).
        mean, std (`tuple[float, ...]`):
            Mean and standard deviation of each channel over the training images, from 0 (black) to 1 (white); empty
            without `train`.
    """

    labels: tuple[str, ...]
    splits: dict[str, Dataset]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def load_image_data(args: DataArguments, splits: Sequence[str], model_labels: Mapping[str, int] | None) -> ImageData:
    """
    Read and check the data.

    Args:
        args (`DataArguments`): The source of the data.
        splits (`Sequence[str]`): Those of `train`, `validation` and `test` that the run needs.
        model_labels (`Mapping[str, int]`, *optional*):
            The label ids of a model that is not trained in this run. If `None`, the classes are those of `train`.

    Raises:
        ValueError: for data that cannot be trained or evaluated on; names the source and the setting.
    """
    # Held-out images are part of `train`, so it is read even for an evaluation only.
    fraction = args.validation_fraction
    needed = dict.fromkeys("train" if split == "validation" and fraction else split for split in splits)
    read = {split: _read_hub(args, split) if args.dataset_name else _read_own(args, split) for split in needed}
    if model_labels is None:
        labels = tuple(read["train"][1].features["label"].names)
    else:
        labels = tuple(sorted(model_labels, key=lambda name: model_labels[name]))
    known = {name: number for number, name in enumerate(labels)}
    datasets = {split: _with_ids(source, dataset, known, split) for split, (source, dataset) in read.items()}
    if fraction is not None and "train" in datasets:
        datasets["train"], datasets["validation"] = _hold_out(datasets["train"], "validation_fraction", fraction)
    datasets = {split: dataset for split, dataset in datasets.items() if split in splits}
    for split, dataset in datasets.items():
        limit = {"train": args.max_train_samples, "validation": args.max_eval_samples}.get(split)
        if limit is not None and limit < len(dataset):
            datasets[split] = dataset.select(np.random.default_rng(_SPLIT_SEED).permutation(len(dataset))[:limit])
    if args.calibration_fraction is not None and "validation" in datasets:
        datasets["validation"], datasets["calibration"] = _hold_out(
            datasets["validation"], "calibration_fraction", args.calibration_fraction
        )
    if "train" in datasets and len(set(datasets["train"]["label"])) < 2:
        raise ValueError(
            f"{read['train'][0]}: all training images are of one class ({labels[datasets['train'][0]['label']]}), "
            f"which leaves nothing to learn. {_CLASSES_ARE} If max_train_samples is set, raise it."
        )
    sources = {split: (read.get(split) or read.get("validation") or read["train"])[0] for split in datasets}
    moments = {split: check_images(sources[split], dataset) for split, dataset in datasets.items()}
    return ImageData(labels, datasets, *moments.get("train", ()))


def _read_hub(args: DataArguments, split: str) -> tuple[str, Dataset]:
    """Read a split from the Hub; returns its name for messages and the data, with a `ClassLabel` as label."""
    setting, instead = f"dataset_name={args.dataset_name}", "train_images, validation_images and test_images"
    splits = load_hub(setting, str(args.dataset_name), args.dataset_config_name, instead)
    if split not in splits:
        hold_out = ", set validation_fraction" if split == "validation" else ""
        raise ValueError(
            f"No {split} data: {args.dataset_name} has {', '.join(splits)}. Leave out {NEEDED_BY[split]}{hold_out}, "
            "or choose another dataset_name."
        )
    if args.validation_fraction is not None and "validation" in splits:
        raise ValueError(
            f"{args.dataset_name} has validation images, so none are held out: set validation_fraction to null."
        )
    source, dataset = f"{args.dataset_name} ({split})", splits[split]
    for setting in ("image_column", "label_column"):
        if getattr(args, setting) not in dataset.features:
            raise ValueError(
                f"{source} has no column {getattr(args, setting)!r}, but {', '.join(dataset.column_names)}. Set "
                f"{setting}."
            )
    if not isinstance(dataset.features[args.image_column], Image):
        raise ValueError(f"{source}: column {args.image_column!r} holds no images. Set image_column.")
    label = dataset.features[args.label_column]
    if not isinstance(label, ClassLabel) and not (isinstance(label, Value) and label.dtype != "null"):
        raise ValueError(f"{source}: column {args.label_column!r} holds no classes. Set label_column.")
    dataset = dataset.select_columns([args.image_column, args.label_column])
    dataset = dataset.rename_columns({args.image_column: "image", args.label_column: "label"})
    if not isinstance(label, ClassLabel):
        classes = sorted({value for value in dataset["label"] if value is not None})
        numbers = {value: number for number, value in enumerate(classes)}
        ids = [numbers.get(value, -1) for value in dataset["label"]]
        dataset = _with_label(dataset, ids, ClassLabel(names=[str(value) for value in classes]))
    names = [f"row {row}" for row in range(1, len(dataset) + 1)]
    return source, dataset.cast_column("image", Image(decode=False)).add_column("name", names)


def _read_own(args: DataArguments, split: str) -> tuple[str, Dataset]:
    """List the images of a folder, or read those of a zip into memory; returns the name for messages and the data."""
    setting = f"{split}_images"
    if getattr(args, setting) is None:
        hold_out = ", or validation_fraction" if split == "validation" else ""
        raise ValueError(f"No {split} data: set {setting}{hold_out}, or leave out {NEEDED_BY[split]}.")
    path = Path(getattr(args, setting)).expanduser()
    source = f"{setting}={path}"
    images: dict[str, dict[str, str | bytes | None]]
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if not file.is_dir()}
        images = {name: {"path": str(file), "bytes": None} for name, file in files.items() if _is_visible(name)}
    elif path.is_file():
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if not name.endswith("/") and _is_visible(name)]
                images = {name: {"path": name, "bytes": archive.read(name)} for name in names}
        except _ZIP_ERRORS as error:
            raise ValueError(f"{source} cannot be read as a zip: {error}.") from error
    else:
        raise ValueError(f"{source} is neither a folder nor a file: check the path.")
    if not images:
        raise ValueError(f"{source} has no images. It must contain one folder of images per class.")
    if at_top := next((name for name in sorted(images) if "/" not in name), None):
        raise ValueError(f"{source} has a file {at_top} next to the folders of the classes: move or remove it.")
    names = sorted(images)
    classes = sorted({PurePosixPath(name).parts[0] for name in names})
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=classes), "name": Value("string")})
    ids = [classes.index(PurePosixPath(name).parts[0]) for name in names]
    columns = {"image": [images[name] for name in names], "label": ids, "name": names}
    return source, Dataset.from_dict(columns, features=features)


def _is_visible(name: str) -> bool:
    """Whether no part of the path is hidden, or a folder that macOS adds to zips."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _with_ids(source: str, dataset: Dataset, known: Mapping[str, int], split: str) -> Dataset:
    """
    Replace the labels of `dataset` by the ids in `known`.

    Raises:
        ValueError: if it has no image, a class that is not in `known`, or an image without a class.
    """
    if len(dataset) == 0:
        raise ValueError(f"{source} has no images.")
    names = dataset.features["label"].names
    labels = list(dataset["label"])
    used = sorted(set(labels) - {None, -1})
    if unknown := [names[number] for number in used if names[number] not in known]:
        raise ValueError(
            f"{source} has the class {unknown[0]!r}, which is not one of the classes of the model: "
            f"{', '.join(list(known)[:10])}{', ...' if len(known) > 10 else ''}. {_CLASSES_ARE}"
        )
    if len(used) < len(set(labels)):
        row = next(row for row, number in enumerate(labels) if number in (None, -1))
        raise ValueError(f"{source}, {dataset[row]['name']}: no class is given. Leave out {NEEDED_BY[split]}.")
    return _with_label(dataset, [known[names[number]] for number in labels], Value("int64"))


def _with_label(dataset: Dataset, ids: list[int], kind: ClassLabel | Value) -> Dataset:
    return dataset.remove_columns("label").add_column("label", ids, feature=kind)


def _hold_out(dataset: Dataset, setting: str, fraction: float) -> tuple[Dataset, Dataset]:
    """Hold out `fraction` of each class, but never all of it; returns the remaining and the held-out images."""
    generator, labels = np.random.default_rng(_SPLIT_SEED), np.array(dataset["label"])
    held: list[int] = []
    for number in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == number))
        held += rows[: min(round(fraction * len(rows)), len(rows) - 1)].tolist()
    if not held:
        raise ValueError(f"{setting}={fraction} holds out no image of any class: raise it.")
    return dataset.select(np.setdiff1d(np.arange(len(labels)), held)), dataset.select(sorted(held))
