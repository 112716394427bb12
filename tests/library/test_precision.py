"""Precision: bf16 autocast, and fp16 with a gradient scaler."""

from contextlib import contextmanager

import pytest
import torch
from accelerate.utils import AutocastKwargs
from tiny import (
    MODELS,
    Examples,
    arguments,
    assert_equal,
    bert,
    training_lines,
    weights,
)
from tiny_passes import Literally, Noting, share_of_rounding
from tiny_precision import METHODS, Replays, Watch
from transformers import Trainer

from hf_lsam import LSAMConfig, LSAMTrainer, reference


class Overflowing(LSAMTrainer):
    """Counts the passes of each step, and makes the loss of one of them infinite."""

    overflow = None

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        now = (self.state.global_step, self.watch.count_pass(self.state.global_step))
        return loss * float("inf") if now == self.overflow else loss


class Noted(Noting, Overflowing):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # BERT's loss is a mean over its micro-batch, whatever number of items it is told.
        self.model_accepts_loss_kwargs = False


NOTED = dict(
    kind=Noted, dropout=0, gradient_accumulation_steps=2, per_device_train_batch_size=2, optim="sgd", max_grad_norm=0.0
)


@contextmanager
def scaled(trainer, scaler, autocast):
    """As accelerate sets itself up for fp16 on a GPU, on a CPU; without `autocast` the model stays in float32."""
    accelerator = trainer.accelerator
    state = vars(accelerator.state)
    before = state["_mixed_precision"]
    accelerator.scaler, accelerator.native_amp, state["_mixed_precision"] = scaler, True, "fp16"
    accelerator.autocast_handler = AutocastKwargs(enabled=autocast)
    try:
        yield
    finally:
        state["_mixed_precision"] = before


def run(
    folder,
    settings,
    scaler=None,
    autocast=False,
    overflow=None,
    steps=6,
    dropout=0.1,
    data=None,
    kind=Overflowing,
    **options,
):
    """Train a tiny BERT; with a `scaler` as under fp16."""
    trainer = kind(
        model=bert(dropout=dropout),
        args=arguments(folder, max_steps=steps, logging_steps=1, **options),
        train_dataset=data or Examples(4 * steps),
        lsam_config=LSAMConfig(**settings),
    )
    trainer.overflow = overflow
    trainer.watch = Watch(trainer)
    trainer.add_callback(trainer.watch)
    if scaler is None:
        trainer.train()
    else:
        with scaled(trainer, scaler, autocast):
            trainer.train()
    trainer.lines = training_lines(trainer)
    return trainer


@pytest.mark.parametrize("method", list(METHODS))
def test_a_scale_that_doubles_at_every_step_changes_nothing(method, tmp_path):
    """What is kept from a step to the next, one pass's gradient or LookSAM's correction, is free of its scale."""
    options = dict(gradient_accumulation_steps=2, per_device_train_batch_size=2)
    plain = run(tmp_path, METHODS[method], **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1)
    with_scaler = run(tmp_path, METHODS[method], scaler, **options)
    assert with_scaler.watch.scales == [2.0**n for n in range(17, 23)]
    for left, right in zip(plain.watch.weights, with_scaler.watch.weights, strict=True):
        assert_equal(left, right)
    for left, right in zip(plain.lines, with_scaler.lines, strict=True):
        assert left == right
    assert any(line["lsam/active"] for line in plain.lines)


