"""
Fine-tune a text classification or regression model with layer-wise SAM, on a GLUE task or on your own files.

    python recipes/run_glue.py recipes/glue/rte.yaml --rho 0.1

The first argument may be a YAML of settings. Any later `--setting value` overrides it; `null` means "not set".
The settings are those of `ModelArguments`, `AdapterArguments`, `DataArguments`, `MeasureArguments`,
`RobustnessArguments`, `LSAMConfig` and `TrainingArguments`; `--help` lists them.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import TaskType
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam_recipes.support.adapters import AdapterArguments, save_model_config
from hf_lsam_recipes.support.calibration import ClassifierMetrics
from hf_lsam_recipes.support.loading import ModelArguments, find_model, load_model
from hf_lsam_recipes.support.logits import make_compute_loss, read_logits
from hf_lsam_recipes.support.measures import MeasureArguments, set_up_measures, write_landscapes
from hf_lsam_recipes.support.model_card import OWN_FILES, Subject, write_model_card
from hf_lsam_recipes.support.output import check_output_dir, report
from hf_lsam_recipes.support.robustness import RobustnessArguments, check_robustness, evaluate_changed
from hf_lsam_recipes.support.settings import parse_arguments, run_script
from hf_lsam_recipes.support.step_timer import StepTimer
from hf_lsam_recipes.support.text.glue_data import TextData, load_text_data
from hf_lsam_recipes.support.text.glue_tasks import DRAWN, GLUE_TASKS, HUB_NAME, PREDICTIONS, STSB_RANGE, DataArguments
from hf_lsam_recipes.support.text.text_metrics import RegressionMetrics, make_compute_metrics, metric_names
from hf_lsam_recipes.support.training import check_training

SETTINGS = (
    ModelArguments,
    AdapterArguments,
    DataArguments,
    MeasureArguments,
    RobustnessArguments,
    LSAMConfig,
    TrainingArguments,
)


@dataclass
class Run:
    """Checked settings, data, model and trainer: what `prepare` returns and `execute` runs."""

    model_args: ModelArguments
    adapter_args: AdapterArguments
    data_args: DataArguments
    measure_args: MeasureArguments
    robustness_args: RobustnessArguments
    args: TrainingArguments
    labels: tuple[str, ...] | None
    datasets: dict[str, Dataset]
    compute_metrics: ClassifierMetrics | RegressionMetrics
    trainer: LSAMTrainer
    timer: StepTimer
    resume: str | None


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the recipe with command-line arguments `argv` and return its metrics."""
    return execute(prepare(sys.argv[1:] if argv is None else argv))


def prepare(argv: list[str]) -> Run:
    """
    Check settings, output directory and data, then build model and trainer. No file is written.

    Args:
        argv (`list[str]`): The command-line arguments.

    Raises:
        ValueError: if a setting, the output directory or the data are not usable; the message says what to set.
    """
    description = (__doc__ or "").strip().splitlines()[0]
    model_args, adapter_args, data_args, measure_args, robustness_args, lsam_config, args = parse_arguments(
        SETTINGS, argv, description, "glue"
    )
    splits = [
        split
        for split, wanted in (("train", args.do_train), ("validation", args.do_eval), ("test", args.do_predict))
        if wanted
    ]
    if not splits:
        raise ValueError("Nothing to do: set do_train, do_eval or do_predict.")
    resume = check_output_dir(args, prediction_names(data_args))
    check_training(args, ("loss", *metric_names(data_args.task_name, data_args.is_regression)))

    source = find_model(model_args, args.do_train)
    data = load_text_data(data_args, splits, source.config.label2id)
    label_settings = check_labels(data_args, data, source.config, args.do_train)

    set_seed(args.seed)
    model = load_model(
        AutoModelForSequenceClassification,
        source,
        adapter_args,
        TaskType.SEQ_CLS,
        args.do_train,
        # An adapter contains its own head.
        ignore_mismatched_sizes=args.do_train or source.base is not None,
        **label_settings,
    )

    datasets = tokenize(data, source.tokenizer, longest_text(data_args.max_seq_length, source.tokenizer, model))
    timer = StepTimer()
    compute_metrics = make_compute_metrics(data_args)
    trainer = LSAMTrainer(
        model=model,
        args=args,
        lsam_config=lsam_config,
        train_dataset=datasets.get("train"),
        eval_dataset=datasets.get("validation"),
        processing_class=source.tokenizer,
        data_collator=DataCollatorWithPadding(source.tokenizer),
        compute_metrics=compute_metrics,
        compute_loss_func=make_compute_loss(args.label_smoothing_factor, data_args.is_regression),
        callbacks=[timer],
    )
    set_up_measures(trainer, measure_args, datasets.get("train"))
    check_robustness(trainer, robustness_args)
    return Run(
        model_args,
        adapter_args,
        data_args,
        measure_args,
        robustness_args,
        args,
        data.labels,
        datasets,
        compute_metrics,
        trainer,
        timer,
        resume,
    )


