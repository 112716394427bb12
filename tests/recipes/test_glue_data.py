"""What the GLUE recipe reads, and what it refuses."""

import json
import os

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tiny_glue import make_rows, write_rows, write_task

from hf_lsam_recipes.support import tables
from hf_lsam_recipes.support.text import glue_data
from hf_lsam_recipes.support.text.glue_data import load_text_data
from hf_lsam_recipes.support.text.glue_tasks import GLUE_TASKS, DataArguments

NO_LABELS: dict[str, int] = {}


def load(splits=("train",), model_labels=NO_LABELS, **settings):
    return load_text_data(DataArguments(**settings), splits, model_labels)


def load_rows(tmp_path, rows, suffix=".jsonl", **settings):
    return load(train_file=str(write_rows(tmp_path / f"train{suffix}", rows)), **settings)


@pytest.mark.parametrize("suffix", glue_data.SUFFIXES)
@pytest.mark.parametrize("task", GLUE_TASKS)
def test_every_format_gives_the_same_examples(tmp_path, task, suffix):
    rows = make_rows(task, 12)
    write_rows(tmp_path / task / f"train{suffix}", rows)
    data = load(task_name=task, data_dir=str(tmp_path))
    columns = zip(("text", "text_pair"), GLUE_TASKS[task].columns, strict=False)
    expected = {name: [row[source] for row in rows] for name, source in columns}
    assert data.splits["train"].to_dict() == expected | {"label": [row["label"] for row in rows]}
    assert data.labels == GLUE_TASKS[task].labels


@pytest.mark.parametrize("suffix", glue_data.SUFFIXES)
def test_labels_by_name(tmp_path, suffix):
    rows = make_rows("mnli", 6)
    names = ("entailment", "neutral", "contradiction")
    write_rows(tmp_path / "mnli" / f"train{suffix}", [row | {"label": names[row["label"]]} for row in rows])
    data = load(task_name="mnli", data_dir=str(tmp_path))
    assert data.splits["train"]["label"][:] == [0, 1, 2, 0, 1, 2]


def test_tsv_has_no_quoting(tmp_path):
    texts = ['"unclosed', 'said "yes"', "NA", "null", "", "1", "true", '""', " padded ", "a,b", "#", "NaN"]
    rows = [{"sentence": text, "label": number % 2} for number, text in enumerate(texts)]
    write_rows(tmp_path / "cola" / "train.tsv", rows)
    assert load(task_name="cola", data_dir=str(tmp_path)).splits["train"]["text"][:] == texts


def test_csv_is_quoted(tmp_path):
    texts = ['say "yes"', "two\nlines", "a,b", "NA", ""]
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(texts)]
    assert load_rows(tmp_path, rows, ".csv").splits["train"]["text"][:] == texts
    # More than is parsed at a time, so that line breaks lie at every place of a block.
    texts = ["line\n" * (number % 97) for number in range(9000)]
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(texts)]
    assert load_rows(tmp_path, rows, ".csv").splits["train"]["text"][:] == texts


@pytest.mark.parametrize("suffix", glue_data.SUFFIXES)
def test_labels_of_ones_own_are_those_of_the_training_file(tmp_path, suffix):
    train = write_rows(tmp_path / f"train{suffix}", [{"text": "a", "label": label} for label in (10, 9, 10, 2)])
    dev = write_rows(tmp_path / f"dev{suffix}", [{"text": "a", "label": label} for label in (2, 10)])
    data = load(("train", "validation"), train_file=str(train), validation_file=str(dev))
    assert data.labels == ("2", "9", "10")
    assert data.splits["train"]["label"][:] == [2, 1, 2, 0]
    assert data.splits["validation"]["label"][:] == [0, 2]


def test_labels_stay_as_they_are_written(tmp_path):
    rows = [{"text": "a", "label": label} for label in ("true", "01", "NA")]
    assert load_rows(tmp_path, rows, ".tsv").labels == ("01", "NA", "true")


def test_without_a_training_file_labels_are_the_models(tmp_path):
    file = write_rows(tmp_path / "dev.csv", [{"text": "a", "label": label} for label in ("dog", "cat")])
    data = load(("validation",), validation_file=str(file), model_labels={"dog": 0, "cat": 1})
    assert (data.labels, data.splits["validation"]["label"][:]) == (("dog", "cat"), [0, 1])
    file = write_rows(tmp_path / "dev.csv", [{"text": "a", "label": label} for label in (1, 0)])
    data = load(("validation",), validation_file=str(file), model_labels={"LABEL_0": 0, "LABEL_1": 1})
    assert data.splits["validation"]["label"][:] == [1, 0]


def test_numbers_of_ones_own(tmp_path):
    rows = [{"a": "x", "b": "y", "score": number} for number in (-7, 0.25, 3)]
    settings = {"text_column": "a", "text_pair_column": "b", "label_column": "score", "regression": True}
    data = load_rows(tmp_path, rows, ".csv", **settings)
    assert data.labels is None
    assert data.splits["train"].to_dict() == {"text": ["x"] * 3, "text_pair": ["y"] * 3, "label": [-7.0, 0.25, 3.0]}


