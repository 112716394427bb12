"""Promise 5: weights are put back by copy, bitwise, whatever happens in between; nothing else ever sees them moved."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import Examples, arguments, assert_equal, bert, weights
from transformers import TrainerCallback
from transformers.utils.logging import warning_once

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.perturbation import Perturbation, where
from hf_lsam.step import LSAMStep

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
        # Not a list: what a trainer counts in pass 2 is put back.
        self.passes, self.in_pass = SimpleNamespace(seen=[]), in_pass

    @property
    def seen(self):
        return self.passes.seen

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen.append(weights(model))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return self.in_pass(len(self.seen), loss) if self.in_pass else loss


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
    first, check, second = trainer.seen
    assert_equal(first, check)
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert moved and all(name.startswith(("bert.encoder.layer.2.", "bert.encoder.layer.3.")) for name in moved)
    distance = math.sqrt(sum(float((first[n].double() - second[n].double()).square().sum()) for n in moved))
    assert distance == pytest.approx(0.5, rel=1e-4)


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("method", list(METHODS))
def test_put_back_when_a_pass_raises(method, error, tmp_path):
    """The weights are those after the last update, and every `requires_grad` is on again."""
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

    trainer.in_pass = in_pass
    trainer.add_callback(Keep())
    with pytest.raises(error):
        trainer.train()
    assert_equal(weights(trainer.model), after_update[-1])
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert all("forward" not in vars(module) for module in trainer.model.bert.encoder.layer)
    # The same trainer trains again.
    trainer.in_pass = None
    trainer.train()
    assert all(bool(tensor.isfinite().all()) for tensor in weights(trainer.model).values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_put_back_when_the_perturbed_loss_is_not_finite(value, tmp_path, caplog):
    """The plain gradient is used instead, computed again, so the run equals the plain one."""
    warning_once.cache_clear()
    config = LSAMConfig(rho=0.5, block_selection="last")
    trainer = watched(
        tmp_path / "lsam",
        config,
        # Pass 1, the self-check, pass 2 and pass 1 again in the first step; pass 1, 2 and 1 in the others.
        in_pass=lambda count, loss: loss * value if count in (3, 6, 9) else loss,
        logging_steps=3,
    )
    trainer.train()
    plain = watched(tmp_path / "plain", LSAMConfig(block_selection="none"))
    plain.train()
    assert_equal(weights(trainer.model), weights(plain.model))
    assert trainer.state.log_history[0]["lsam/skipped"] == 3
    assert trainer.state.log_history[0]["lsam/active"] == 0
    assert "at the perturbed weights was not finite" in caplog.text


@pytest.mark.parametrize("method", ["top 2", "one pass"])
def test_a_gradient_that_is_not_finite_is_not_climbed(method, tmp_path):
    """As the plain Trainer, the optimizer gets it; but nothing is moved by it."""
    trainer = watched(
        tmp_path, METHODS[method], in_pass=lambda count, loss: loss * math.nan, max_steps=2, logging_steps=1
    )
    start = weights(trainer.model)
    trainer.train()
    assert_equal(trainer.seen[0], start)
    assert len(trainer.seen) == 2
    assert sum(line.get("lsam/skipped", 0) for line in trainer.state.log_history) >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_move_and_restore_are_exact(dtype):
    weights_, directions = [], []
    for shape in ((7,), (3, 5), ()):
        weights_.append(torch.randn(shape).to(dtype))
        directions.append(torch.randn(shape).to(dtype))
    before = [weight.clone() for weight in weights_]
    perturbation = Perturbation()
    for _ in range(2):
        with pytest.raises(Stop), perturbation.moved(weights_, directions, 0.5) as copies:
            assert all(torch.equal(copy, old) for copy, old in zip(copies, before, strict=True))
            for weight, old, direction in zip(weights_, before, directions, strict=True):
                exact = old.float() + 0.5 * direction.float()
                # Those of 16 bits go to either neighbour.
                slack = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * exact.abs()
                assert bool(((weight.float() - exact).abs() <= slack).all()) and not torch.equal(weight, old)
            weights_[0].fill_(math.nan)
            raise Stop
        assert all(torch.equal(weight, old) for weight, old in zip(weights_, before, strict=True))


WATCHED = ("/hf_lsam/perturbation.py", "/hf_lsam/second_pass.py", "/contextlib.py")


class Interrupts:
    """A trace that counts the interpreter's steps in some files, and raises Ctrl-C at the `at`-th of them."""

    def __init__(self, at=None):
        self.count, self.at = 0, at

    def __call__(self, frame, event, arg):
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if not path.endswith(WATCHED) and name not in ("_moved", "_perturb_and_rerun", "_one_pass"):
            return None
        frame.f_trace_opcodes = True
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("ascent", ["current", "previous"])
def test_an_interrupt_at_any_step_of_the_interpreter_leaves_the_weights_as_they_were(ascent):
    """Also where a `with` block is entered or left; the error is kept, and with it what its frames refer to."""

    def interrupted(at):
        model, batch = bert(blocks=2).train(), Examples(4).batch(0, 4)

        def run():
            loss = model(**batch).loss
            loss.backward()
            return loss.detach()

        step = LSAMStep(model, LSAMConfig(rho=0.5, block_selection="all", ascent_gradient=ascent), max_steps=2)
        if ascent == "previous":
            step(run, run, 0, True)
        before, interrupts, error = weights(model), Interrupts(at), None
        sys.settrace(interrupts)
        try:
            step(run, run, int(ascent == "previous"), True)
        except KeyboardInterrupt as raised:
            error = raised
        finally:
            sys.settrace(None)
        assert (error is None) == (at is None)
        assert_equal(weights(model), before)
        return interrupts.count

    steps = interrupted(None)
    assert steps > 500
    for at in range(1, steps, steps // 60):
        interrupted(at)


def test_moved_weights_reuse_their_memory():
    perturbation = Perturbation()
    addresses = set()
    for count in (3, 2, 3, 1):
        tensors = [torch.ones(4) for _ in range(count)]
        with perturbation.moved(tensors, tensors, 1.0):
            addresses.add(tensors[0].data_ptr())
    assert len(addresses) == 1


def test_weights_go_back_to_their_own_memory_and_keep_their_strides():
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    weights_ = [image, torch.randn(3, 4).T, torch.randn(6, 4)[::2, ::2], torch.randn(())]
    before = [(weight.data_ptr(), weight.stride(), weight.clone()) for weight in weights_]
    with Perturbation().moved(weights_, weights_, 0.5):
        assert image.is_contiguous(memory_format=torch.channels_last)
        for weight, (address, _, old) in zip(weights_, before, strict=True):
            assert weight.data_ptr() != address and torch.equal(weight, old + 0.5 * old)
    for weight, (address, stride, old) in zip(weights_, before, strict=True):
        assert weight.data_ptr() == address and weight.stride() == stride and torch.equal(weight, old)


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


def test_a_choice_by_a_condition_on_the_device_does_not_wait_for_it():
    """A tensor on `meta` has no value: reading the condition would raise."""
    one, other = ([torch.empty(3, device="meta")] for _ in range(2))
    chosen = where(torch.empty((), dtype=torch.bool, device="meta"), one, other)
    assert [tensor.shape for tensor in chosen] == [(3,)]
    values, others = [torch.ones(2)], [torch.zeros(2)]
    assert where(torch.tensor(True), values, others)[0] is values[0]
    assert where(torch.tensor(False), values, others)[0] is others[0]


def test_looksam_reuses_nothing_of_a_gradient_that_is_not_finite(tmp_path):
    config = LSAMConfig(rho=0.5, block_selection="all", perturb_interval=3, reuse_correction=0.7)
    trainer = watched(tmp_path / "lsam", config, lambda count, loss: loss * math.nan if count == 2 else loss)
    trainer.train()
    plain = watched(tmp_path / "plain", LSAMConfig(block_selection="none"))
    plain.train()
    assert_equal(weights(trainer.model), weights(plain.model))
