"""Checks of training arguments that transformers checks late or reports with a traceback."""

import importlib.util
from collections.abc import Sequence

from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from hf_lsam_recipes.support.shipped import did_you_mean

# Modules of trackers that transformers never lists as available, or not together with MLflow.
UNLISTED = {"azure_ml": "azureml", "flyte": "flytekit"}
# Packages whose name differs from that of their tracker.
PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}


def check_training(args: TrainingArguments, metrics: Sequence[str]) -> None:
    """
    Check `report_to` and `metric_for_best_model`.

    Args:
        args (`TrainingArguments`): The arguments of the run.
        metrics (`Sequence[str]`): Names of the metrics of its evaluation, without `eval_`.

    Raises:
        ValueError: if a tracker is unknown or not installed, or if the metric is not one of `metrics`.
    """
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"report_to={name} is unknown.{did_you_mean(name, list(INTEGRATION_TO_CALLBACK))} It may be none or "
                f"any of {', '.join(INTEGRATION_TO_CALLBACK)}."
            )
        available = get_available_reporting_integrations()
        if name not in available and not (name in UNLISTED and importlib.util.find_spec(UNLISTED[name])):
            others = f", or to {' or '.join(available)}, which can be used here" if available else ""
            raise ValueError(
                f"report_to={name} cannot be used here: its package is not installed or not set up. Install it, for "
                f"instance with pip install {PACKAGES.get(name, name)}, or set report_to to none{others}."
            )
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in metrics:
        near = did_you_mean(metric, list(metrics))
        raise ValueError(
            f"metric_for_best_model={metric} is not a metric of this evaluation.{near} It has {', '.join(metrics)}."
        )