def test_mnli_has_two_sets(tmp_path):
    folder = write_task(tmp_path, "mnli")
    splits = load(("train", "validation", "test"), task_name="mnli", data_dir=folder).splits
    assert set(splits) == {"train", "validation", "validation_mismatched", "test", "test_mismatched"}
    assert splits["validation"]["text"][:] != splits["validation_mismatched"]["text"][:]
    for split in ("test", "test_mismatched"):
        assert splits[split].column_names == ["text", "text_pair"]


def test_sample_limits(tmp_path):
    folder = write_task(tmp_path, "rte")
    settings = {"task_name": "rte", "data_dir": folder, "max_train_samples": 3, "max_eval_samples": 2}
    splits = load(("train", "validation", "test"), **settings).splits
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "validation": 2, "test": 8}


def test_edited_file_is_read_anew(tmp_path):
    """Also if neither its size nor its time of change gives it away."""
    path = write_rows(tmp_path / "train.csv", [{"text": text, "label": text} for text in "ab"])
    times = (path.stat().st_atime, path.stat().st_mtime)
    assert load(train_file=str(path)).splits["train"]["text"][:] == ["a", "b"]
    write_rows(path, [{"text": text, "label": text} for text in "cd"])
    os.utime(path, times)
    assert load(train_file=str(path)).splits["train"]["text"][:] == ["c", "d"]
    assert os.listdir(tmp_path) == ["train.csv"]


def hub_mnli(name, config):
    assert (name, config) == ("nyu-mll/glue", "mnli")
    names = list(GLUE_TASKS["mnli"].labels or ())
    texts = {"premise": Value("string"), "hypothesis": Value("string")}
    features = Features(texts | {"label": ClassLabel(names=names), "idx": Value("int32")})
    sets = {"train": 0, "validation_matched": 1, "validation_mismatched": 2, "test_matched": 3, "test_mismatched": 4}
    splits = {}
    for split, seed in sets.items():
        labels = {"label": -1} if split.startswith("test") else {}
        rows = [row | labels | {"idx": index} for index, row in enumerate(make_rows("mnli", 6, seed=seed))]
        splits[split] = Dataset.from_list(rows, features=features)
    return DatasetDict(splits)


def test_hub_gives_what_files_give(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "load_dataset", hub_mnli)
    splits = ("train", "validation", "test")
    from_hub = load(splits, task_name="mnli")
    from_files = load(splits, task_name="mnli", data_dir=write_task(tmp_path, "mnli", count=6))
    assert from_hub.labels == from_files.labels
    assert set(from_hub.splits) == set(from_files.splits)
    assert from_hub.splits["validation"].to_dict() == from_files.splits["validation"].to_dict()
    assert from_hub.splits["validation_mismatched"].to_dict() == from_files.splits["validation_mismatched"].to_dict()
    assert from_hub.splits["test"].column_names == ["text", "text_pair"]


def test_hub_out_of_reach(monkeypatch):
    def unreachable(*args):
        raise ConnectionError("no route")

    monkeypatch.setattr(tables, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"task_name=rte could not be loaded from nyu-mll/glue.*no route.*data_dir"):
        load(task_name="rte")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "No data: set task_name"),
        ({"task_name": "rtE"}, "task_name must be one of cola, .*, but is 'rtE'"),
        ({"task_name": "rte", "train_file": "a.csv"}, "train_file is for your own files"),
        ({"task_name": "rte", "label_column": "y"}, "label_column is for your own files"),
        ({"task_name": "rte", "regression": True}, "regression is for your own files"),
        ({"train_file": "a.csv", "data_dir": "b"}, "data_dir is for GLUE tasks, and train_file for your own"),
        ({"task_name": "rte", "max_train_samples": 0}, "max_train_samples must be at least 1, but is 0"),
        ({"task_name": "rte", "max_seq_length": -1}, "max_seq_length must be at least 1, but is -1"),
    ],
)
def test_settings_at_odds(settings, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**settings)


TEXT = {"text": "a", "label": 0}


@pytest.mark.parametrize(
    "rows, settings, message",
    [
        ([{"txt": "a", "label": 0}], {}, r"train.jsonl must have one column 'text', but has txt, label. Set text_col"),
        ([{"text": "a"}], {}, r"must have one column 'label', but has text"),
        ([TEXT], {"text_pair_column": "b"}, r"must have one column 'b', but has text, label"),
        ([TEXT, {"text": None, "label": 1}], {}, r"train.jsonl, row 2: column 'text' must hold text, but holds None"),
        ([{"text": 3, "label": 1}], {}, r"row 1: column 'text' must hold text, but holds 3"),
        ([TEXT, {"text": "b", "label": None}], {}, r"train.jsonl, row 2: label None is not one of 0"),
        ([{"text": "a", "label": label} for label in ("None", "x", None)], {}, r"row 3: label None is not one of"),
        ([TEXT, TEXT], {}, r"train.jsonl: all labels are the same \(0\)"),
        ([{"text": "a", "label": 0.5}, {"text": "a", "label": 1}], {}, r"labels are fractions.*Set regression"),
        ([{"text": "a", "label": "x"}], {"regression": True}, r"row 1: label 'x' is not a number"),
        ([TEXT, {"text": "a", "label": None}], {"regression": True}, r"row 2: label None is not a number"),
        ([TEXT, TEXT], {"regression": True}, r"all labels are the same \(0.0\)"),
        ([TEXT, {"text": "a", "label": 1}], {"max_train_samples": 1}, r"all labels are the same.*max_train_samples"),
    ],
)
def test_bad_rows(tmp_path, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path, rows, **settings)


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
@pytest.mark.parametrize("missing", ["", " "])
def test_an_empty_label_is_no_class(tmp_path, suffix, missing):
    rows = [{"text": "a", "label": label} for label in ("x", "y", missing)]
    with pytest.raises(ValueError, match=rf"train{suffix}, row 3: label '{missing}' is not one of x, y"):
        load_rows(tmp_path, rows, suffix)


