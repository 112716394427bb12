"""GLUE's metrics against scikit-learn and SciPy."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from hf_lsam_recipes.support.text.glue_metric import METRICS, GlueMetric
from hf_lsam_recipes.support.text.glue_tasks import GLUE_TASKS

REFERENCES = {
    "accuracy": lambda p, r: metrics.accuracy_score(r, p),
    "f1": lambda p, r: metrics.f1_score(r, p, zero_division=0),
    "macro_f1": lambda p, r: metrics.f1_score(r, p, average="macro", zero_division=0),
    "matthews_correlation": lambda p, r: metrics.matthews_corrcoef(r, p),
    "pearson": lambda p, r: stats.pearsonr(p, r).statistic,
    "spearmanr": lambda p, r: stats.spearmanr(p, r).statistic,
}


def classes(count: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """References, and predictions that are right more often than not."""
    references = rng.integers(count, size=size)
    return np.where(rng.random(size) < 0.6, references, rng.integers(count, size=size)), references


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("size", [2, 3, 10, 1000])
def test_equals_scikit_learn_and_scipy(name, size):
    rng = np.random.default_rng(size)
    if "pearson" in METRICS[name]:
        # Of one decimal, so that ranks are tied.
        predictions, references = rng.normal(size=(2, size)).round(1)
    else:
        predictions, references = classes({"mnli": 3, "classification": 5}.get(name, 2), size, rng)
    result = GlueMetric(name).compute(predictions=predictions, references=references)
    assert tuple(result) == METRICS[name]
    for key, value in result.items():
        assert type(value) is float
        assert value == pytest.approx(REFERENCES[key](predictions, references), abs=1e-12)


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("predictions", [[0, 0, 0, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("references", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]])
@pytest.mark.parametrize("name", ["cola", "mrpc", "classification"])
def test_constant_predictions_are_scored_as_scikit_learn_scores_them(name, predictions, references):
    result = GlueMetric(name).compute(predictions=predictions, references=references)
    for key, value in result.items():
        assert value == pytest.approx(REFERENCES[key](predictions, references), abs=1e-12)


@pytest.mark.parametrize("predictions", [[2.5, 2.5, 2.5], [1.0, math.nan, 2.0]])
def test_undefined_correlation_is_nan(predictions):
    result = GlueMetric("stsb").compute(predictions=predictions, references=[1.0, 2.0, 3.0])
    assert all(math.isnan(value) for value in result.values())


def test_scores_keep_their_precision():
    """Values that only 64 bits tell apart are ranked apart."""
    result = GlueMetric("stsb").compute(predictions=[1.0, 1.0 + 1e-12, 1.0 + 2e-12], references=[1.0, 2.0, 3.0])
    assert result["spearmanr"] == pytest.approx(1)


def test_a_metric_is_used_again_and_again():
    metric = GlueMetric("rte")
    assert metric.compute(predictions=[0, 1], references=[0, 1]) == {"accuracy": 1.0}
    assert metric.compute(predictions=[0, 1], references=[1, 1]) == {"accuracy": 0.5}


def test_every_task_has_its_metrics():
    assert set(METRICS) == {*GLUE_TASKS, "classification", "regression"}


def test_unknown_name():
    with pytest.raises(ValueError, match=r"config_name must be one of cola, .*, but is 'glue'"):
        GlueMetric("glue")


def test_a_single_example_has_no_correlation():
    result = GlueMetric("stsb").compute(predictions=[1.0], references=[2.0])
    assert list(result) == ["pearson", "spearmanr"] and all(math.isnan(value) for value in result.values())


@pytest.mark.parametrize(("name", "values"), [("cola", [1, 1, 1]), ("stsb", [2.5, 2.5, 2.5])])
def test_undefined_values_are_no_warning(name, values, recwarn):
    """They would come again at every evaluation."""
    GlueMetric(name).compute(predictions=values, references=values)
    assert not recwarn.list