def execute(run: Run) -> dict[str, float]:
    """Train, evaluate and predict as the settings request, write the model and its card, and return the metrics."""
    trainer = run.trainer
    metrics: dict[str, float] = {}

    # Train
    if run.args.do_train:
        result = trainer.train(resume_from_checkpoint=run.resume)
        save_model_config(trainer)
        trainer.save_model()
        trainer.save_state()
        train_metrics = result.metrics | run.timer.metrics() | {"train_samples": len(run.datasets["train"])}
        metrics |= report(trainer, "train", train_metrics)
        write_landscapes(trainer, run.measure_args, run.datasets["train"])

    # Calibrate
    calibration: dict[str, float] = {}
    if isinstance(run.compute_metrics, ClassifierMetrics) and "calibration" in run.datasets:
        calibration = run.compute_metrics.calibrate(trainer, run.datasets["calibration"])

    # Evaluate
    if run.args.do_eval:
        eval_metrics: dict[str, float] = {f"eval_{name}": value for name, value in calibration.items()}
        for split, prefix in (("validation", "eval"), ("validation_mismatched", "eval_mm")):
            if split in run.datasets:
                eval_metrics |= trainer.evaluate(run.datasets[split], metric_key_prefix=prefix)
                eval_metrics[f"{prefix}_samples"] = len(run.datasets[split])
                eval_metrics |= evaluate_changed(trainer, run.robustness_args, run.datasets[split], prefix)
        metrics |= report(trainer, "eval", eval_metrics)

    # Predict
    if run.args.do_predict:
        predict_metrics: dict[str, float] = {}
        parts = (("test", "predict"), ("test_mismatched", "predict_mm"))
        for (split, prefix), name in zip(parts, prediction_names(run.data_args), strict=False):
            if split in run.datasets:
                output = trainer.predict(run.datasets[split], metric_key_prefix=prefix)
                if "label" in run.datasets[split].column_names:
                    changed = evaluate_changed(trainer, run.robustness_args, run.datasets[split], prefix)
                    predict_metrics |= output.metrics | changed
                if trainer.is_world_process_zero():
                    path = Path(run.args.output_dir) / name
                    write_predictions(path, read_logits(output.predictions), run.data_args, run.labels)
        predict_metrics |= predict_shifted(trainer, run.data_args, run.datasets)
        if predict_metrics:
            trainer.save_metrics("predict", predict_metrics)
            metrics |= predict_metrics

    # Describe
    if run.args.do_train and trainer.is_world_process_zero():
        adapter = dataclasses.asdict(run.adapter_args) if run.adapter_args.enabled else None
        write_model_card(trainer, run.model_args.model_name_or_path, describe(run.data_args), metrics, adapter)
    return metrics


def predict_shifted(trainer: LSAMTrainer, data_args: DataArguments, datasets: dict[str, Dataset]) -> dict[str, float]:
    """Predict on each of `shift_files`: metrics `shift_<name>_<metric>`, and `shift_<metric>`, the mean over files."""
    metrics: dict[str, float] = {}
    by_metric: dict[str, list[float]] = {}
    for name in data_args.shift_paths:
        prefix = f"shift_{name}"
        found = trainer.predict(datasets[prefix], metric_key_prefix=prefix).metrics
        metrics |= found
        for metric in found:
            by_metric.setdefault(metric.removeprefix(f"{prefix}_"), []).append(found[metric])
    return metrics | {f"shift_{metric}": float(np.mean(values)) for metric, values in by_metric.items()}


