"""Quality of a classifier's probabilities: likelihood, Brier score and calibration error, and temperature scaling."""

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import brier_score_loss
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer

from hf_lsam_recipes.support.logits import read_logits

# Names of the metrics, and of those that temperature scaling adds.
FIGURES, SCALED = ("nll", "brier", "ece"), ("nll_scaled", "brier_scaled")
BINS = 15
# The temperature is searched from 1 / MAX_TEMPERATURE to this.
MAX_TEMPERATURE = 100.0


def probability_metrics(logits: np.ndarray, labels: np.ndarray, temperature: float | None = None) -> dict[str, float]:
    """
    Metrics of the predicted probabilities; lower is better for all of them.

    Args:
        logits (`np.ndarray` of shape `(rows, classes)`): The output of the model.
        labels (`np.ndarray` of shape `(rows,)`): The true classes.
        temperature (`float`, *optional*): The result of `fit_temperature` on other rows.

    Returns:
        `nll`, the mean negative log-likelihood in nats; `brier`, the mean squared distance between the probabilities
        of all classes and the true ones (Brier, 1950: from 0 to 2); `ece`, the expected calibration error of the most
        probable class in 15 bins of equal width (Guo et al., ICML 2017). With a temperature also `nll_scaled` and
        `brier_scaled`, of the logits divided by it. All are NaN if any logit is not finite.
    """
    if not np.isfinite(logits).all():
        return dict.fromkeys((*FIGURES, *(SCALED if temperature is not None else ())), math.nan)
    # Imported late: it takes seconds.
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    ece = multiclass_calibration_error(
        torch.from_numpy(softmax(logits, axis=1)), torch.from_numpy(labels), logits.shape[1], n_bins=BINS, norm="l1"
    )
    metrics = _proper_scores(logits, labels) | {"ece": float(ece)}
    if temperature is not None:
        scaled = _proper_scores(logits / temperature, labels)
        metrics |= {f"{name}_scaled": value for name, value in scaled.items()}
    return metrics


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """
    Fit the temperature: the divisor of the logits that minimises the negative log-likelihood (Guo et al., ICML 2017).

    Args:
        logits (`np.ndarray` of shape `(rows, classes)`): The output of the model on rows held out for this purpose.
        labels (`np.ndarray` of shape `(rows,)`): The true classes of these rows.

    Returns:
        `float`: The temperature, from 0.01 to 100; NaN if any logit is not finite.
    """
    if not np.isfinite(logits).all():
        return math.nan
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)

    # The loss is convex in the inverse temperature, so it has a single minimum on the logarithmic scale as well.
    def loss(log_temperature: float) -> float:
        return _nll(logits / math.exp(log_temperature), labels)

    bound = math.log(MAX_TEMPERATURE)
    return math.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-8}).x)


class ClassifierMetrics:
    """
    The `compute_metrics` of the Trainer for a classifier: metrics of the predicted classes and of the probabilities.

    Args:
        metric (`Callable`): Takes `predictions` and `references`, class ids, and returns metrics by name.

    Attributes:
        temperature (`float` or `None`): The divisor of the logits for `nll_scaled` and `brier_scaled`. `None`, which
            leaves both out, until `calibrate` is called.
    """

    def __init__(self, metric: Callable[..., dict[str, float]]):
        self.metric = metric
        self.temperature: float | None = None

    def __call__(self, output: EvalPrediction) -> dict[str, float]:
        logits = read_logits(output.predictions)
        metrics = self.metric(predictions=logits.argmax(axis=-1), references=output.label_ids)
        return metrics | probability_metrics(logits, output.label_ids, self.temperature)

    def calibrate(self, trainer: Trainer, rows: Dataset) -> dict[str, float]:
        """Fit the temperature on `rows`, held out for it; returns `temperature` and `calibration_samples`."""
        output = trainer.predict(rows, metric_key_prefix="calibration")
        self.temperature = fit_temperature(read_logits(output.predictions), output.label_ids)
        return {"temperature": self.temperature, "calibration_samples": len(rows)}  # type: ignore[arg-type]


def _nll(logits: np.ndarray, labels: np.ndarray) -> float:
    return -float(log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def _proper_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    classes = np.arange(logits.shape[1])
    brier = brier_score_loss(labels, softmax(logits, axis=1), labels=classes, scale_by_half=False)
    return {"nll": _nll(logits, labels), "brier": float(brier)}
