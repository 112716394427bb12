"""What saves memory or changes the loss in the Trainer acts in both passes alike, and counts as in a plain run."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from tiny import (
    MODELS,
    Examples,
    Kept,
    Unreplayed,
    arguments,
    assert_equal,
    bert,
    blocks_of,
    checkpointed,
    give_gradient,
    largest_difference,
    out_of_reach,
    training_lines,
    weights,
)
from tokenizers import Tokenizer, models
from torch import nn
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother

from hf_lsam import LSAMConfig, LSAMMixin, LSAMTrainer, reference

TOP_2 = LSAMConfig(rho=0.3)
LAST_2 = LSAMConfig(rho=0.3, block_selection="last")


class Noted(Trainer):
    """Notes the batch of each pass, and what `in_pass` makes of the pass."""

    def __init__(self, *args, in_pass=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.noted = Kept(batches=[], results=[], in_pass=in_pass)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.noted.batches.append(inputs["input_ids"])
        if self.noted.in_pass is not None:
            self.noted.results.append(self.noted.in_pass(self, len(self.noted.batches)))
        return super().compute_loss(model, inputs, *args, **kwargs)


class NotedLSAM(LSAMMixin, Noted):
    pass


class Full(Unreplayed, LSAMTrainer):
    pass


def train(folder, trainer_class=LSAMTrainer, config=TOP_2, model=None, **options):
    model = model or bert(dropout=0.1)
    data = options.pop("train_dataset", None) or Examples(32, language_model=hasattr(model, "lm_head"))
    own = {
        name: options.pop(name) for name in ("in_pass", "data_collator", "optimizers", "callbacks") if name in options
    }
    if config is not None:
        own["lsam_config"] = config
    trainer = trainer_class(
        model=model,
        args=arguments(folder, **{"max_steps": 4, "logging_steps": 1} | options),
        train_dataset=data,
        **own,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", list(MODELS))
def test_activation_checkpointing_changes_nothing(name, reentrant, tmp_path):
    plain = train(tmp_path / "plain", model=MODELS[name](dropout=0.1))
    model = MODELS[name](dropout=0.1)
    saving = train(
        tmp_path / "saving",
        model=give_gradient(model) if reentrant else model,
        **checkpointed(use_reentrant=reentrant),
    )
    assert saving._lsam.second_pass.replays and saving._lsam.second_pass.checked is not None
    assert_equal(weights(plain.model), weights(saving.model))
    assert [line["lsam/captured"] for line in training_lines(plain)] == [
        line["lsam/captured"] for line in training_lines(saving)
    ]


def test_the_cache_is_emptied_in_both_passes_of_every_nth_step(tmp_path, monkeypatch):
    passes: list[int] = []
    emptied: list[int] = []
    # By the one function or the other (transformers 4.57).
    monkeypatch.setattr(transformers.trainer, "clear_device_cache", lambda: emptied.append(len(passes)), raising=False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(passes)))

    def note(trainer, count):
        passes.append(trainer.state.global_step)

    trainer = train(tmp_path / "emptied", NotedLSAM, LAST_2, in_pass=note, torch_empty_cache_steps=2)
    # Steps 0 and 2; two of the passes of step 0 are those that pass 2 is compared with.
    assert passes == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert emptied == [1, 2, 3, 4, 7, 8]
    assert_equal(weights(trainer.model), weights(train(tmp_path / "kept", config=LAST_2).model))


def test_neftune_adds_the_same_noise_in_both_passes(tmp_path):
    model = bert()
    embedding, notes = model.get_input_embeddings(), out_of_reach(outputs=[])

    class Begin(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            # After the hook that adds the noise.
            embedding.register_forward_hook(lambda module, args, output: notes.outputs.append(output.detach().clone()))

    options = dict(neftune_noise_alpha=5.0, max_steps=3)
    trainer = train(tmp_path / "noise", NotedLSAM, LAST_2, model, callbacks=[Begin()], **options)
    first, *again = notes.outputs[:4]
    others = notes.outputs[4:]
    assert all(torch.equal(first, noisy) for noisy in again)
    assert torch.equal(others[0], others[1]) and torch.equal(others[2], others[3])
    clean = nn.functional.embedding(trainer.noted.batches[0], bert().get_input_embeddings().weight)
    assert 0 < float((first - clean).detach().abs().max()) <= 5.0 / (8 * 16) ** 0.5
    # A full second pass draws the same, and the noise ends with the training.
    full = train(tmp_path / "full", Full, LAST_2, bert(), **options)
    assert_equal(weights(trainer.model), weights(full.model))
    tokens = trainer.noted.batches[0]
    assert torch.equal(embedding(tokens), nn.functional.embedding(tokens, embedding.weight))


class Smoothed(nn.Module):
    """The model with the loss that the Trainer takes under label smoothing."""

    def __init__(self, model, shift):
        super().__init__()
        self.model, self.shift = model, shift

    def forward(self, labels, **inputs):
        outputs = self.model(**inputs)
        return SimpleNamespace(loss=LabelSmoother(0.2)(outputs, labels, shift_labels=self.shift))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", list(MODELS))
def test_label_smoothing_equals_the_reference(name, tmp_path):
    fast, slow = MODELS[name](), MODELS[name]()
    examples = Examples(40, language_model=name == "llama")
    start = weights(slow)
    options = dict(label_smoothing_factor=0.2, max_steps=10, optim="sgd", learning_rate=0.05, max_grad_norm=0.0)
    train(tmp_path, config=LSAMConfig(rho=0.1, alpha=0.7), model=fast, train_dataset=examples, **options)
    blocks = blocks_of(slow)
    smoothed, optimizer = Smoothed(slow.train(), name == "llama"), torch.optim.SGD(slow.parameters(), lr=0.05)
    for step in range(10):
        batches = [examples.batch(step * 4, 4)]
        reference.lsam_step(smoothed, batches, optimizer, blocks, 0.1, 0.7, reference.top_k(2))
    assert largest_difference(weights(slow), start) > 1e-3
    assert largest_difference(weights(fast), weights(slow)) < 1e-12


class Lengths(Dataset):
    """Examples of lengths between 3 and 20."""

    def __init__(self, count):
        self.rows = [Examples(1, length=3 + (7 * index) % 18, seed=index)[0] for index in range(count)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_batches_grouped_by_length_are_those_of_a_plain_run(tmp_path):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1}, "a")), pad_token="[PAD]"
    )
    options = dict(
        train_sampling_strategy="group_by_length",
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=Lengths(26),
        max_steps=-1,
        num_train_epochs=2,
    )
    plain = train(tmp_path / "plain", Noted, None, **options)
    lsam = train(tmp_path / "lsam", NotedLSAM, LAST_2, **options)
    assert lsam.state.global_step == plain.state.global_step == 14
    assert len({batch.shape for batch in plain.noted.batches}) > 3
    first = lsam.noted.batches[:1] + lsam.noted.batches[4::2]
    second = lsam.noted.batches[3:4] + lsam.noted.batches[5::2]
    for batch, one, two in zip(plain.noted.batches, first, second, strict=True):
        assert torch.equal(batch, one) and torch.equal(batch, two)


@pytest.mark.parametrize(
    "at, error",
    [
        (2, RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        (4, torch.OutOfMemoryError("CUDA out of memory. Tried")),
        (6, RuntimeError("CUDA out of memory.")),
    ],
)
def test_out_of_memory_in_pass_2_starts_anew_with_a_smaller_batch(at, error, tmp_path):
    """In a full pass of the first step, in a replayed one, and in the second step: as if it had begun at that size."""
    begun = []

    def in_pass(trainer, count):
        if count == 1:
            begun.append(weights(trainer.model))
        if count == at:
            raise error
        if count == at + 1:
            begun.append(weights(trainer.model))
            assert all(p.requires_grad for p in trainer.model.parameters())

    # At a learning rate of zero the retry, which keeps earlier updates, is to begin with the weights as they were.
    options = dict(learning_rate=0.0, logging_steps=2, model=bert())
    found = train(tmp_path / "found", NotedLSAM, LAST_2, in_pass=in_pass, auto_find_batch_size=True, **options)
    assert_equal(*begun)
    size = found._train_batch_size
    assert size == 3 and len(found.noted.batches[at]) == 3
    assert found._lsam.second_pass.replays
    small = train(tmp_path / "small", config=LAST_2, **options | dict(model=bert(), per_device_train_batch_size=size))
    rows = [(tmp_path / name / "lsam_blocks.jsonl").read_text() for name in ("found", "small")]
    assert rows[0] == rows[1] and len(rows[0].splitlines()) == 2
    assert [json.loads(row)["steps"] for row in rows[0].splitlines()] == [2, 2]
    times = ("train_runtime", "epoch")
    for left, right in zip(training_lines(found), training_lines(small), strict=True):
        assert {k: v for k, v in left.items() if k not in times} == {k: v for k, v in right.items() if k not in times}


@pytest.mark.usefixtures("float64")
def test_the_norm_that_is_clipped_and_logged_is_that_of_the_mixed_gradient(tmp_path):
    fast, slow = bert(), bert()
    blocks = blocks_of(slow)
    batches = [Examples(32).batch(0, 4)]
    mixed = reference.lsam_gradient(slow.train(), batches, blocks, 3.0, 0.7, reference.top_k(2))
    norm, plain_norm = reference.norm(mixed.values()), reference.norm(reference.gradient(slow, batches).values())
    assert abs(norm - plain_norm) > 0.05 * plain_norm
    options = dict(max_steps=1, optim="sgd", learning_rate=0.5, max_grad_norm=0.1)
    trainer = train(tmp_path, config=LSAMConfig(rho=3.0, alpha=0.7), model=fast, **options)
    assert training_lines(trainer)[0]["grad_norm"] == pytest.approx(norm, rel=1e-9)
    with torch.no_grad():
        for parameter, gradient in mixed.items():
            parameter.sub_(0.5 * gradient * 0.1 / (norm + 1e-6))
    assert largest_difference(weights(fast), weights(slow)) < 1e-12
