"""The `compute_metrics` of the Trainer for texts: GLUE's metrics, and for classes those of their probabilities."""

from transformers import EvalPrediction

from hf_lsam_recipes.support.calibration import ClassifierMetrics
from hf_lsam_recipes.support.logits import read_logits
from hf_lsam_recipes.support.text.glue_metric import GlueMetric
from hf_lsam_recipes.support.text.glue_tasks import DataArguments


class RegressionMetrics:
    """The `compute_metrics` of the Trainer for a regression."""

    def __init__(self, metric: GlueMetric):
        self.metric = metric

    def __call__(self, output: EvalPrediction) -> dict[str, float]:
        predictions = read_logits(output.predictions).reshape(-1)
        return self.metric.compute(predictions=predictions, references=output.label_ids)


def make_compute_metrics(data_args: DataArguments) -> ClassifierMetrics | RegressionMetrics:
    """The `compute_metrics` of the Trainer."""
    own = "regression" if data_args.is_regression else "classification"
    metric = GlueMetric(data_args.task_name or own)
    return RegressionMetrics(metric) if data_args.is_regression else ClassifierMetrics(metric.compute)
