"""
The metrics of GLUE as an `evaluate.Metric`, computed by scikit-learn and SciPy without access to the Hub.

Needs datasets, evaluate, scikit-learn and SciPy, which the `recipes` extra installs.
"""

import math
import warnings
from collections.abc import Sequence

import datasets
import evaluate
from scipy import stats
from sklearn import metrics

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
    The metrics of a GLUE task, or of another classification or regression.

    `f1` is that of class 1. `matthews_correlation`, `f1` and `macro_f1` are 0 where they are undefined (0 / 0).
    `pearson` and `spearmanr` are NaN where they are undefined: for constant values, NaN, or a single example.

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
        with warnings.catch_warnings():
            # Undefined values are documented above and need no warning at each evaluation.
            warnings.filterwarnings("ignore", "A single label was found", UserWarning)
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            return {name: float(_FUNCTIONS[name](predictions, references)) for name in METRICS[self.config_name]}


def _pearson(predictions: Sequence[float], references: Sequence[float]) -> float:
    return stats.pearsonr(predictions, references).statistic if len(references) > 1 else math.nan


_FUNCTIONS = {
    "accuracy": lambda predictions, references: metrics.accuracy_score(references, predictions),
    "f1": lambda predictions, references: metrics.f1_score(references, predictions, zero_division=0),
    "macro_f1": lambda predictions, references: metrics.f1_score(
        references, predictions, average="macro", zero_division=0
    ),
    "matthews_correlation": lambda predictions, references: metrics.matthews_corrcoef(references, predictions),
    "pearson": _pearson,
    "spearmanr": lambda predictions, references: stats.spearmanr(predictions, references).statistic,
}
