"""Whatever goes wrong, the weights are those of the last update, and the message names the way out."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from tiny import Examples, arguments, assert_equal, bert, largest_difference, weights
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.utils.logging import warning_once

from hf_lsam import LSAMConfig, LSAMMixin, LSAMTrainer, reference
from hf_lsam.blocks import find_blocks


class Injected(Exception):
    pass


class Surviving(LSAMTrainer):
    """
    Goes on after a micro-batch whose pass fails, as trainers do that leave out what does not fit into the memory.

    Args:
        faults: Pairs `(micro-batch, pass)`, counted from 0, that fail.
        factor: What the losses of those passes are multiplied by instead, if they are not to fail.
    """

    faults, factor = (), None

    def training_step(self, *args):
        self.count = getattr(self, "count", -1) + 1
        self.passes = iter(range(99))
        try:
            return super().training_step(*args)
        except Injected:
            return weights(self.model)["classifier.bias"].sum() * 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if (self.count, next(self.passes)) in self.faults:
            if self.factor is None:
                raise Injected
            return loss * self.factor
        return loss


def survive(folder, config, faults, factor=None):
    trainer = Surviving(
        model=bert(),
        args=arguments(folder, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=3, optim="sgd"),
        train_dataset=Examples(12),
        lsam_config=LSAMConfig(**config),
    )
    trainer.model_accepts_loss_kwargs = False
    trainer.faults, trainer.factor = faults, factor
    trainer.train()
    return weights(trainer.model)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("micro_batch", [0, 1, 2])
@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_a_micro_batch_that_fails_in_pass_1_and_is_left_out_takes_no_other_with_it(scope, micro_batch, tmp_path):
    """It is as if its loss were zero; where the last one of a step is left out, the others are not perturbed."""
    config = dict(rho=0.3, alpha=0.7, sharpness_scope=scope)
    left = survive(tmp_path, config, [(3 + micro_batch, 0)])
    # What the trainer counts is in pass 2 what it was in pass 1, so these are all passes over the same micro-batch.
    faults = [(3 + micro_batch, number) for number in range(9)]
    if micro_batch == 2 and scope == "batch":
        config = config | dict(perturb_end=0.5)
    right = survive(tmp_path, config, faults, factor=0.0)
    assert largest_difference(left, right) < 1e-12


def trainer_for(folder, config, examples=None, model=None, trainer_class=LSAMTrainer, **options):
    return trainer_class(
        model=model or bert(),
        args=arguments(folder, **options),
        train_dataset=examples or Examples(48),
        **({"lsam_config": config} if issubclass(trainer_class, LSAMMixin) else {}),
    )


TRUNCATED = {
    "model.safetensors": True,
    "optimizer.pt": True,
    "scheduler.pt": True,
    "rng_state.pth": True,
    "trainer_state.json": True,
    "lsam_state.safetensors": True,
    "config.json": True,
    # Nothing reads it.
    "training_args.bin": False,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """The folder of a run with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("checkpoints")
    config = LSAMConfig(rho=0.3, ascent_gradient="previous")
    trainer_for(folder, config, save_strategy="steps", save_steps=2).train()
    assert {path.name for path in (folder / "checkpoint-4").iterdir()} == TRUNCATED.keys()
    return folder


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("name", list(TRUNCATED))
def test_a_checkpoint_cut_short_at_any_file_is_refused_before_a_step(name, share, checkpoints, tmp_path):
    """Where the plain Trainer needs the file, too; and the weights are not those of some steps later."""
    checkpoint = shutil.copytree(checkpoints / "checkpoint-2", tmp_path / "checkpoint-2")
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: int(share * len(content))])
    trainer = trainer_for(tmp_path, LSAMConfig(rho=0.3, ascent_gradient="previous"))
    at_checkpoint = checkpoints / "checkpoint-2" / "model.safetensors"
    saved = type(trainer.model).from_pretrained(at_checkpoint.parent)
    start = weights(trainer.model)
    if not TRUNCATED[name]:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert_equal(weights(trainer.model), weights(type(saved).from_pretrained(checkpoints / "checkpoint-4")))
        return
    with pytest.raises(Exception) as raised:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer._lsam is None or trainer._lsam.log.steps == 0
    assert any(all(torch.equal(weights(trainer.model)[n], w[n]) for n in w) for w in (start, weights(saved)))
    if name == "lsam_state.safetensors":
        assert "Resume from an earlier checkpoint, or delete the file" in str(raised.value)


SETTINGS = [{}, {"sharpness_scope": "micro_batch"}, {"ascent_gradient": "previous"}]


class RaiseAt(TrainerCallback):
    """Raises between the micro-batches of step 1, at the `count`-th event."""

    def __init__(self, count):
        self.count = count

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.count -= 1
            if self.count == 0:
                raise Injected("between micro-batches")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_callback_that_raises_between_micro_batches_leaves_nothing_behind(settings, count, tmp_path):
    """Not in the weights, and not for the next training, which is that of a trainer to which nothing happened."""
    options = dict(max_steps=2, gradient_accumulation_steps=3, per_device_train_batch_size=2, save_strategy="steps")
    options |= dict(save_steps=1)
    config = LSAMConfig(rho=0.3, **settings)
    trainer = trainer_for(tmp_path / "raises", config, model=bert(dropout=0.1), **options)
    trainer.add_callback(RaiseAt(count))
    with pytest.raises(Injected, match="between micro-batches"):
        trainer.train()
    saved = type(trainer.model).from_pretrained(tmp_path / "raises" / "checkpoint-1")
    assert_equal(weights(trainer.model), weights(saved))
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    trainer.remove_callback(RaiseAt)
    trainer.train(resume_from_checkpoint=str(tmp_path / "raises" / "checkpoint-1"))
    whole = trainer_for(tmp_path / "whole", config, model=bert(dropout=0.1), **options)
    whole.train()
    assert_equal(weights(trainer.model), weights(whole.model))


