"""
Fine-tune a causal language model with layer-wise SAM, on plain text or on prompts with their responses.

    python recipes/run_clm.py recipes/clm/gsm8k_lora.yaml --rho 0.1

The first argument may be a YAML of settings. Any later `--setting value` overrides it; `null` means "not set".
The settings are those of `ModelArguments`, `AdapterArguments`, `DataArguments`, `GenerationArguments`,
`MeasureArguments`, `RobustnessArguments`, `LSAMConfig` and `TrainingArguments`; `--help` lists them.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import TaskType
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam_recipes.support.adapters import AdapterArguments, save_model_config
from hf_lsam_recipes.support.loading import ModelArguments, ModelSource, find_model, load_model
from hf_lsam_recipes.support.measures import MeasureArguments, set_up_measures, write_landscapes
from hf_lsam_recipes.support.model_card import OWN_FILES, Subject, write_model_card
from hf_lsam_recipes.support.output import check_output_dir, report
from hf_lsam_recipes.support.robustness import RobustnessArguments, check_robustness, evaluate_changed
from hf_lsam_recipes.support.settings import parse_arguments, run_script
from hf_lsam_recipes.support.step_timer import StepTimer
from hf_lsam_recipes.support.text.clm_arguments import DataArguments, GenerationArguments
from hf_lsam_recipes.support.text.clm_data import (
    Examples,
    Rows,
    begin_texts,
    find_block_size,
    load_rows,
    make_examples,
    prompt_and_response,
)
from hf_lsam_recipes.support.text.clm_metrics import (
    METRICS,
    check_answers,
    compute_perplexity,
    find_answer,
    generate_answers,
    same_answer,
    sum_losses,
)
from hf_lsam_recipes.support.training import check_training

SETTINGS = (
    ModelArguments,
    AdapterArguments,
    DataArguments,
    GenerationArguments,
    MeasureArguments,
    RobustnessArguments,
    LSAMConfig,
    TrainingArguments,
)
GENERATIONS = "generations.jsonl"

logger = logging.get_logger("hf_lsam.recipes")


@dataclass(frozen=True)
class Questions:
    """Prompts to answer: their text, their token ids, and the correct responses."""

    prompts: list[str]
    ids: list[list[int]]
    responses: list[str]


@dataclass
class Run:
    """Checked settings, data, model and trainer: what `prepare` returns and `execute` runs."""

    model_args: ModelArguments
    adapter_args: AdapterArguments
    data_args: DataArguments
    generation_args: GenerationArguments
    measure_args: MeasureArguments
    robustness_args: RobustnessArguments
    args: TrainingArguments
    examples: dict[str, Examples]
    neutral: Dataset | None
    questions: Questions | None
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
    model_args, adapter_args, data_args, generation_args, measure_args, robustness_args, lsam_config, args = (
        parse_arguments(SETTINGS, argv, description, "clm")
    )
    splits = [split for split, wanted in (("train", args.do_train), ("validation", args.do_eval)) if wanted]
    if not splits or args.do_predict:
        raise ValueError("This recipe trains and evaluates, but does not predict: set do_train or do_eval only.")
    if data_args.neutral_file is not None and not args.do_eval:
        raise ValueError("neutral_file is used in the evaluation: set do_eval, or leave it out.")
    if generation_args.max_generation_samples and not (args.do_eval and data_args.has_prompts):
        raise ValueError(
            "max_generation_samples generates answers to validation prompts: set do_eval, prompt_column and "
            "response_column, or leave it out."
        )
    resume = check_output_dir(args)
    check_training(args, METRICS)

    source = find_model(model_args, args.do_train)
    config, tokenizer = source.config, source.tokenizer
    # Refuses BERT and similar models, and encoder-decoders.
    if not getattr(config, "is_decoder", True) or config.is_encoder_decoder:
        raise ValueError(
            f"model_name_or_path={source.name} is not a causal language model: {config.model_type} attends to the "
            "tokens that it would have to predict. Name a decoder, such as HuggingFaceTB/SmolLM2-135M."
        )
    block_size = find_block_size(data_args, config, tokenizer)
    rows = load_rows(data_args, splits)
    questions = None
    if generation_args.max_generation_samples:
        questions = find_questions(data_args, generation_args, source, rows["validation"])
    examples = {split: make_examples(data_args, tokenizer, split, rows[split], block_size) for split in splits}
    neutral = read_neutral(data_args, tokenizer, block_size)
    for split, made in examples.items():
        if args.should_log and (made.truncated or made.dropped):
            logger.warning(
                f"{split}: {made.truncated} rows were truncated to block_size={block_size} tokens, and {made.dropped} "
                f"{'blocks' if data_args.packing else 'rows'} were left out, since they have no label to learn from."
            )

    set_seed(args.seed)
    model = load_model(AutoModelForCausalLM, source, adapter_args, TaskType.CAUSAL_LM, args.do_train)
    timer = StepTimer()
    train_dataset = examples["train"].dataset if args.do_train else None
    trainer = LSAMTrainer(
        model=model,
        args=args,
        lsam_config=lsam_config,
        train_dataset=train_dataset,
        eval_dataset=examples["validation"].dataset if args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=compute_perplexity,
        preprocess_logits_for_metrics=sum_losses,
        callbacks=[timer],
    )
    if questions is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(
            "max_generation_samples needs the whole model in every process, but FSDP and DeepSpeed shard it: set it "
            "to 0, and evaluate the saved model in a separate run."
        )
    set_up_measures(trainer, measure_args, train_dataset)
    check_robustness(trainer, robustness_args)
    return Run(
        model_args,
        adapter_args,
        data_args,
        generation_args,
        measure_args,
        robustness_args,
        args,
        examples,
        neutral,
        questions,
        trainer,
        timer,
        resume,
    )


def execute(run: Run) -> dict[str, float]:
    """Train, evaluate and generate as the settings request, write the model and its card, and return the metrics."""
    trainer = run.trainer
    metrics: dict[str, float] = {}

    # The loss on neutral text before training. Forking keeps the random state that training begins with.
    neutral_metrics: dict[str, float] = {}
    if run.neutral is not None and run.args.do_train:
        with torch.random.fork_rng(devices=[]):
            before = trainer.predict(run.neutral, metric_key_prefix="neutral").metrics["neutral_loss"]
        neutral_metrics["eval_neutral_loss_before"] = before

    # Train
    if run.args.do_train:
        result = trainer.train(resume_from_checkpoint=run.resume)
        save_model_config(trainer)
        trainer.save_model()
        trainer.save_state()
        train_metrics = result.metrics | run.timer.metrics() | count(run, "train", "train")
        metrics |= report(trainer, "train", train_metrics)
        write_landscapes(trainer, run.measure_args, run.examples["train"].dataset)

    # Evaluate
    if run.args.do_eval:
        eval_metrics = trainer.evaluate() | count(run, "validation", "eval")
        if run.questions is not None:
            eval_metrics["eval_exact_match"] = answer(run, run.questions)
            eval_metrics["eval_generation_samples"] = len(run.questions.prompts)
        eval_metrics |= evaluate_changed(trainer, run.robustness_args, run.examples["validation"].dataset, "eval")
        if run.neutral is not None:
            after = trainer.predict(run.neutral, metric_key_prefix="neutral").metrics["neutral_loss"]
            eval_metrics |= neutral_metrics | {"eval_neutral_loss": after}
            eval_metrics |= evaluate_changed(trainer, run.robustness_args, run.neutral, "eval_neutral")
        metrics |= report(trainer, "eval", eval_metrics)

    # Describe
    if run.args.do_train and trainer.is_world_process_zero():
        adapter = dataclasses.asdict(run.adapter_args) if run.adapter_args.enabled else None
        write_model_card(trainer, run.model_args.model_name_or_path, describe(run.data_args), metrics, adapter)
    return metrics


def read_neutral(data_args: DataArguments, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Dataset | None:
    """Tokenize `neutral_file` into blocks of `block_size` tokens; `None` if it is not set."""
    if data_args.neutral_file is None:
        return None
    own = DataArguments(
        train_file=data_args.neutral_file, validation_fraction=0.0, max_eval_samples=data_args.max_eval_samples
    )
    rows = load_rows(own, ["train"])["train"]
    return make_examples(own, tokenizer, "neutral", rows, block_size).dataset


def find_questions(
    data_args: DataArguments, generation_args: GenerationArguments, source: ModelSource, validation: Rows
) -> Questions:
    """
    Select and tokenize the first `max_generation_samples` validation prompts.

    Raises:
        ValueError: if a response has no answer, or if a prompt leaves too little of the context for a new answer.
    """
    rows = validation.rows[: generation_args.max_generation_samples]
    responses = [response for _, response in rows]
    check_answers(generation_args, validation.source, responses)
    prompts = [prompt_and_response(data_args, source.tokenizer, *row)[0] for row in rows]
    ids = begin_texts(data_args, source.tokenizer, prompts)
    context = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, ids))
    if context is not None and longest + generation_args.max_new_tokens > context:
        raise ValueError(
            f"max_new_tokens={generation_args.max_new_tokens} and a prompt of {longest} tokens are more than the "
            f"context of the model, {context} tokens. Lower max_new_tokens or max_generation_samples."
        )
    return Questions(prompts, ids, responses)


def answer(run: Run, questions: Questions) -> float:
    """Generate answers, write them to `generations.jsonl`, and return the fraction that is correct."""
    generated = generate_answers(run.trainer, questions.ids, run.generation_args.max_new_tokens)
    pattern = run.generation_args.answer_pattern
    lines, correct = [], 0
    for prompt, response, text in zip(questions.prompts, questions.responses, generated, strict=True):
        expected, found = find_answer(pattern, response), find_answer(pattern, text)
        match = expected is not None and found is not None and same_answer(expected, found)
        correct += match
        line = {"prompt": prompt, "generated": text, "answer": found, "expected": expected, "match": match}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    if run.trainer.is_world_process_zero():
        path = Path(run.args.output_dir) / GENERATIONS
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    return correct / len(lines)


def count(run: Run, split: str, prefix: str) -> dict[str, int]:
    """Numbers of examples of a split: used, truncated and left out, by metric name."""
    examples = run.examples[split]
    return {
        f"{prefix}_samples": len(examples.dataset),
        f"{prefix}_truncated": examples.truncated,
        f"{prefix}_dropped": examples.dropped,
    }


def describe(data_args: DataArguments) -> Subject:
    """Describe the task and its data for the model card."""
    name, config = data_args.dataset_name, data_args.dataset_config_name
    on_hub = name is not None and not Path(name).is_dir()
    return Subject(
        recipe="run_clm.py",
        kind="causal language",
        pipeline_tag="text-generation",
        data=f"{name} {config or ''}".strip() + " (Hub)" if on_hub else OWN_FILES,
        dataset=name if on_hub else None,
    )


def script() -> None:
    """Entry point of the script and of `hf-lsam clm`."""
    run_script(prepare, execute)


if __name__ == "__main__":
    script()
