"""
GLUE's metrics as one `evaluate.Metric`, computed right here: nothing is fetched from the Hub.

Needs datasets and evaluate, which the `recipes` extra installs.
"""

import datasets
import evaluate
import numpy as np

METRICS = {
    "cola": ("matthews_correlation",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
    "qqp": ("accuracy", "f1"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
    "classification": ("accuracy", "macro_f1"),
    "regression": ("pearson", "spearmanr"),
}


class GlueMetric(evaluate.Metric):
    """
    The metrics of one GLUE task, or of a text set of one's own.

    `matthews_correlation` (of two classes), `f1` (of class 1) and `macro_f1` are 0 where a division by 0 would leave
    them undefined, as in scikit-learn. `pearson` and `spearmanr` of a constant are NaN, as in SciPy.

    Args:
        config_name (`str`):
            A GLUE task, or `"classification"` or `"regression"`: a key of `METRICS`, which lists what each one has.
        keep_in_memory (`bool`, *optional*, defaults to `True`):
            Keep predictions and references in memory instead of in a cache file.
        kwargs (*optional*):
            Any other argument of `evaluate.Metric`.

    Raises:
        ValueError: if `config_name` is none of them.

    Example:

    ```python
    >>> GlueMetric("mrpc").compute(predictions=[1, 1, 0, 0], references=[1, 0, 0, 0])
    {'accuracy': 0.75, 'f1': 0.6666666666666666}
    ```
    """

    def __init__(self, config_name: str, keep_in_memory: bool = True, **kwargs):
        if config_name not in METRICS:
            raise ValueError(f"config_name must be one of {', '.join(METRICS)}, but is {config_name!r}.")
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("float64" if "pearson" in METRICS[self.config_name] else "int64")
        return evaluate.MetricInfo(
            description="The metrics of the GLUE benchmark.",
            citation="Wang et al., GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language "
            "Understanding, ICLR 2019",
            inputs_description="predictions and references: class ids, or scores for a regression.",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        # Lists, since datasets' own NumPy format has 32-bit numbers only.
        arrays = np.asarray(predictions), np.asarray(references)
        return {name: float(_FUNCTIONS[name](*arrays)) for name in METRICS[self.config_name]}


def _accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    return np.mean(predictions == references)


def _f1(predictions: np.ndarray, references: np.ndarray, label: int = 1) -> float:
    predicted, true = predictions == label, references == label
    size = predicted.sum() + true.sum()
    return 2 * (predicted & true).sum() / size if size else 0.0


def _macro_f1(predictions: np.ndarray, references: np.ndarray) -> float:
    return float(np.mean([_f1(predictions, references, label) for label in np.union1d(predictions, references)]))


def _matthews(predictions: np.ndarray, references: np.ndarray) -> float:
    # Of two classes, Matthews' coefficient is Pearson's of the class ids.
    coefficient = _pearson(predictions, references)
    return 0.0 if np.isnan(coefficient) else coefficient


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return np.corrcoef(x, y)[0, 1]


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    return _pearson(_ranks(x), _ranks(y))


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value, ties sharing their mean rank; NaN for all where one is NaN."""
    if np.isnan(values).any():
        return np.full(len(values), np.nan)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


_FUNCTIONS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearmanr": _spearman,
}
