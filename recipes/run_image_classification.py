"""
Train an image classifier with layer-wise SAM: a residual network from scratch, or a pretrained model.

    python recipes/run_image_classification.py recipes/images/cifar10_resnet20.yaml --rho 0.1

The first argument may be a YAML of settings. Any later `--setting value` overrides it; `null` means "not set".
The settings are those of `ModelArguments`, `DataArguments`, `MeasureArguments`, `RobustnessArguments`, `LSAMConfig`
and `TrainingArguments`; `--help` lists them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import TrainingArguments, set_seed

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam_recipes.support.calibration import FIGURES, ClassifierMetrics
from hf_lsam_recipes.support.images.data import DataArguments, ImageData, load_image_data
from hf_lsam_recipes.support.images.examples import Augmentation, EpochCallback, ImageExamples, without_augmentation
from hf_lsam_recipes.support.images.model import (
    ModelArguments,
    build_model,
    describe_architecture,
    find_model,
    make_processor,
)
from hf_lsam_recipes.support.logits import make_compute_loss, read_logits
from hf_lsam_recipes.support.measures import MeasureArguments, set_up_measures, write_landscapes
from hf_lsam_recipes.support.model_card import OWN_FILES, Subject, write_model_card
from hf_lsam_recipes.support.output import check_output_dir, report
from hf_lsam_recipes.support.robustness import RobustnessArguments, check_robustness, evaluate_changed
from hf_lsam_recipes.support.settings import parse_arguments, run_script
from hf_lsam_recipes.support.step_timer import StepTimer
from hf_lsam_recipes.support.training import check_training

PREDICTIONS = "predictions.tsv"


SETTINGS = (ModelArguments, DataArguments, MeasureArguments, RobustnessArguments, LSAMConfig, TrainingArguments)


@dataclass
class Run:
    """Checked settings, data, model and trainer: what `prepare` returns and `execute` runs."""

    model_args: ModelArguments
    data_args: DataArguments
    measure_args: MeasureArguments
    robustness_args: RobustnessArguments
    args: TrainingArguments
    data: ImageData
    examples: dict[str, ImageExamples]
    compute_metrics: ClassifierMetrics
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
    model_args, data_args, measure_args, robustness_args, lsam_config, args = parse_arguments(
        SETTINGS, argv, description, "images"
    )
    wanted = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    splits = [split for split in wanted if wanted[split]]
    if not splits:
        raise ValueError("Nothing to do: set do_train, do_eval or do_predict.")
    if model_args.from_scratch and not args.do_train:
        raise ValueError("A model from scratch has random weights: set do_train, or model_name_or_path to a model.")
    resume = check_output_dir(args, (PREDICTIONS, "test_results.json"))
    check_training(args, ("loss", "accuracy", *FIGURES))

    config, processor = find_model(model_args)
    data = load_image_data(data_args, splits, None if args.do_train else config.label2id)
    if processor is None:
        processor = make_processor(data, model_args.image_size)

    set_seed(args.seed)
    model = build_model(model_args, config, data, args.do_train)
    timer = StepTimer()
    compute_metrics = ClassifierMetrics(accuracy)
    seed = args.seed if args.data_seed is None else args.data_seed
    augmentation = Augmentation(data_args.crop_padding, data_args.horizontal_flip, seed)
    examples = {
        split: ImageExamples(dataset, processor, augmentation if split == "train" else None)
        for split, dataset in data.splits.items()
    }
    trainer = LSAMTrainer(
        model=model,
        args=args,
        lsam_config=lsam_config,
        train_dataset=examples.get("train"),
        eval_dataset=examples.get("validation"),
        processing_class=processor,
        compute_metrics=compute_metrics,
        compute_loss_func=make_compute_loss(args.label_smoothing_factor),
        callbacks=[timer, *([EpochCallback(examples["train"])] if args.do_train else [])],
    )
    set_up_measures(trainer, measure_args, without_augmentation(examples["train"]) if args.do_train else None)
    check_robustness(trainer, robustness_args)
    return Run(
        model_args,
        data_args,
        measure_args,
        robustness_args,
        args,
        data,
        examples,
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
        trainer.save_model()
        trainer.save_state()
        train_metrics = result.metrics | run.timer.metrics() | {"train_samples": len(run.examples["train"])}
        metrics |= report(trainer, "train", train_metrics)
        write_landscapes(trainer, run.measure_args, without_augmentation(run.examples["train"]))

    # Calibrate
    calibration: dict[str, float] = {}
    if "calibration" in run.examples:
        calibration = run.compute_metrics.calibrate(trainer, run.examples["calibration"])

    # Evaluate
    if run.args.do_eval:
        eval_metrics = trainer.evaluate() | {"eval_samples": len(run.examples["validation"])}
        eval_metrics |= {f"eval_{name}": value for name, value in calibration.items()}
        eval_metrics |= evaluate_changed(trainer, run.robustness_args, run.examples["validation"], "eval")
        metrics |= report(trainer, "eval", eval_metrics)

    # Predict
    if run.args.do_predict:
        output = trainer.predict(run.examples["test"], metric_key_prefix="test")
        test_metrics = output.metrics | {"test_samples": len(run.examples["test"])}
        test_metrics |= evaluate_changed(trainer, run.robustness_args, run.examples["test"], "test")
        metrics |= report(trainer, "test", test_metrics)
        if trainer.is_world_process_zero():
            names = run.data.splits["test"]["name"]
            predictions = read_logits(output.predictions).argmax(axis=-1)
            lines = [f"{name}\t{run.data.labels[p]}\n" for name, p in zip(names, predictions, strict=True)]
            path = Path(run.args.output_dir) / PREDICTIONS
            path.write_text("image\tprediction\n" + "".join(lines), encoding="utf-8")

    # Describe
    if run.args.do_train and trainer.is_world_process_zero():
        name = run.model_args.model_name_or_path or describe_architecture(trainer.model.config)
        write_model_card(trainer, name, describe(run.model_args, run.data_args), metrics)
    return metrics


def accuracy(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The fraction of correct predictions, as `accuracy`."""
    return {"accuracy": float(np.mean(predictions == references))}


def describe(model_args: ModelArguments, data_args: DataArguments) -> Subject:
    """Describe the task and its data for the model card."""
    name, config = data_args.dataset_name, data_args.dataset_config_name
    on_hub = name is not None and not Path(name).is_dir()
    return Subject(
        recipe="run_image_classification.py",
        kind="image classification",
        pipeline_tag="image-classification",
        data=f"{name} {config or ''}".strip() + " (Hub)" if on_hub else OWN_FILES,
        dataset=name if on_hub else None,
        from_scratch=model_args.from_scratch,
    )


def script() -> None:
    """Entry point of the script and of `hf-lsam images`."""
    run_script(prepare, execute)


if __name__ == "__main__":
    script()