class Reordering(LSAMTrainer):
    """Changes in pass `count` of the training which blocks the model calls."""

    layers, count = None, None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.passes = iter(range(1, 99))

    def compute_loss(self, model, *args, **kwargs):
        encoder = self.model.bert.encoder
        own = encoder.layer
        if next(self.passes) == self.count:
            encoder.layer = torch.nn.ModuleList([own[index] for index in self.layers])
        try:
            return super().compute_loss(model, *args, **kwargs)
        finally:
            encoder.layer = own


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("layers", [[1, 0, 2, 3], [0, 2, 3], [0, 1, 3], [2, 3], [3]], ids=str)
@pytest.mark.parametrize("count", [4, 6])
def test_blocks_in_another_order_or_fewer_of_them_in_pass_2_cost_the_replay_only(layers, count, tmp_path, caplog):
    """
    In the replay that is compared at the first step, or in the second step, whose pass 2 then runs in full, and which
    is compared anew at the next: training ends as the one that replays nothing.
    """
    config = LSAMConfig(rho=0.3, block_selection="last", num_perturbed_blocks=1)
    trainer = trainer_for(tmp_path, config, max_steps=4, optim="sgd", trainer_class=Reordering)
    trainer.layers, trainer.count = layers, count
    trainer.train()
    in_check = count == 4
    assert trainer._lsam.second_pass.replays != in_check
    assert (
        caplog.text.count("Pass 2 of BertForSequenceClassification cannot be run by replay of block outputs")
        == in_check
    )
    assert caplog.text.count("Pass 2 of BertForSequenceClassification failed (ReplayError") == (not in_check)
    full = trainer_for(tmp_path, config, max_steps=4, optim="sgd")
    full.train()
    assert largest_difference(weights(trainer.model), weights(full.model)) < 1e-12


def rows_with_keys(examples: Examples, number: int) -> dict:
    """A micro-batch whose keys differ from those of the next."""
    batch = examples.batch(2 * number, 2)
    extra = {"token_type_ids": batch["input_ids"] % 2, "position_ids": torch.arange(8).flip(0).repeat(2, 1)}
    if number % 3:
        del batch["attention_mask"]
    return batch | {name: value for place, (name, value) in enumerate(extra.items()) if number % (place + 2) == 0}


class KeyedTrainer(LSAMTrainer):
    def get_train_dataloader(self):
        batches = [rows_with_keys(self.train_dataset, number) for number in range(12)]
        return DataLoader(batches, batch_size=None)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_batches_of_different_keys_equal_the_reference(scope, tmp_path):
    examples = Examples(24)
    config = LSAMConfig(rho=0.1, alpha=0.7, sharpness_scope=scope)
    options = dict(max_steps=4, gradient_accumulation_steps=3, optim="sgd", learning_rate=0.05, max_grad_norm=0.0)
    trainer = trainer_for(tmp_path, config, examples=examples, trainer_class=KeyedTrainer, **options)
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    slow = bert().train()
    optimizer = torch.optim.SGD(slow.parameters(), lr=0.05)
    blocks = [list(block.parameters()) for block in find_blocks(slow).values()]
    step = reference.lsam_step if scope == "batch" else reference.micro_batch_lsam_step
    keys = set()
    for number in range(4):
        batches = [rows_with_keys(examples, 3 * number + part) for part in range(3)]
        keys.update(frozenset(batch) for batch in batches)
        step(slow, batches, optimizer, blocks, 0.1, 0.7, reference.top_k(2))
    assert len(keys) > 3
    assert largest_difference(weights(trainer.model), weights(slow)) < 1e-12


class Infinite(Trainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * self.value


class InfiniteLSAM(LSAMMixin, Infinite):
    pass


class KeepGradients(TrainerCallback):
    """Keeps what the optimizer gets."""

    def __init__(self, found):
        self.found = found

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found.append({name: p.grad.clone() for name, p in model.named_parameters()})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "settings", [{}, {"sharpness_scope": "micro_batch"}, {"ascent_gradient": "previous"}], ids=str
)
def test_a_gradient_of_pass_1_that_is_not_finite_is_left_to_the_optimizer_as_in_a_plain_run(
    settings, value, tmp_path, caplog
):
    """Which skips the step, clips it or fails, as it would without layer-wise SAM; and there is a word about it."""
    warning_once.cache_clear()
    found = []
    for trainer_class in (Infinite, InfiniteLSAM):
        trainer = trainer_for(
            tmp_path, LSAMConfig(rho=0.3, **settings), Examples(8), max_steps=2, trainer_class=trainer_class
        )
        trainer.value = value
        trainer.add_callback(KeepGradients(found))
        trainer.train()
    assert len(found) == 4 and not found[0]["classifier.weight"].isfinite().any()
    for plain, ours in zip(found[:2], found[2:], strict=True):
        assert_equal(*({name: g.nan_to_num(7) for name, g in gradients.items()} for gradients in (plain, ours)))
    assert "the gradient is zero or not finite" in caplog.text