def describe(data_args: DataArguments) -> Subject:
    """Describe the task and its data for the model card."""
    task, from_hub = data_args.task_name, data_args.task_name is not None and data_args.data_dir is None
    drawn = {name: getattr(data_args, name) for name in DRAWN}
    defaults = {item.name: item.default for item in dataclasses.fields(data_args)}
    changed = [f", {name}={value}" for name, value in drawn.items() if value != defaults[name]]
    return Subject(
        recipe="run_glue.py",
        kind="text regression" if data_args.is_regression else "text classification",
        pipeline_tag="text-classification",
        data=(f"GLUE {task} ({'Hub' if from_hub else 'local files'})" if task else OWN_FILES) + "".join(changed),
        dataset=HUB_NAME if from_hub else None,
        pairs=len(data_args.text_columns) > 1,
    )


def check_labels(data_args: DataArguments, data: TextData, config, training: bool) -> dict:
    """
    Return the label settings of the model configuration (`num_labels`, `id2label` and so on) for the data.

    Raises:
        ValueError: if the model is not trained in this run and its labels differ from those of the data.
    """
    if data.labels is None:
        settings: dict = {"num_labels": 1, "problem_type": "regression"}
        fits = config.num_labels == 1
    else:
        names = dict(enumerate(data.labels))
        settings = {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {name: number for number, name in names.items()},
            "problem_type": "single_label_classification",
        }
        fits = config.id2label in (names, {number: f"LABEL_{number}" for number in names})
    if not training and not fits:
        needs = "one number" if data.labels is None else ", ".join(data.labels)
        raise ValueError(
            f"The model predicts {', '.join(config.id2label.values())}, but the data of "
            f"{data_args.task_name or 'the files'} needs {needs}, in this order. Set do_train to fine-tune it first."
        )
    return settings


def longest_text(max_seq_length: int, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """Return the maximum number of tokens: `max_seq_length`, or the limit of the tokenizer or model if it is lower."""
    length = min(max_seq_length, tokenizer.model_max_length)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    # RoBERTa and similar models number positions from the padding index + 1.
    pads = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
    return min(length, positions - max(pads, default=-1) - 1) if positions else length


def tokenize(data: TextData, tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, Dataset]:
    """Tokenize every split, with at most `length` tokens for each example. The collator pads the batches."""

    def encode(batch):
        texts = [batch[name] for name in ("text", "text_pair") if name in batch]
        return tokenizer(*texts, truncation=True, max_length=length)

    return {
        split: dataset.map(
            encode,
            batched=True,
            remove_columns=[name for name in dataset.column_names if name != "label"],
            desc=f"Tokenizing {split}",
        )
        for split, dataset in data.splits.items()
    }


def prediction_names(data_args: DataArguments) -> tuple[str, ...]:
    """Names of the prediction files: those of a GLUE submission for its test data, else `predictions.tsv`."""
    task = data_args.task_name
    return PREDICTIONS if task is None or data_args.validation_fraction else GLUE_TASKS[task].submissions


def write_predictions(path: Path, logits: np.ndarray, data_args: DataArguments, labels: tuple[str, ...] | None):
    """Write predictions in GLUE's submission format: `index`, tab, `prediction`."""
    task = GLUE_TASKS[data_args.task_name] if data_args.task_name else None
    if labels is None:
        numbers = logits.reshape(-1)
        predictions = [f"{number:.3f}" for number in (np.clip(numbers, *STSB_RANGE) if task else numbers)]
    else:
        by_name = task is None or task.submits_names
        predictions = [labels[number] if by_name else str(number) for number in logits.argmax(axis=-1)]
    lines = [f"{index}\t{prediction}\n" for index, prediction in enumerate(predictions)]
    path.write_text("index\tprediction\n" + "".join(lines), encoding="utf-8")


def script() -> None:
    """Entry point of the script and of `hf-lsam glue`."""
    run_script(prepare, execute)


if __name__ == "__main__":
    script()