@pytest.mark.parametrize("label, task", [("2", "rte"), ("-1", "rte"), ("Entailment", "rte"), ("1.0", "cola")])
def test_label_outside_the_task(tmp_path, label, task):
    rows = make_rows(task, 4)
    rows[2]["label"] = label
    write_rows(tmp_path / task / "train.tsv", rows)
    with pytest.raises(ValueError, match=rf"train.tsv, row 3: label '{label}' is not one of "):
        load(task_name=task, data_dir=str(tmp_path))


def test_label_outside_the_training_file(tmp_path):
    train = write_rows(tmp_path / "train.csv", [{"text": "a", "label": label} for label in "xy"])
    dev = write_rows(tmp_path / "dev.csv", [{"text": "a", "label": label} for label in "xz"])
    with pytest.raises(ValueError, match=r"dev.csv, row 2: label 'z' is not one of x, y"):
        load(("train", "validation"), train_file=str(train), validation_file=str(dev))


def test_score_outside_the_range(tmp_path):
    rows = make_rows("stsb", 4)
    rows[1]["label"] = 5.5
    write_rows(tmp_path / "stsb" / "train.tsv", rows)
    with pytest.raises(ValueError, match=r"row 2: label '5.5' is not a number from 0.0 to 5.0"):
        load(task_name="stsb", data_dir=str(tmp_path))


@pytest.mark.parametrize("task, fails", [("cola", True), ("stsb", True), ("rte", False)])
def test_one_label_in_the_validation_file_leaves_a_correlation_undefined(tmp_path, task, fails):
    write_task(tmp_path, task)
    settings = {"task_name": task, "data_dir": str(tmp_path), "max_eval_samples": 1}
    if fails:
        with pytest.raises(ValueError, match=r"dev.tsv: all labels are the same.*max_eval_samples"):
            load(("train", "validation"), **settings)
    else:
        load(("train", "validation"), **settings)


@pytest.mark.parametrize("name", ["train.tsv", "train.csv", "train.jsonl", "train.parquet"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"{name} cannot be read as {name[6:]}"):
        load(train_file=str(tmp_path / name))


def test_file_without_rows(tmp_path):
    (tmp_path / "train.tsv").write_text("text\tlabel\n")
    with pytest.raises(ValueError, match=r"train.tsv holds no example"):
        load(train_file=str(tmp_path / "train.tsv"))


def test_malformed_files(tmp_path):
    (tmp_path / "train.tsv").write_text("text\tlabel\na\t0\nb\tc\t1\n")
    with pytest.raises(ValueError, match=r"train.tsv cannot be read as tsv: .*Row #3: Expected 2 columns, got 3"):
        load(train_file=str(tmp_path / "train.tsv"))
    (tmp_path / "train.jsonl").write_text(json.dumps(TEXT) + "\n{")
    with pytest.raises(ValueError, match=r"train.jsonl cannot be read as jsonl"):
        load(train_file=str(tmp_path / "train.jsonl"))
    (tmp_path / "train.csv").write_bytes(b"text,label\n\xff,0\n")
    with pytest.raises(ValueError, match=r"train.csv is not UTF-8: line 2 has bytes of another encoding"):
        load(train_file=str(tmp_path / "train.csv"))


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"train.csv is not a file"):
        load(train_file=str(tmp_path / "train.csv"))
    with pytest.raises(ValueError, match=r"train.txt must end in .tsv, .csv, .jsonl, .parquet"):
        load(train_file=str(tmp_path / "train.txt"))
    with pytest.raises(ValueError, match=r"No validation data: set validation_file"):
        load(("validation",), train_file=str(tmp_path / "train.csv"))
    with pytest.raises(ValueError, match=r"has no rte/\{dev,validation\}.\{tsv,csv,jsonl,parquet\}"):
        load(("validation",), task_name="rte", data_dir=str(tmp_path))


def test_two_files_for_one_split(tmp_path):
    for name in ("dev.tsv", "validation.csv"):
        write_rows(tmp_path / "rte" / name, make_rows("rte", 4))
    with pytest.raises(ValueError, match=r"dev.tsv and .*validation.csv are both there"):
        load(("validation",), task_name="rte", data_dir=str(tmp_path))
