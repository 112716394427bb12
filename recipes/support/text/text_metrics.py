"""The `compute_metrics` of the Trainer for texts: GLUE's metrics and, for a classifier, metrics of probabilities."""

from transformers import EvalPrediction

from hf_lsam_recipes.support.calibration import FIGURES, ClassifierMetrics
from hf_lsam_recipes.support.logits import read_logits
from hf_lsam_recipes.support.text.glue_metric import METRICS, GlueMetric
from hf_lsam_recipes.support.text.glue_tasks import DataArguments


class RegressionMetrics:
    """The `compute_metrics` of the Trainer for a regression."""

    def __init__(self, metric: GlueMetric):
        self.metric = metric

    def __call__(self, output: EvalPrediction) -> dict[str, float]:
        predictions = read_logits(output.predictions).reshape(-1)
        return self.metric.compute(predictions=predictions, references=output.label_ids)


def metric_names(task_name: str | None, is_regression: bool) -> tuple[str, ...]:
    """Names of the metrics of an evaluation, without the loss and without those of temperature scaling."""
    of_classes = METRICS[task_name or ("regression" if is_regression else "classification")]
    return of_classes if is_regression else (*of_classes, *FIGURES)


def glue_metric(data_args: DataArguments) -> GlueMetric:
    """The metric of the GLUE task or, for the user's files, of a classification or regression."""
    return GlueMetric(data_args.task_name or ("regression" if data_args.is_regression else "classification"))


def make_compute_metrics(data_args: DataArguments) -> ClassifierMetrics | RegressionMetrics:
    """The `compute_metrics` of the Trainer for the task of `data_args`."""
    metric = glue_metric(data_args)
    return RegressionMetrics(metric) if data_args.is_regression else ClassifierMetrics(metric.compute)
