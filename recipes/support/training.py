"""Training arguments that transformers checks late, or only by a traceback."""

from collections.abc import Sequence

from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_reporting_integration_callbacks

from hf_lsam_recipes.support.shipped import did_you_mean


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
        [callback] = get_reporting_integration_callbacks([name])
        try:
            callback()
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f"report_to={name} cannot be used: {error} Install what it needs, or set report_to to none."
            ) from error
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in metrics:
        raise ValueError(
            f"metric_for_best_model={metric} is no metric of this evaluation.{did_you_mean(metric, list(metrics))} It "
            f"has {', '.join(metrics)}."
        )