@pytest.mark.parametrize("method", list(METHODS))
def test_there_is_one_update_of_the_optimizer_and_of_the_scaler_in_a_step(method, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    trainer = run(tmp_path, METHODS[method], scaler, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    assert scaler._get_growth_tracker() == 6
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {6}


# name: (method, the pass that overflows, the passes of every step). Steps that compare pass 2 have one or two more.
OVERFLOWS = {
    "pass 1": ("top 2", (2, 1), [4, 4, 1, 2, 2, 2]),
    "pass 2": ("top 2", (2, 2), [4, 4, 2, 2, 2, 2]),
    "pass 1, looksam": ("looksam", (2, 1), [3, 1, 1, 1, 2, 1]),
    "pass 2, looksam": ("looksam", (2, 2), [3, 1, 2, 1, 2, 1]),
    "the only pass": ("one pass", (2, 1), [1] * 6),
}


@pytest.mark.parametrize("overflow", list(OVERFLOWS))
def test_an_overflow_skips_the_step_and_the_next_one_goes_on(overflow, tmp_path):
    method, place, passes = OVERFLOWS[overflow]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    trainer = run(tmp_path, METHODS[method], scaler, overflow=place, max_grad_norm=0.0, optim="adamw_torch")
    counts = [trainer.watch.passes.counts[step] for step in range(6)]
    # Which of the other steps compares pass 2 once more, is up to the blocks that it selects, and so to rounding.
    assert counts[2] == passes[2] and sorted(counts) == sorted(passes)
    assert trainer.watch.scales == [2.0**16] * 2 + [2.0**15] * 4
    states = trainer.watch.weights
    assert_equal(states[2], states[3])
    for left, right in ((1, 2), (3, 4), (4, 5), (5, 6)):
        assert not all(torch.equal(states[left][name], states[right][name]) for name in states[left])
    assert all(bool(tensor.isfinite().all()) for tensor in states[-1].values())
    assert trainer.lr_scheduler.last_epoch == 5
    assert [line["lsam/skipped"] for line in trainer.lines] == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("which", [1, 2])
def test_a_run_with_an_overflow_equals_one_that_never_had_that_batch(which, tmp_path):
    examples = Examples(24)
    kept = torch.utils.data.Subset(examples, [*range(8), *range(12, 24)])
    whole = run(tmp_path, METHODS["top 2"], torch.amp.GradScaler("cpu"), overflow=(2, which), data=examples, dropout=0)
    shorter = run(tmp_path, METHODS["top 2"], torch.amp.GradScaler("cpu"), data=kept, steps=5, dropout=0)
    assert_equal(whole.watch.weights[-1], shorter.watch.weights[-1])


@pytest.mark.parametrize("which, passes", [(1, 3), (2, 4), (3, 3), (4, 4)])
def test_an_overflow_in_any_micro_batch_skips_its_step(which, passes, tmp_path):
    """Passes 1 and 2 are those of the first micro-batch, 3 and 4 those of the second."""
    scaler, settings = torch.amp.GradScaler("cpu"), METHODS["micro-batch"] | dict(block_selection="last")
    options = dict(gradient_accumulation_steps=2, per_device_train_batch_size=2)
    trainer = run(tmp_path, settings, scaler, overflow=(1, which), steps=3, **options)
    assert [trainer.watch.passes.counts[step] for step in (1, 2)] == [passes, 4]
    states = trainer.watch.weights
    assert_equal(states[1], states[2])
    assert not all(torch.equal(states[2][name], states[3][name]) for name in states[2])
    assert trainer.watch.scales == [2.0**16, 2.0**15, 2.0**15]


def test_the_logged_gradient_norm_is_that_of_the_unscaled_gradient(tmp_path):
    settings = dict(rho=0.2, block_selection="all")
    trainer = run(tmp_path, settings, torch.amp.GradScaler("cpu", 2.0**8), autocast=True, dropout=0, steps=1)
    model = bert().train()
    slopes = reference.gradient(model, [Examples(4).batch(0, 4)])
    norm = reference.norm(list(slopes.values()))
    assert trainer.lines[0]["lsam/grad_norm"] == pytest.approx(norm, rel=share_of_rounding(model, torch.float16))


@pytest.mark.parametrize("method", list(METHODS))
def test_fp16_autocast_with_a_scaler_steps_close_to_float32(method, tmp_path):
    """Each step by itself, since the rounding of one grows in the steps after it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    half = run(tmp_path, METHODS[method], scaler, autocast=True, **NOTED)
    single = bert()
    literally = Literally(single, LSAMConfig(**METHODS[method]), share_of_rounding(single, torch.float16))
    assert all(literally.assert_step(step) > 0 for step in half.steps.noted)


@pytest.mark.parametrize("method", list(METHODS))
def test_bf16_autocast_equals_the_reference_under_bf16_autocast(method, tmp_path):
    """To some float32 epsilons. One more, and a weight is rounded to another bf16: hence each step by itself, too."""
    fast = run(tmp_path, METHODS[method], bf16=True, **NOTED)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    literally = Literally(bert(), LSAMConfig(**METHODS[method]), 8 * torch.finfo(torch.float32).eps, autocast)
    for step in fast.steps.noted:
        literally.assert_step(step)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_replay_is_exact_under_bf16_autocast(name, scope, tmp_path):
    """Blocks that return what they returned before give bitwise the weights of whole second passes, with dropout."""
    results = []
    for replays in (True, False):
        trainer = LSAMTrainer(
            model=MODELS[name](dropout=0.1),
            args=arguments(tmp_path, bf16=True, gradient_accumulation_steps=2, per_device_train_batch_size=2),
            train_dataset=Examples(16, language_model=name == "llama"),
            lsam_config=LSAMConfig(rho=0.2, block_selection="last", num_perturbed_blocks=1, sharpness_scope=scope),
        )
        trainer.add_callback(Replays(trainer, replays))
        trainer.train()
        assert trainer._lsam.second_pass.replays == replays
        results.append(weights(trainer.model))
    assert_equal(*results)


# AdamW of torch 2.6 divides by zero in fp16.
@pytest.mark.parametrize(
    "options", [dict(bf16=True), dict(dtype=torch.bfloat16), dict(dtype=torch.float16, optim="sgd")]
)
def test_off_is_the_plain_trainer_bitwise(options, tmp_path):
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    results = []
    for kind, extra in ((Trainer, {}), (LSAMTrainer, dict(lsam_config=LSAMConfig(rho=0.0)))):
        trainer = kind(
            model=bert(dropout=0.1).to(dtype), args=arguments(tmp_path, **options), train_dataset=Examples(16), **extra
        )
        trainer.train()
        results.append(weights(trainer.model))
    assert_equal(*results)
