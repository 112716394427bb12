"""Metrics of a language model: perplexity, and the fraction of prompts that are answered correctly."""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm
from transformers import EvalPrediction, Trainer

from hf_lsam_recipes.support.text.clm_arguments import GenerationArguments

# The metrics of `compute_perplexity`.
METRICS = ("loss", "perplexity", "tokens")


def sum_losses(logits: Tensor | tuple, labels: Tensor) -> Tensor:
    """
    The `preprocess_logits_for_metrics` of the Trainer: the sum of the losses and the number of labels of each row.

    They replace the logits, which would not fit in memory for a whole data set.

    Args:
        logits (`Tensor` of shape `(rows, tokens, vocabulary)` or `tuple`): The output of the model; of a tuple, the
            first element.
        labels (`Tensor` of shape `(rows, tokens)`): Token ids; -100 is not predicted.

    Returns:
        `Tensor` of shape `(rows, 2)`.
    """
    if isinstance(logits, tuple):
        logits = logits[0]
    losses = [
        torch.nn.functional.cross_entropy(row[:-1].float(), target[1:], reduction="sum")
        for row, target in zip(logits, labels, strict=True)
    ]
    return torch.stack([torch.stack(losses), (labels[:, 1:] != -100).sum(1)], dim=1)


def compute_perplexity(output: EvalPrediction) -> dict[str, float]:
    """
    The `compute_metrics` of the Trainer, from the output of `sum_losses`: `loss`, `perplexity` and number of `tokens`.

    `loss` is the mean over all tokens. It replaces the Trainer's, which is a mean over batches of different sizes.
    """
    total, tokens = np.asarray(output.predictions, dtype=np.float64).sum(axis=0)
    loss = total / tokens
    return {"loss": loss, "perplexity": float(np.exp(loss)), "tokens": int(tokens)}


def find_answer(pattern: str, text: str) -> str | None:
    """The first match of `pattern` in `text`, or its first group, without surrounding space; else `None`."""
    match = re.search(pattern, text)
    if match is None:
        return None
    return (match.group(1) or "" if match.re.groups else match.group()).strip()


def same_answer(left: str, right: str) -> bool:
    """Whether two answers are the same text, or the same number with or without commas."""
    try:
        return left == right or Decimal(left.replace(",", "")) == Decimal(right.replace(",", ""))
    except InvalidOperation:
        return False


def check_answers(args: GenerationArguments, source: str, responses: Sequence[str]):
    """Raise `ValueError` for a response in which `answer_pattern` finds no answer to compare with."""
    for row, response in enumerate(responses, start=1):
        if find_answer(args.answer_pattern, response) is None:
            raise ValueError(
                f"{source}, row {row}: answer_pattern {args.answer_pattern!r} finds no answer in the response "
                f"{response[-80:]!r}. Set answer_pattern, or max_generation_samples to 0."
            )


def generate_answers(trainer: Trainer, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """
    Answer each prompt by greedy decoding. The prompts are distributed over the processes.

    Args:
        trainer (`Trainer`): The trainer, with the trained model.
        prompts (`Sequence[list[int]]`): Token ids of each prompt.
        max_new_tokens (`int`): Maximum number of tokens of an answer.

    Returns:
        `list[str]`: The answers in the order of the prompts, in every process.
    """
    accelerator, tokenizer = trainer.accelerator, trainer.processing_class
    model = accelerator.unwrap_model(trainer.model).eval()
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    own = range(accelerator.process_index, len(prompts), accelerator.num_processes)
    batches = [
        own[start:][: trainer.args.eval_batch_size] for start in range(0, len(own), trainer.args.eval_batch_size)
    ]
    answers: list[tuple[int, str]] = []
    quiet = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
    for batch in tqdm(batches, desc="Answering", disable=quiet):
        # Padding is on the left, so that each answer directly follows its prompt.
        padded = tokenizer.pad(
            {"input_ids": [prompts[index] for index in batch]}, padding_side="left", return_tensors="pt"
        ).to(trainer.args.device)
        with torch.inference_mode():
            tokens = model.generate(
                **padded,
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(ends) or None,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(tokens[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += zip(batch, texts, strict=True)
    return [text for _, text in sorted(gather_object(answers))]
