"""What the recipe for images reads, what it refuses, and how it changes the images of the training."""

import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset
from tiny_images import CLASSES, picture, write_folder, write_hub, write_zip

from hf_lsam_recipes.support import tables
from hf_lsam_recipes.support.images import data as image_data
from hf_lsam_recipes.support.images.data import DataArguments, load_image_data
from hf_lsam_recipes.support.images.examples import Augmentation, read_image

ALL = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`load_dataset` leaves nothing in the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def load(splits=("train",), model_labels=None, **settings):
    return load_image_data(DataArguments(**settings), splits, model_labels)


def pixels(dataset) -> list[np.ndarray]:
    return [np.asarray(read_image(image)) for image in dataset["image"]]


def test_folders_zips_and_the_hub_give_the_same_images(tmp_path):
    hub = load(("train", "test"), dataset_name=write_hub(tmp_path / "hub", "img", "fine"), **columns("img", "fine"))
    folder = write_folder(tmp_path / "train")
    (tmp_path / "train" / ".DS_Store").write_text("hidden")
    own = {"train_images": folder, "test_images": write_folder(tmp_path / "test", seed=1)}
    folders = load(("train", "test"), **own)
    zips = {name: write_zip(tmp_path / f"{name}.zip", path) for name, path in own.items()}
    with zipfile.ZipFile(zips["train_images"], "a") as archive:
        archive.writestr("__MACOSX/red/._0.png", "hidden")
    zipped = load(("train", "test"), **zips)
    assert hub.labels == folders.labels == zipped.labels == CLASSES
    for split in ("train", "test"):
        left, right = folders.splits[split], zipped.splits[split]
        assert left["label"][:] == right["label"][:] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
        assert left["name"][:] == right["name"][:] and left["name"][5] == "green/1.png"
        assert hub.splits[split]["label"][:] == [0, 1, 2] * 4 and hub.splits[split]["name"][4] == "row 5"
        assert all(np.array_equal(a, b) for a, b in zip(pixels(left), pixels(right), strict=True))
    stack = np.stack(pixels(folders.splits["train"])).astype(float) / 255
    for data in (folders, zipped):
        assert data.mean == pytest.approx(stack.mean((0, 1, 2)), abs=1e-4)
        assert data.std == pytest.approx(stack.std((0, 1, 2)), abs=1e-4)


def columns(image: str, label: str) -> dict[str, str]:
    return {"image_column": image, "label_column": label}


def test_images_of_any_kind_are_read_in_colour_and_upright(tmp_path):
    folder = Path(write_folder(tmp_path / "train", count=1))
    PIL.Image.fromarray(np.full((4, 6), 9, np.uint8)).save(folder / "red" / "grey.png")
    PIL.Image.fromarray(np.full((4, 6, 4), 9, np.uint8)).save(folder / "red" / "alpha.webp", lossless=True)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    PIL.Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(folder / "red" / "turned.jpg", exif=exif)
    data = load(train_images=str(folder)).splits["train"]
    shapes = dict(zip(data["name"], [image.shape for image in pixels(data)], strict=True))
    assert shapes["red/grey.png"] == shapes["red/alpha.webp"] == (4, 6, 3)
    assert shapes["red/turned.jpg"] == (6, 4, 3)


def test_labels_of_the_hub_may_be_names_or_numbers(tmp_path, monkeypatch):
    images = [{"bytes": picture(n % 3, n), "path": None} for n in range(6)]
    for labels, names in ((["cat", "dog", "ant"] * 2, ("ant", "cat", "dog")), ([10, 9, 2] * 2, ("2", "9", "10"))):
        dataset = Dataset.from_dict({"image": images, "label": labels}).cast_column("image", image_data.Image())
        monkeypatch.setattr(tables, "load_dataset", lambda *_, dataset=dataset: {"train": dataset})
        data = load(dataset_name="some/set")
        assert data.labels == names
        assert [names[number] for number in data.splits["train"]["label"]] == [str(label) for label in labels]


