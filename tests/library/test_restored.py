"""Promise 5: weights are put back by copy, bitwise, whatever happens in between; nothing else ever sees them moved."""

import math
from contextlib import nullcontext

import pytest
import torch
from tiny import Examples, Kept, arguments, assert_equal, bert, weights
from transformers import TrainerCallback
from transformers.utils.logging import warning_once

from hf_lsam import LSAMConfig, LSAMTrainer

METHODS = {
    "top 2": LSAMConfig(rho=0.5),
    "sam, micro-batch": LSAMConfig(rho=0.5, block_selection="all", sharpness_scope="micro_batch"),
    "adaptive": LSAMConfig(rho=2.0, adaptive=True),
    "one pass": LSAMConfig(rho=0.5, ascent_gradient="previous"),
}


class Watched(LSAMTrainer):
    """Keeps the weights that each pass ran at, and does in a pass what a test wants."""

    def __init__(self, *args, in_pass=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.passes = Kept(seen=[], in_pass=in_pass)

    @property
    def seen(self):
        return self.passes.seen

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen.append(weights(model))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return self.passes.in_pass(len(self.seen), loss) if self.passes.in_pass else loss


def watched(folder, config, in_pass=None, model=None, **options):
    options = {"max_steps": 3, "optim": "sgd", "max_grad_norm": 0.0, **options}
    return Watched(
        model=model or bert(dropout=0.1),
        args=arguments(folder, **options),
        train_dataset=Examples(12),
        eval_dataset=Examples(4),
        lsam_config=config,
        in_pass=in_pass,
    )


class Inspect(TrainerCallback):
    """At every event the weights must be those that the last optimizer step left."""

    def __init__(self, model):
        self.model, self.expected, self.events = model, weights(model), []

    def __getattribute__(self, name):
        if name.startswith("on_") and name != "on_optimizer_step":

            def check(*args, **kwargs):
                self.events.append(name)
                assert_equal(weights(self.model), self.expected)

            return check
        return super().__getattribute__(name)

    def on_optimizer_step(self, *args, **kwargs):
        self.expected = weights(self.model)


@pytest.mark.parametrize("method", list(METHODS))
def test_nothing_outside_a_pass_sees_moved_weights(method, tmp_path):
    trainer = watched(
        tmp_path,
        METHODS[method],
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=1,
        logging_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    inspect = Inspect(trainer.model)
    trainer.add_callback(inspect)
    trainer.train()
    assert {"on_substep_end", "on_pre_optimizer_step", "on_evaluate", "on_save", "on_log"} <= set(inspect.events)
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-3")
    assert_equal(weights(saved), weights(trainer.model))


def test_pass_2_runs_at_moved_weights(tmp_path):
    """The second pass of a step is `rho` away from the first, in the selected blocks only."""
    trainer = watched(tmp_path, LSAMConfig(rho=0.5, block_selection="last"), max_steps=1)
    trainer.train()
    # It is compared with a full pass there, and at the weights as they were.
    first, check, second, replayed = trainer.seen
    assert_equal(first, check)
    assert_equal(second, replayed)
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert moved and all(name.startswith(("bert.encoder.layer.2.", "bert.encoder.layer.3.")) for name in moved)
    distance = math.sqrt(sum(float((first[n].double() - second[n].double()).square().sum()) for n in moved))
    assert distance == pytest.approx(0.5, rel=1e-4)


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("method", list(METHODS))
def test_put_back_when_a_pass_raises(method, error, tmp_path):
    """
    The weights are those after the last update, and every `requires_grad` is on again.

    An error of pass 2 does not end the training, but Ctrl-C does.
    """
    trainer = watched(tmp_path, METHODS[method])
    after_update = []

    def in_pass(count, loss):
        if len(after_update) == 2 and any(
            not torch.equal(value, after_update[-1][name]) for name, value in trainer.seen[-1].items()
        ):
            raise error("at moved weights")
        return loss

    class Keep(TrainerCallback):
        def on_optimizer_step(self, *args, **kwargs):
            after_update.append(weights(trainer.model))

    trainer.passes.in_pass = in_pass
    trainer.add_callback(Keep())
    ends = error is KeyboardInterrupt or method == "one pass"
    with pytest.raises(error) if ends else nullcontext():
        trainer.train()
    assert len(after_update) == (2 if ends else 3)
    assert_equal(weights(trainer.model), after_update[-1])
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert all("forward" not in vars(module) for module in trainer.model.bert.encoder.layer)
    # The same trainer trains again.
    trainer.passes.in_pass = None
    trainer.train()
    assert all(bool(tensor.isfinite().all()) for tensor in weights(trainer.model).values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_put_back_when_the_perturbed_loss_is_not_finite(value, tmp_path, caplog):
    """The plain gradient is used instead, so the run equals the plain one."""
    warning_once.cache_clear()
    config = LSAMConfig(rho=0.5, block_selection="last")
    trainer = watched(
        tmp_path / "lsam",
        config,
        # At each step pass 1 and a full pass 2 at the same weights, one and a replayed one at moved weights.
        in_pass=lambda count, loss: loss * value if count % 4 in (3, 0) else loss,
        logging_steps=3,
    )
    trainer.train()
    plain = watched(tmp_path / "plain", LSAMConfig(block_selection="none"))
    plain.train()
    assert_equal(weights(trainer.model), weights(plain.model))
    assert trainer.state.log_history[0]["lsam/skipped"] == 3
    assert trainer.state.log_history[0]["lsam/active"] == 0
    assert "at the perturbed weights was not finite" in caplog.text


class DropGradients(TrainerCallback):
    """Notes whether the optimizer would get gradients that are not finite, and takes them all away from it."""

    def __init__(self, model):
        self.model, self.finite = model, []

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.finite.append(all(bool(p.grad.isfinite().all()) for p in self.model.parameters()))
        self.model.zero_grad()


@pytest.mark.parametrize("method", ["top 2", "one pass"])
def test_a_gradient_that_is_not_finite_is_not_climbed(method, tmp_path):
    """As in the plain Trainer, the optimizer gets it; but nothing is moved by it."""
    trainer = watched(tmp_path, METHODS[method], max_steps=2, logging_steps=1)
    # That of one weight of one block, so that there would be others to climb.
    weight = trainer.model.bert.encoder.layer[0].output.dense.bias
    trainer.passes.in_pass = lambda count, loss: loss + math.nan * weight.sum()
    start, drop = weights(trainer.model), DropGradients(trainer.model)
    trainer.add_callback(drop)
    trainer.train()
    assert drop.finite == [False, False]
    # No pass 2; and without an update, pass 1 of the second step is at the same weights as that of the first.
    assert len(trainer.seen) == 2
    assert_equal(trainer.seen[1], start)
    assert sum(line.get("lsam/skipped", 0) for line in trainer.state.log_history) >= 1


def test_batch_norm_statistics_are_updated_once(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification, set_seed

    class Images(Examples):
        def __getitem__(self, index):
            generator = torch.Generator().manual_seed(index)
            return {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": self.labels[index]}

    def run(config):
        set_seed(0)
        shape = dict(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic")
        model = ResNetForImageClassification(ResNetConfig(**shape, num_labels=3))
        trainer = LSAMTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=1, learning_rate=0.0),
            train_dataset=Images(4),
            lsam_config=config,
        )
        trainer.train()
        return {name: buffer.clone() for name, buffer in model.named_buffers()}

    plain = run(LSAMConfig(block_selection="none"))
    assert any(name.endswith("num_batches_tracked") and int(value) == 1 for name, value in plain.items())
    for config in (LSAMConfig(rho=1.0), LSAMConfig(rho=1.0, block_selection="all")):
        assert_equal(plain, run(config))


@pytest.mark.parametrize("method", ["top 2", "one pass"])
def test_out_of_memory_retries_with_a_smaller_batch_from_the_start(method, tmp_path):
    """`auto_find_batch_size` runs the loop anew: nothing of the first attempt may be left."""
    fails = [3]

    def in_pass(count, loss):
        if fails and count == fails[0]:
            fails.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return loss

    options = dict(optim="sgd", learning_rate=0.0, max_steps=3)
    found = watched(tmp_path / "found", METHODS[method], in_pass, auto_find_batch_size=True, **options)
    found.train()
    assert not fails
    size = found._train_batch_size
    assert size < 4
    small = watched(tmp_path / "small", METHODS[method], per_device_train_batch_size=size, **options)
    small.train()
    # The first pass of the attempt that went through is at the weights that training began with.
    assert_equal(found.seen[-len(small.seen)], small.seen[0])


def test_looksam_reuses_nothing_of_a_gradient_that_is_not_finite(tmp_path):
    config = LSAMConfig(rho=0.5, block_selection="all", perturb_interval=3, reuse_correction=0.7)
    trainer = watched(tmp_path / "lsam", config, lambda count, loss: loss * math.nan if count == 3 else loss)
    trainer.train()
    plain = watched(tmp_path / "plain", LSAMConfig(block_selection="none"))
    plain.train()
    assert_equal(weights(trainer.model), weights(plain.model))
