"""Tiny models with random weights, batches for them, and what tests read off a model or a run."""

import json
import random
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from older import CHECKPOINTING, IS_5, with_arguments
from torch.utils.data import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_lsam.blocks import find_blocks

VOCABULARY = 64


def bert(blocks: int = 4, dropout: float = 0.0, seed: int = 0, **options) -> PreTrainedModel:
    """A BERT classifier with three labels."""
    set_seed(seed)
    defaults = dict(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=3,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(BertConfig(**{**defaults, **options}))


def llama(blocks: int = 4, dropout: float = 0.0, seed: int = 0, **options) -> PreTrainedModel:
    """A Llama language model; its input and output embeddings are tied."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=32,
        attention_dropout=dropout,
        tie_word_embeddings=True,
        pad_token_id=0,
        initializer_range=0.3,
        **options,
    )
    return LlamaForCausalLM(config)


def qwen2(blocks: int = 4, dropout: float = 0.0, seed: int = 0, **options) -> PreTrainedModel:
    """A Qwen2 language model, whose attention has biases and whose embeddings are not tied."""
    set_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=32,
        attention_dropout=dropout,
        pad_token_id=0,
        initializer_range=0.3,
        **options,
    )
    return Qwen2ForCausalLM(config)


def t5(blocks: int = 3, dropout: float = 0.0, seed: int = 0) -> PreTrainedModel:
    """A T5 with as many blocks in its encoder as in its decoder."""
    set_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=blocks,
        num_heads=2,
        dropout_rate=dropout,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        initializer_factor=1.0,
    )
    return T5ForConditionalGeneration(config)


def bart(blocks: int = 3, dropout: float = 0.0, seed: int = 0) -> PreTrainedModel:
    """A BART with as many blocks in its encoder as in its decoder."""
    set_seed(seed)
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=blocks,
        decoder_layers=blocks,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        dropout=dropout,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=1,
    )
    return BartForConditionalGeneration(config)


MODELS = {"bert": bert, "llama": llama}


class Examples(Dataset):
    """
    Random token sequences of one length; labels are classes, or the tokens themselves for a language model.

    A causal one predicts no first token, and transformers before 5.10 would divide by its label, too, were there one.
    """

    def __init__(self, count: int, language_model: bool = False, length: int = 8, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(1, VOCABULARY, (count, length), generator=generator)
        self.labels = torch.randint(0, 3, (count,), generator=generator)
        self.language_model = language_model

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict:
        tokens = self.tokens[index]
        labels = self.labels[index]
        if self.language_model:
            labels = tokens.clone()
            labels[0] = -100
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}

    def batch(self, start: int, size: int) -> dict:
        """Examples `start` to `start + size` as one batch."""
        return torch.utils.data.default_collate([self[index] for index in range(start, start + size)])


def out_of_reach(**values) -> ModuleType:
    """An object with attributes that no pass restores, since it is not the user's."""
    notes = ModuleType("torch.notes")
    vars(notes).update(values)
    return notes


def arguments(folder, kind: type[TrainingArguments] = TrainingArguments, **options) -> TrainingArguments:
    """Training arguments, of the class `kind`, for a short quiet run that takes the examples in their order."""
    defaults = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=10,
        use_cpu=True,
        seed=1,
    )
    return with_arguments(kind, {**defaults, **options})


def checkpointed(use_reentrant: bool) -> dict:
    """Training arguments that switch activation checkpointing on."""
    return {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": use_reentrant}}


def give_gradient(model: PreTrainedModel) -> PreTrainedModel:
    """What transformers 5.0 does by itself: a reentrant checkpoint needs an input that takes a gradient."""
    if not IS_5:
        model.enable_input_require_grads()
    return model


def checkpoint(model: PreTrainedModel, use_reentrant: bool) -> None:
    """Switch activation checkpointing on in a model."""
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": use_reentrant})
    if use_reentrant:
        give_gradient(model)


class Kept:
    """What a test keeps of passes: a lock tells that others use it, too, so that pass 2 does not put it back."""

    def __init__(self, **kept):
        self.lock = threading.Lock()
        vars(self).update(kept)


def without_replay(step):
    """`step`, whose pass 2 runs every block from now on."""
    step.second_pass.replays = False
    return step


class Unreplayed:
    """For classes such as `class Full(Unreplayed, LSAMTrainer)`: pass 2 runs every block."""

    def _new_step(self, *args, **kwargs):
        return without_replay(super()._new_step(*args, **kwargs))


def blocks_of(model: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
    """What a literal step perturbs: the trainable parameters of each block."""
    return [[p for p in block.parameters() if p.requires_grad] for block in find_blocks(model).values()]


def training_lines(trainer: Trainer) -> list[dict]:
    """The lines that a run logged while it trained."""
    return [line for line in trainer.state.log_history if "loss" in line]


def assert_lines_hold(trainer: Trainer, plain: Trainer) -> None:
    """Each line that a run logged while it trained holds what the plain run logged there."""
    assert training_lines(plain)
    for line, plain_line in zip(training_lines(trainer), training_lines(plain), strict=True):
        assert {key: line[key] for key in plain_line} == plain_line


def block_rows(folder: Path) -> list[dict]:
    """What a run wrote on its blocks."""
    return [json.loads(row) for row in (folder / "lsam_blocks.jsonl").read_text().splitlines()]


def passes(model, batch):
    """A pass over the batch, and the gradients that it left on the parameters, which it takes away."""

    def run():
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    def take_gradients():
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return gradients

    return run, take_gradients


def random_states() -> tuple:
    """The random states of torch, Python and NumPy, to be compared."""
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """There are tensors, and every one is bitwise that of the other side."""
    assert left.keys() == right.keys() and left
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"not bitwise equal: {different}"


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference of any weight."""
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)
