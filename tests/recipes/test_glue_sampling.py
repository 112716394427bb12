"""The GLUE recipe's training data, in part, with wrong labels, or shared with the validation."""

import json

import pytest
from tiny_glue import make_rows, rte, write_rows, write_task

from hf_lsam_recipes import run_glue
from hf_lsam_recipes.support.text.glue_data import load_text_data
from hf_lsam_recipes.support.text.glue_tasks import GLUE_TASKS, DataArguments

pytest_plugins = ["glue_fixtures"]
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def mnli(tmp_path_factory) -> str:
    """100 rows a file, of three classes; each premise tells its row."""
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("train", "dev_matched", "dev_mismatched")):
        rows = [row | {"premise": f"{name} {number}"} for number, row in enumerate(make_rows("mnli", 100, seed=seed))]
        write_rows(folder / "mnli" / f"{name}.tsv", rows)
    return str(folder)


def load(data_dir, splits=("train", "validation"), task="mnli", **settings):
    return load_text_data(DataArguments(task_name=task, data_dir=data_dir, **settings), splits, {}).splits


def test_exactly_the_asked_share_of_the_training_labels_is_wrong(mnli):
    clean = load(mnli)
    wrong = {}
    for share in (0.1, 0.29, 0.5):
        noisy = load(mnli, label_noise=share)
        pairs = list(zip(clean["train"]["label"], noisy["train"]["label"], strict=True))
        wrong[share] = {row: label for row, (true, label) in enumerate(pairs) if label != true}
        assert len(wrong[share]) == round(100 * share)
        assert set(noisy["train"]["label"]) == {0, 1, 2}
        assert noisy["train"]["text"][:] == clean["train"]["text"][:]
        for split in ("validation", "validation_mismatched"):
            assert noisy[split].to_dict() == clean[split].to_dict()
    # Both other classes come up, and more noise is the same and some more.
    assert len({(label - row) % 3 for row, label in wrong[0.5].items()}) == 2
    assert wrong[0.1].items() < wrong[0.29].items() < wrong[0.5].items()


def test_noise_in_a_single_class_is_refused_as_that_class_is(tmp_path):
    path = write_rows(tmp_path / "train.csv", [{"text": "a", "label": "x"}] * 4)
    args = DataArguments(train_file=str(path), label_noise=0.5)
    with pytest.raises(ValueError, match=r"train.csv: all labels are the same \(0\), which leaves nothing to learn"):
        load_text_data(args, ["train"], {})


def test_noise_is_drawn_by_its_own_seed(mnli):
    first, again, other = (load(mnli, label_noise=0.3, split_seed=seed)["train"]["label"][:] for seed in (0, 0, 1))
    assert first == again != other


def test_a_fraction_holds_exactly_so_many_rows_and_those_of_a_smaller_one(mnli):
    parts = [load(mnli, train_fraction=share)["train"]["text"][:] for share in (0.1, 0.5, 1.0)]
    assert [len(part) for part in parts] == [10, 50, 100]
    assert set(parts[0]) < set(parts[1]) < set(parts[2])
    for part in parts:
        assert part == sorted(part, key=lambda text: int(text.split()[1]))
    assert load(mnli, train_fraction=0.5, split_seed=1)["train"]["text"][:] != parts[1]
    assert len(load(mnli, train_fraction=0.5, max_train_samples=7)["train"]) == 7


def test_rows_that_are_held_out_are_not_trained_on_and_the_tasks_own_are_for_the_test(mnli):
    plain = load(mnli)
    splits = load(mnli, SPLITS, validation_fraction=0.2, label_noise=0.5)
    assert {split: len(part) for split, part in splits.items()} == {
        "train": 80,
        "validation": 20,
        "test": 100,
        "test_mismatched": 100,
    }
    assert not set(splits["train"]["text"]) & set(splits["validation"]["text"])
    true = dict(zip(plain["train"]["text"], plain["train"]["label"], strict=True))
    assert all(true[row["text"]] == row["label"] for row in splits["validation"])
    assert splits["test"].to_dict() == plain["validation"].to_dict()
    assert splits["test_mismatched"].to_dict() == plain["validation_mismatched"].to_dict()
    fewer = load(mnli, SPLITS, validation_fraction=0.2, train_fraction=0.5, max_eval_samples=5)
    assert fewer["validation"]["text"][:] == splits["validation"]["text"][:5]
    assert set(load(mnli, ("validation",), validation_fraction=0.2)) == {"validation"}
    assert set(load(mnli, ("test",), validation_fraction=0.2)) == {"test", "test_mismatched"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_noise": 1.0}, "label_noise must be at least 0 and less than 1, but is 1.0"),
        ({"validation_fraction": -0.1}, "validation_fraction must be at least 0"),
        ({"train_fraction": 0.0}, "train_fraction must be more than 0 and at most 1"),
        ({"split_seed": -1}, "split_seed cannot be negative"),
        ({"task": "stsb", "label_noise": 0.1}, "label_noise replaces classes, and this is a regression"),
        ({"train_fraction": 0.001}, "leave none to train on"),
        ({"validation_fraction": 0.001}, "leave none to validate with"),
    ],
)
def test_what_cannot_be_drawn_is_refused(mnli, settings, message):
    with pytest.raises(ValueError, match=message):
        load(mnli, **settings)


def test_a_file_and_a_share_to_validate_with_are_one_too_many():
    with pytest.raises(ValueError, match="validation_file and validation_fraction both say"):
        DataArguments(train_file="a.csv", validation_file="b.csv", validation_fraction=0.1)


def test_predictions_on_labelled_data_have_metrics(bert, tmp_path):
    data = write_task(tmp_path, "rte", 20)
    argv = [*rte(bert, data, tmp_path / "out"), "--validation_fraction", "0.2", "--block_selection", "none"]
    metrics = run_glue.main([*argv, "--do_train", "--do_eval", "--do_predict"])
    assert {"eval_accuracy", "predict_accuracy"} <= metrics.keys()
    everything = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert everything["predict_accuracy"] == metrics["predict_accuracy"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "validation_fraction=0.2" in card and "label_noise" not in card
    # Of its validation set, a task has nothing to submit.
    assert (tmp_path / "out" / "predictions.tsv").exists() and not (tmp_path / "out" / "RTE.tsv").exists()
    names = GLUE_TASKS["rte"].labels
    rows = [row | {"label": names[row["label"]]} for row in make_rows("rte", 20, seed=1)]
    dev = str(write_rows(tmp_path / "named.tsv", rows))
    columns = ["--text_column", "sentence1", "--text_pair_column", "sentence2", "--max_seq_length", "32"]
    model = ["--model_name_or_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "again"), "--use_cpu"]
    again = run_glue.main([*model, *columns, "--test_file", dev, "--do_predict"])
    assert again["predict_accuracy"] == metrics["predict_accuracy"]
