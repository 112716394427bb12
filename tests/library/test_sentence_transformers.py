"""`SentenceTransformerTrainer`: blocks that are called for each column, losses with weights, caches and metrics."""

import random

import pytest

pytest.importorskip("sentence_transformers")
import torch
from datasets import Dataset
from literal import LiteralLSAM
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses, modules
from tiny import (
    Unreplayed,
    arguments,
    assert_equal,
    assert_lines_hold,
    largest_difference,
    training_lines,
    weights,
)
from tiny_glue import WORDS, save_bert
from torch import nn

from hf_lsam import LSAMConfig, LSAMMixin


class LSAMSentence(LSAMMixin, SentenceTransformerTrainer):
    pass


class LiteralSentence(LiteralLSAM, SentenceTransformerTrainer):
    pass


class Full(Unreplayed, LSAMSentence):
    pass


class TwoParts(torch.nn.Module):
    """A loss of two parts, whose means the trainer logs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, features, labels):
        left, right = (self.model(feature)["sentence_embedding"] for feature in features)
        return {"distance": (left - right).square().mean(), "length": left.square().mean()}


def rows(**labels):
    rng = random.Random(0)
    texts = [{name: " ".join(rng.choices(WORDS, k=rng.randint(2, 6))) for name in ("a", "b")} for _ in range(16)]
    return Dataset.from_list([{**text, **{name: value(rng) for name, value in labels.items()}} for text in texts])


def scored():
    return rows(score=lambda rng: rng.random())


def cosine(model):
    """The collator's scores are float32, whatever the model's weights are."""
    return losses.CosineSimilarityLoss(model, lambda output, score: nn.functional.mse_loss(output, score.to(output)))


# name: (the data, the loss of a model)
LOSSES = {
    "ranking": (rows, losses.MultipleNegativesRankingLoss),
    "cosine": (scored, cosine),
    "own weights": (lambda: rows(label=lambda rng: rng.randrange(3)), lambda m: losses.SoftmaxLoss(m, 16, 3)),
    "two parts": (rows, TwoParts),
    "cached": (rows, lambda m: losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=2)),
    "two datasets": (
        lambda: {"pairs": rows(), "scores": scored()},
        lambda m: {"pairs": losses.MultipleNegativesRankingLoss(m), "scores": cosine(m)},
    ),
}


def train(trainer_class, name, folder, config=None, dropout=0.0, **options):
    """Train a tiny model; returns the trainer, and the weights of the model and of the loss."""
    save_bert(
        folder / "bert", hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, initializer_range=0.3
    )
    transformer = modules.Transformer(str(folder / "bert"))
    model = SentenceTransformer(modules=[transformer, modules.Pooling(16)], device="cpu")
    model = model.to(torch.get_default_dtype())
    data, loss_of = LOSSES[name]
    torch.manual_seed(3)
    loss = loss_of(model)
    defaults = dict(max_steps=3, gradient_accumulation_steps=2, optim="sgd", max_grad_norm=0.0, logging_steps=1)
    trainer = trainer_class(
        model=model,
        args=arguments(folder, SentenceTransformerTrainingArguments, **{**defaults, **options}),
        train_dataset=data(),
        loss=loss,
        **({} if config is None else {"lsam_config": config}),
    )
    trainer.train()
    after = weights(model)
    if name == "own weights":
        after |= {f"loss.{key}": value for key, value in weights(loss.classifier).items()}
    return trainer, after


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", list(LOSSES))
def test_it_composes_and_counts_once(name, tmp_path):
    """
    Against the method written out on the same trainer. A classifier that belongs to the loss gets its plain gradient,
    and with a rho that moves nothing each log line is the plain trainer's, the parts of the loss among it.
    """
    plain, plain_weights = train(SentenceTransformerTrainer, name, tmp_path)
    faint, faint_weights = train(LSAMSentence, name, tmp_path, LSAMConfig(rho=1e-30))
    lsam, lsam_weights = train(LSAMSentence, name, tmp_path, LSAMConfig(rho=0.1))
    _, literal_weights = train(LiteralSentence, name, tmp_path)
    assert largest_difference(lsam_weights, literal_weights) < 1e-12
    assert largest_difference(lsam_weights, plain_weights) > 1e-6
    assert_equal(faint_weights, plain_weights)
    assert lsam._lsam.second_pass.replays
    assert_lines_hold(faint, plain)
    assert [line["lsam/active"] for line in training_lines(faint)] == [1] * 3


@pytest.mark.parametrize("name", ["ranking", "cached"])
def test_replay_equals_a_full_pass_2_with_dropout(name, tmp_path):
    """The cached loss runs each mini-batch twice, the second time in the backward pass, on a copied random state."""
    config = LSAMConfig(rho=0.5, block_selection="last", num_perturbed_blocks=1)
    lsam, lsam_weights = train(LSAMSentence, name, tmp_path, config, dropout=0.1)
    assert lsam._lsam.second_pass.replays
    assert_equal(lsam_weights, train(Full, name, tmp_path, config, dropout=0.1)[1])


def test_a_checkpoint_holds_its_model_card(tmp_path):
    train(LSAMSentence, "ranking", tmp_path, LSAMConfig(rho=0.1), save_strategy="steps", save_steps=3)
    card = (tmp_path / "checkpoint-3" / "README.md").read_text(encoding="utf-8")
    assert "sentence-transformers" in card
