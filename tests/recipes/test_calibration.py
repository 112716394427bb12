"""Figures of probabilities, held to what their definitions say literally, and the rows that they are computed from."""

import math

import numpy as np
import pytest
from tiny_glue import QUICK, make_rows, save_bert, write_rows, write_task
from tiny_images import QUICK as QUICK_IMAGES
from tiny_images import SMALL, write_folder
from transformers import EvalPrediction

from hf_lsam_recipes import run_glue
from hf_lsam_recipes import run_image_classification as images
from hf_lsam_recipes.support.calibration import ClassifierMetrics, fit_temperature, probability_metrics
from hf_lsam_recipes.support.comparison.plan import is_greater_better
from hf_lsam_recipes.support.text.glue_data import load_text_data
from hf_lsam_recipes.support.text.glue_tasks import DataArguments


def draw(classes: int, rows: int = 400, sharpness: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Overconfident logits that are right more often than not, and the true classes."""
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, rows)
    return sharpness * (rng.normal(size=(rows, classes)) + np.eye(classes)[labels]), labels


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def literal(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Row by row, as the definitions say."""
    nll, brier, bins = 0.0, 0.0, [(0, 0.0, 0)] * 15
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        probabilities = softmax(row)
        nll -= math.log(probabilities[label])
        brier += sum((p - (number == label)) ** 2 for number, p in enumerate(probabilities))
        confidence = max(probabilities)
        place = min(int(confidence * 15), 14)
        count, total, right = bins[place]
        bins[place] = (count + 1, total + confidence, right + (probabilities.index(confidence) == label))
    rows = len(labels)
    ece = sum(abs(total - right) / rows for _, total, right in bins)
    return {"nll": nll / rows, "brier": brier / rows, "ece": ece}


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_figures_equal_their_definitions(classes):
    logits, labels = draw(classes)
    expected = literal(logits, labels)
    expected |= {f"{name}_scaled": literal(logits / 1.7, labels)[name] for name in ("nll", "brier")}
    figures = probability_metrics(logits, labels, temperature=1.7)
    # torchmetrics sums up in float32.
    assert figures.pop("ece") == pytest.approx(expected.pop("ece"), abs=1e-5)
    assert figures == pytest.approx(expected, rel=1e-9)
    assert set(probability_metrics(logits, labels)) == {"nll", "brier", "ece"}


@pytest.mark.parametrize("classes", [2, 5])
def test_no_other_temperature_has_a_lower_loss(classes):
    logits, labels = draw(classes)
    temperature = fit_temperature(logits, labels)
    assert 1.5 < temperature < 20
    best = literal(logits / temperature, labels)["nll"]
    for other in (0.99, 1.01, 1 / temperature, 3):
        assert literal(logits / temperature / other, labels)["nll"] > best
    # Three times as large logits need three times as large a temperature.
    assert fit_temperature(3 * logits, labels) == pytest.approx(3 * temperature, rel=1e-4)


def test_a_comparison_takes_lower_ones_for_better():
    names = [*probability_metrics(*draw(2), temperature=2.0), "loss", "neutral_loss_before", "perplexity"]
    assert not any(is_greater_better(f"{split}_{name}") for split in ("eval", "shift_books") for name in names)
    assert all(map(is_greater_better, ("eval_accuracy", "shift_books_accuracy", "predict_matthews_correlation")))


def test_no_loss_is_clipped_and_no_logit_overflows():
    logits, labels = np.array([[1000.0, 0.0], [0.0, 1000.0]], dtype=np.float32), np.array([1, 1])
    assert probability_metrics(logits, labels)["nll"] == 500


def test_logits_that_are_not_finite_give_no_figure_and_no_error():
    logits, labels = np.array([[np.nan, 0.0], [1.0, 0.0]]), np.array([0, 1])
    assert math.isnan(fit_temperature(logits, labels))
    figures = probability_metrics(logits, labels, temperature=math.nan)
    assert len(figures) == 5 and all(map(math.isnan, figures.values()))


def test_metrics_of_classes_and_of_probabilities_side_by_side():
    logits, labels = draw(3)
    metrics = ClassifierMetrics(
        lambda predictions, references: {"accuracy": float(np.mean(predictions == references))}
    )
    plain = metrics(EvalPrediction(logits, labels))
    assert list(plain) == ["accuracy", "nll", "brier", "ece"]
    metrics.temperature = 2.0
    scaled = metrics(EvalPrediction(logits, labels))
    assert list(scaled) == [*plain, "nll_scaled", "brier_scaled"]
    assert scaled["nll_scaled"] == pytest.approx(literal(logits / 2, labels)["nll"])


def test_rows_set_aside_are_used_for_nothing_else(tmp_path):
    data = write_task(tmp_path, "sst2", 20)
    whole = load_text_data(DataArguments("sst2", data), ["validation"], {}).splits["validation"]
    parts = load_text_data(DataArguments("sst2", data, calibration_fraction=0.3), ["train", "validation"], {}).splits
    assert (len(parts["validation"]), len(parts["calibration"])) == (14, 6)
    rows = [(row["text"], row["label"]) for name in ("validation", "calibration") for row in parts[name]]
    assert sorted(rows) == sorted((row["text"], row["label"]) for row in whole)
    other = DataArguments("sst2", data, calibration_fraction=0.3, split_seed=1)
    assert load_text_data(other, ["validation"], {}).splits["calibration"]["text"] != parts["calibration"]["text"]


def test_a_run_reports_all_of_them(tmp_path):
    """On the validation data, on test data, and on data from elsewhere, by the temperature of the rows set aside."""
    files = {"train": 16, "validation": 20, "test": 10}
    argv = ["--model_name_or_path", save_bert(tmp_path / "bert", initializer_range=0.5), "--text_column", "sentence"]
    for seed, (name, count) in enumerate(files.items()):
        path = write_rows(tmp_path / f"{name}.tsv", make_rows("sst2", count, seed=seed))
        argv += [f"--{name}_file", str(path)]
    shifted = [
        f"{name}={write_rows(tmp_path / f'{name}.tsv', make_rows('sst2', 8, seed=seed))}"
        for seed, name in enumerate(("books", "dvd"), start=7)
    ]
    argv += ["--calibration_fraction", "0.3", "--shift_files", *shifted, "--output_dir", str(tmp_path / "out")]
    run = run_glue.prepare([*argv, *QUICK, "--do_train", "--do_eval", "--do_predict"])
    metrics = run_glue.execute(run)
    assert (metrics["eval_samples"], metrics["eval_calibration_samples"]) == (14, 6)

    def logits(split: str) -> tuple[np.ndarray, np.ndarray]:
        output = run.trainer.predict(run.datasets[split])
        return output.predictions, output.label_ids

    temperature = fit_temperature(*logits("calibration"))
    assert metrics["eval_temperature"] == pytest.approx(temperature)
    for split, prefix in (("validation", "eval"), ("test", "predict"), ("shift_books", "shift_books")):
        expected = probability_metrics(*logits(split), temperature)
        assert {name: metrics[f"{prefix}_{name}"] for name in expected} == pytest.approx(expected), split
    for name in ("accuracy", "nll_scaled", "ece", "loss"):
        mean = (metrics[f"shift_books_{name}"] + metrics[f"shift_dvd_{name}"]) / 2
        assert metrics[f"shift_{name}"] == pytest.approx(mean)


def test_a_run_on_images_reports_them_too(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    argv = [
        *SMALL,
        *QUICK_IMAGES,
        "--output_dir",
        str(tmp_path / "out"),
        "--max_steps",
        "1",
        "--do_train",
        "--do_eval",
    ]
    for seed, name in enumerate(("train", "validation", "test")):
        argv += [f"--{name}_images", write_folder(tmp_path / name, 8, seed)]
    run = images.prepare([*argv, "--do_predict", "--calibration_fraction", "0.25"])
    metrics = images.execute(run)
    assert (metrics["eval_samples"], metrics["eval_calibration_samples"]) == (18, 6)
    names = {split: set(run.data.splits[split]["name"]) for split in ("validation", "calibration")}
    assert not names["validation"] & names["calibration"]
    temperature = fit_temperature(*run.trainer.predict(run.examples["calibration"])[:2])
    for split, prefix in (("validation", "eval"), ("test", "test")):
        expected = probability_metrics(*run.trainer.predict(run.examples[split])[:2], temperature)
        assert {name: metrics[f"{prefix}_{name}"] for name in expected} == pytest.approx(expected), split


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"calibration_fraction": 1.0}, "calibration_fraction must be at least 0 and less than 1"),
        ({"task_name": "stsb", "calibration_fraction": 0.2}, "this is a regression: set it to 0"),
        ({"shift_files": ["books.tsv"]}, "shift_files must be NAME=PATH .*'books.tsv'"),
        ({"shift_files": ["a=1.tsv", "a=2.tsv"]}, "shift_files uses a name twice"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**{"task_name": "sst2"} | settings)


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_a_part_without_rows_is_refused(fraction, tmp_path):
    data = write_task(tmp_path, "sst2")
    with pytest.raises(ValueError, match=f"calibration_fraction={fraction} of 16 validation rows leaves none to"):
        load_text_data(DataArguments("sst2", data, calibration_fraction=fraction), ["validation"], {})


def test_a_file_from_elsewhere_needs_labels(tmp_path):
    data = write_task(tmp_path, "sst2")
    path = write_rows(tmp_path / "books.tsv", make_rows("sst2", 4, labelled=False))
    with pytest.raises(ValueError, match="books.tsv.*label"):
        load_text_data(DataArguments("sst2", data, shift_files=[f"books={path}"]), ["train", "test"], {})
