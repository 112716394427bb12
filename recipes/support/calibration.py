"""How good the probabilities of a classifier are: figures beside accuracy, before and after temperature scaling."""

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

# Names of the figures, and of those that temperature scaling adds.
FIGURES, SCALED = ("nll", "brier", "ece"), ("nll_scaled", "brier_scaled")
BINS = 15
# The temperature is looked for between its inverse and this.
MOST = 100.0


def probability_metrics(logits: np.ndarray, labels: np.ndarray, temperature: float | None = None) -> dict[str, float]:
    """
    Figures of the predicted probabilities, all of them better when lower.

    Args:
        logits (`np.ndarray` of shape `(rows, classes)`): What the model returns.
        labels (`np.ndarray` of shape `(rows,)`): The true classes.
        temperature (`float`, *optional*): That of `fit_temperature`, fitted on other rows.

    Returns:
        `nll`, the mean negative log-likelihood in nats; `brier`, the mean squared distance between the probabilities
        of all classes and the true ones (Brier, 1950: from 0 to 2); `ece`, the expected calibration error of the most
        probable class in 15 bins of equal width (Guo et al., ICML 2017). With a temperature also `nll_scaled` and
        `brier_scaled`, of the logits divided by it. All are NaN where a logit is not finite.
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
    The number by which to divide logits so that their negative log-likelihood is lowest (Guo et al., ICML 2017).

    Args:
        logits (`np.ndarray` of shape `(rows, classes)`): Of rows that no figure is computed from.
        labels (`np.ndarray` of shape `(rows,)`): Their true classes.

    Returns:
        `float`: The temperature, from 0.01 to 100; NaN where a logit is not finite.
    """
    if not np.isfinite(logits).all():
        return math.nan
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)

    # Convex in the inverse of the temperature, so its minimum is the only one on the logarithmic scale, too.
    def loss(log_temperature: float) -> float:
        return _nll(logits / math.exp(log_temperature), labels)

    bound = math.log(MOST)
    return math.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-8}).x)


class ClassifierMetrics:
    """
    The `compute_metrics` of the Trainer for a classifier: those of the predicted classes, and of their probabilities.

    Args:
        metric (`Callable`): Takes `predictions` and `references`, class ids, and returns metrics by name.

    Attributes:
        temperature (`float` or `None`): What logits are divided by for `nll_scaled` and `brier_scaled`.
    """

    def __init__(self, metric: Callable[..., dict[str, float]]):
        self.metric = metric
        self.temperature: float | None = None

    def __call__(self, output: EvalPrediction) -> dict[str, float]:
        logits = read_logits(output.predictions)
        metrics = self.metric(predictions=logits.argmax(axis=-1), references=output.label_ids)
        return metrics | probability_metrics(logits, output.label_ids, self.temperature)

    def calibrate(self, trainer: Trainer, rows: Dataset) -> dict[str, float]:
        """Fit the temperature on `rows`, which nothing else uses; returns it, and how many there are."""
        output = trainer.predict(rows, metric_key_prefix="calibration")
        self.temperature = fit_temperature(read_logits(output.predictions), output.label_ids)
        return {"temperature": self.temperature, "calibration_samples": len(rows)}  # type: ignore[arg-type]


def _nll(logits: np.ndarray, labels: np.ndarray) -> float:
    return -float(log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def _proper_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    classes = np.arange(logits.shape[1])
    brier = brier_score_loss(labels, softmax(logits, axis=1), labels=classes, scale_by_half=False)
    return {"nll": _nll(logits, labels), "brier": float(brier)}