def test_a_fraction_of_each_class_is_held_out_once_and_for_all(tmp_path):
    folder = write_folder(tmp_path / "train", count=8)
    settings = {"train_images": folder, "validation_fraction": 0.25}
    data = load(("train", "validation"), **settings)
    train, held = (set(data.splits[split]["name"]) for split in ("train", "validation"))
    assert not train & held and len(train | held) == 24
    assert sorted(data.splits["validation"]["label"]) == [0, 0, 1, 1, 2, 2]
    assert set(load(**settings).splits["train"]["name"]) == train
    ids = {name: number for number, name in enumerate(CLASSES)}
    alone = load(("validation",), ids, **settings)
    assert list(alone.splits) == ["validation"] and set(alone.splits["validation"]["name"]) == held


def test_a_limit_takes_images_of_all_kinds(tmp_path):
    folder = write_folder(tmp_path / "train", count=8)
    settings = {"train_images": folder, "validation_images": folder, "test_images": folder}
    data = load(ALL, **settings, max_train_samples=12, max_eval_samples=5)
    assert [len(data.splits[split]) for split in ALL] == [12, 5, 24]
    assert set(data.splits["train"]["label"]) == {0, 1, 2}


def test_classes_keep_the_ids_of_a_model_that_is_not_trained(tmp_path):
    ids = {"red": 0, "yellow": 1, "blue": 2, "green": 3}
    data = load(("test",), ids, test_images=write_folder(tmp_path / "test", count=1, classes=("green", "red")))
    assert data.labels == ("red", "yellow", "blue", "green")
    assert data.splits["test"]["label"][:] == [3, 0]


# Errors


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "No data: set dataset_name, or train_images"),
        ({"dataset_name": "x", "test_images": "y"}, "dataset_name=x and test_images are both set"),
        ({"train_images": "x", "validation_fraction": 1.0}, "validation_fraction must lie between 0 and 1"),
        ({"validation_images": "x", "validation_fraction": 0.5}, "validation_images are both set"),
        ({"train_images": "x", "crop_padding": -1}, "crop_padding must be at least 0"),
        ({"train_images": "x", "max_train_samples": 0}, "max_train_samples must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**settings)


def spoil(folder: Path, what: str) -> None:
    """Make one thing wrong with the images in `folder`."""
    if what == "empty":
        for file in folder.rglob("*.png"):
            file.unlink()
    elif what == "one class":
        for name in ("red", "green"):
            for file in (folder / name).iterdir():
                file.unlink()
    elif what == "top":
        (folder / "stray.png").write_bytes(picture(0, 0))
    elif what == "text":
        (folder / "red" / "notes.txt").write_text("no image")
    elif what == "cut":
        (folder / "red" / "1.png").write_bytes(picture(2, 1)[:-40])


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(
    "what, message",
    [
        ("empty", r"train_images=.* has no images. It must contain one folder"),
        ("one class", r"train_images=.*: all training images are of one class \(blue\)"),
        ("top", r"train_images=.* has a file stray.png next to the folders of the classes"),
        ("text", r"train_images=.*, red/notes.txt: the image cannot be read \(.*\). Repair or remove it"),
        ("cut", r"train_images=.*, red/1.png: the image cannot be read \(.*\). Repair or remove it"),
    ],
)
def test_images_that_cannot_be_trained_on(tmp_path, what, message, packed):
    folder = Path(write_folder(tmp_path / "train", count=2))
    spoil(folder, what)
    path = str(folder)
    if packed:
        path = str(tmp_path / "train.zip")
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*.*")):
                archive.write(file, file.relative_to(folder))
    with pytest.raises(ValueError, match=message) as error:
        load(train_images=path)
    assert "\n" not in str(error.value)


def test_too_few_images_to_learn_from(tmp_path):
    with pytest.raises(ValueError, match=r"all training images are of one class .* max_train_samples"):
        load(train_images=write_folder(tmp_path / "train"), max_train_samples=1)


def test_places_and_splits_that_are_not_there(tmp_path):
    folder = write_folder(tmp_path / "train", count=1)
    with pytest.raises(ValueError, match="nowhere is neither a folder nor a file"):
        load(train_images="nowhere")
    for number, packed in enumerate((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)):
        path = tmp_path / f"damaged-{number}.zip"
        with zipfile.ZipFile(path, "w", packed) as archive:
            for name in ("cat/1.png", "dog/1.png"):
                archive.writestr(name, bytes(range(256)) * 40)
        content = bytearray(path.read_bytes())
        content[40:120] = b"\xff" * 80
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"damaged-{number}.zip cannot be read as a zip"):
            load(train_images=str(path))
    (tmp_path / "broken.zip").write_text("no zip")
    with pytest.raises(ValueError, match="broken.zip cannot be read as a zip"):
        load(train_images=str(tmp_path / "broken.zip"))
    with pytest.raises(ValueError, match="No test data: set test_images, or leave out do_predict"):
        load(("train", "test"), train_images=folder)
    with pytest.raises(ValueError, match="set validation_images, or validation_fraction, or leave out do_eval"):
        load(("train", "validation"), train_images=folder)
    with pytest.raises(ValueError, match="validation_fraction=0.1 holds out no image"):
        load(train_images=folder, validation_fraction=0.1)


