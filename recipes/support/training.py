"""Training arguments that transformers checks late, or only by a traceback."""

import importlib.util
from collections.abc import Sequence

from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from hf_lsam_recipes.support.shipped import did_you_mean

# Modules of trackers that are not among the available ones of transformers, or not beside MLflow.
UNLISTED = {"azure_ml": "azureml", "flyte": "flytekit"}
# Packages that have another name than their tracker.
PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}


def check_training(args: TrainingArguments, metrics: Sequence[str]) -> None:
    """
    Check what a run reports to, and the metric that its best model is chosen by.

    Args:
        args (`TrainingArguments`): The arguments of the run.
        metrics (`Sequence[str]`): The metrics of its evaluation, without `eval_`.

    Raises:
        ValueError: if a tracker is unknown or not installed, or if there is no such metric.
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
                f"report_to={name} cannot be used here: its package is not installed or not set up. Install it, as by "
                f"pip install {PACKAGES.get(name, name)}, or set report_to to none{others}."
            )
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in metrics:
        near = did_you_mean(metric, list(metrics))
        raise ValueError(
            f"metric_for_best_model={metric} is not a metric of this evaluation.{near} It has {', '.join(metrics)}."
        )