def test_nothing_is_held_out_of_a_data_set_with_images_to_evaluate_on(tmp_path):
    name = write_hub(tmp_path / "hub", "image", "label", ("train", "validation"))
    with pytest.raises(ValueError, match=r"has validation images, .* set validation_fraction to null"):
        load(("train", "validation"), dataset_name=name, validation_fraction=0.5)


def test_a_class_of_the_test_that_is_not_trained(tmp_path):
    own = {"train_images": write_folder(tmp_path / "train"), "test_images": write_folder(tmp_path / "test")}
    write_folder(tmp_path / "test", classes=("violet",))
    message = r"test_images=.* has the class 'violet', which is not one of the classes of the model: blue, green, red"
    with pytest.raises(ValueError, match=message):
        load(("train", "test"), **own)


def test_a_data_set_of_the_hub_that_does_not_fit(tmp_path, monkeypatch):
    name = write_hub(tmp_path / "hub", "img", "fine")
    with pytest.raises(ValueError, match=r"has no column 'image', but img, fine. Set image_column"):
        load(dataset_name=name)
    with pytest.raises(ValueError, match=r"has no column 'label', but img, fine. Set label_column"):
        load(dataset_name=name, image_column="img")
    with pytest.raises(ValueError, match=r"column 'fine' holds no images"):
        load(dataset_name=name, **columns("fine", "img"))
    with pytest.raises(ValueError, match=r"column 'img' holds no classes"):
        load(dataset_name=name, **columns("img", "img"))
    with pytest.raises(ValueError, match=r"No validation data: .* has train, test. .* set validation_fraction"):
        load(("train", "validation"), dataset_name=name, **columns("img", "fine"))
    with pytest.raises(ValueError, match=r"dataset_name=no/where could not be loaded .* train_images"):
        load(dataset_name="no/where")
    unlabelled = tables.load_dataset(name)
    unlabelled["test"] = unlabelled["test"].map(
        lambda row, index: {"fine": -1 if index == 3 else 0}, with_indices=True
    )
    monkeypatch.setattr(tables, "load_dataset", lambda *_: unlabelled)
    with pytest.raises(ValueError, match=r"\(test\), row 4: no class is given. Leave out do_predict"):
        load(("train", "test"), dataset_name=name, **columns("img", "fine"))


# Augmentation


def test_an_image_is_shifted_over_the_mean_colour_and_mirrored():
    image = torch.arange(1.0, 49.0).view(3, 4, 4)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    possible = {}
    for top in range(5):
        for left in range(5):
            crop = padded[:, top : top + 4, left : left + 4]
            possible |= {tuple(crop.flatten().tolist()): False, tuple(crop.flip(-1).flatten().tolist()): True}
    augment = Augmentation(crop_padding=2, horizontal_flip=True, seed=1)
    seen = [tuple(augment(image, 0, index).flatten().tolist()) for index in range(600)]
    assert set(seen) == possible.keys() and len(possible) == 50
    assert sum(possible[result] for result in seen) / 600 == pytest.approx(0.5, abs=0.06)


def test_epoch_image_and_seed_decide_the_change_and_nothing_else():
    image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))

    def change(seed, epoch, index):
        return Augmentation(4, True, seed)(image, epoch, index)

    state = torch.get_rng_state()
    first = change(0, 0, 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert torch.equal(change(0, 0, 0), first)
    assert not any(torch.equal(change(*other), first) for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    assert torch.equal(Augmentation(0, False, 0)(image, 3, 3), image)
