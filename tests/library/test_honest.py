"""Promise 9: what is reported is what happened."""

import collections

import pytest
import torch
from tiny import Examples, arguments, bert, block_rows, training_lines
from transformers import Trainer, TrainerCallback

from hf_lsam import LSAMConfig, LSAMMixin, LSAMTrainer

FIGURES = {"grad_norm", "captured", "perturbation_norm", "first_block", "overhead", "active", "skipped"}


def run(config, folder, trainer_class=LSAMTrainer, model=None, callbacks=(), **options):
    """Train; `config=None` is for a trainer that has none."""
    trainer = trainer_class(
        model=model or bert(dropout=0.1),
        args=arguments(folder, **{"max_steps": 6, "logging_steps": 2, **options}),
        train_dataset=Examples(24, language_model=hasattr(model, "lm_head")),
        eval_dataset=Examples(4),
        callbacks=list(callbacks),
        **({} if config is None else {"lsam_config": config}),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_the_loss_is_that_of_pass_1(scope, tmp_path):
    """At a learning rate of zero every loss is the plain one, unless pass 2 were in it."""
    options = dict(learning_rate=0.0, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    plain = run(None, tmp_path / "plain", Trainer, **options)
    lsam = run(LSAMConfig(rho=5.0, sharpness_scope=scope), tmp_path / "lsam", **options)
    assert [line["loss"] for line in training_lines(lsam)] == [line["loss"] for line in training_lines(plain)]


def test_the_loss_of_one_pass_is_that_at_the_perturbed_weights(tmp_path):
    options = dict(learning_rate=0.0, logging_steps=1, max_steps=3)
    plain = run(None, tmp_path / "plain", Trainer, **options)
    lsam = run(LSAMConfig(rho=5.0, ascent_gradient="previous"), tmp_path / "lsam", **options)
    pairs = list(zip(training_lines(lsam), training_lines(plain), strict=True))
    assert [left["loss"] == right["loss"] for left, right in pairs] == [True, False, False]
    assert [line["lsam/active"] for line in training_lines(lsam)] == [0, 1, 1]


def test_figures_of_a_log_line(tmp_path):
    config = LSAMConfig(rho=0.3, block_selection="last", num_perturbed_blocks=3)
    trainer = run(config, tmp_path, eval_strategy="steps", eval_steps=2)
    lines = training_lines(trainer)
    assert len(lines) == 3
    for line in lines:
        assert {key.removeprefix("lsam/") for key in line if key.startswith("lsam/")} == FIGURES
        assert line["lsam/perturbation_norm"] == pytest.approx(0.3)
        assert (line["lsam/first_block"], line["lsam/active"], line["lsam/skipped"]) == (1, 1, 0)
        assert 0 < line["lsam/captured"] < 1
        assert 0.5 < line["lsam/overhead"] < 0.8
    others = [line for line in trainer.state.log_history if "loss" not in line]
    assert others and not any(key.startswith("lsam/") for line in others for key in line)


def test_grad_norm_and_captured_are_those_of_the_plain_gradient(tmp_path):
    """Against norms taken by hand from the gradient of the first batch."""
    model = bert()
    loss = model.train()(**Examples(24).batch(0, 4)).loss
    loss.backward()
    squares = [
        sum(float(p.grad.double().square().sum()) for p in layer.parameters()) for layer in model.bert.encoder.layer
    ]
    trainer = run(LSAMConfig(rho=0.3), tmp_path, model=bert(), max_steps=1, logging_steps=1)
    line = training_lines(trainer)[0]
    assert line["lsam/grad_norm"] == pytest.approx(sum(squares) ** 0.5, rel=1e-5)
    assert line["lsam/captured"] == pytest.approx(sum(sorted(squares)[-2:]) / sum(squares), rel=1e-5)
    (row,) = block_rows(tmp_path)
    assert list(row["norms"].values()) == pytest.approx([square**0.5 for square in squares], rel=1e-5)
    assert list(row["counts"].values()) == [int(s in sorted(squares)[-2:]) for s in squares]


def test_adaptive_reports_how_far_it_moved(tmp_path):
    trainer = run(LSAMConfig(rho=0.3, adaptive=True), tmp_path, max_steps=1, logging_steps=1)
    assert 0 < training_lines(trainer)[0]["lsam/perturbation_norm"] < 0.3


def test_adaptive_in_one_pass_reports_what_two_passes_report_a_step_before(tmp_path):
    options = dict(max_steps=2, logging_steps=1, learning_rate=0.0)
    two, one = (
        training_lines(run(LSAMConfig(rho=0.3, adaptive=True, ascent_gradient=ascent), tmp_path, **options))
        for ascent in ("current", "previous")
    )
    assert one[1]["lsam/perturbation_norm"] == pytest.approx(two[0]["lsam/perturbation_norm"], rel=1e-5)


def test_interval_start_and_end_show_in_active_and_overhead(tmp_path):
    config = LSAMConfig(rho=0.3, block_selection="all", perturb_start=0.25, perturb_interval=2)
    trainer = run(config, tmp_path, max_steps=8, logging_steps=2)
    lines = training_lines(trainer)
    assert [line["lsam/active"] for line in lines] == [0, 0.5, 0.5, 0.5]
    assert [line["lsam/overhead"] for line in lines] == pytest.approx([0, 0.5, 0.5, 0.5])
    assert "lsam/captured" not in lines[0]


def test_rows_of_the_blocks_file(tmp_path):
    trainer = run(
        LSAMConfig(rho=0.3), tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=5
    )
    rows = block_rows(tmp_path)
    assert [row["step"] for row in rows] == [2, 4]
    names = [f"bert.encoder.layer.{index}" for index in range(4)]
    for row in rows:
        assert (row["steps"], row["perturbed"], row["skipped"]) == (2, 2, 0)
        assert list(row["counts"]) == list(row["norms"]) == names
        assert sum(row["counts"].values()) == 4
        assert all(norm > 0 for norm in row["norms"].values())
    # A run that starts anew writes the file anew.
    trainer.train()
    assert len(block_rows(tmp_path)) == 2


@pytest.mark.parametrize(
    "settings, factor",
    [
        (dict(block_selection="none"), 0),
        (dict(block_selection="all"), 1),
        (dict(block_selection="all", perturb_interval=2), 0.5),
        (dict(block_selection="last", sharpness_scope="micro_batch"), None),
        (dict(block_selection="last"), None),
        (dict(ascent_gradient="previous"), 0),
    ],
)
def test_flops_count_both_passes(settings, factor, tmp_path):
    options = dict(gradient_accumulation_steps=2, per_device_train_batch_size=2)
    plain = run(None, tmp_path / "plain", Trainer, **options)
    lsam = run(LSAMConfig(rho=0.1, **settings), tmp_path / "lsam", **options)
    if factor is None:
        factor = training_lines(lsam)[0]["lsam/overhead"]
        assert 0.5 < factor < 0.55
    # The passes that pass 2 is compared with do not count.
    expected = plain.state.total_flos * (1 + factor)
    assert lsam.state.total_flos == pytest.approx(expected, rel=1e-6)


def test_flops_are_those_of_each_batch(tmp_path):
    """The last batch of an epoch has 4 rows, the others 5."""
    options = dict(per_device_train_batch_size=5, max_steps=10)
    plain = run(None, tmp_path / "plain", Trainer, **options)
    lsam = run(LSAMConfig(rho=0.1, block_selection="all"), tmp_path / "lsam", **options)
    assert lsam.state.total_flos == pytest.approx(2 * plain.state.total_flos, rel=1e-6)


class Looks(TrainerCallback):
    """How often something goes through all modules of `model`, by the number of steps that are over."""

    def __init__(self, model, monkeypatch):
        self.counts, inner = collections.Counter(), torch.nn.Module.named_modules
        self.steps = 0

        def counted(module, *args, **kwargs):
            self.counts[self.steps] += module is model
            return inner(module, *args, **kwargs)

        monkeypatch.setattr(torch.nn.Module, "named_modules", counted)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps = state.global_step


@pytest.mark.parametrize("settings", [dict(), dict(block_selection="all"), dict(ascent_gradient="previous")])
def test_a_step_goes_through_the_modules_no_more_often_than_a_plain_one(settings, tmp_path, monkeypatch):
    """
    Each time takes about a millisecond, which is a block's share of a step where a GPU waits for launches.

    But for the 1st, 2nd, 4th, 8th, ... step, which look for what passes change.
    """
    counts = []
    for config in (LSAMConfig(block_selection="none"), LSAMConfig(**settings)):
        model = bert()
        with monkeypatch.context() as patch:
            looks = Looks(model, patch)
            run(config, tmp_path / str(len(counts)), model=model, max_steps=8, logging_steps=100, callbacks=[looks])
        counts.append(max(looks.counts[step] for step in (2, 4, 5, 6)))
    assert 0 < counts[1] <= counts[0]


class Counting(Trainer):
    """Counts tokens and keeps metrics in `compute_loss`, the way trl's trainers do, and pops its labels."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens_seen = 0
        self.metrics = {"train": collections.defaultdict(list)}
        self.history = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        self.tokens_seen += labels.numel()
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
        self.metrics["train"]["loss"].append(loss.item())
        self.history.append(loss.item())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs["mean"] = sum(self.metrics["train"]["loss"]) / len(self.metrics["train"]["loss"])
            self.metrics["train"].clear()
        super().log(logs, *args, **kwargs)


class LSAMCounting(LSAMMixin, Counting):
    pass


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_counters_of_a_subclass_count_once(scope, tmp_path):
    options = dict(learning_rate=0.0, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    counting = run(None, tmp_path / "plain", Counting, **options)
    lsam = run(LSAMConfig(rho=0.5, sharpness_scope=scope), tmp_path / "lsam", LSAMCounting, **options)
    assert lsam.tokens_seen == counting.tokens_seen == 24
    assert lsam.history == counting.history
    assert [line["mean"] for line in training_lines(lsam)] == [line["mean"] for line in training_lines(counting)]


def test_input_tokens_count_once(tmp_path):
    trainer = run(LSAMConfig(rho=0.3), tmp_path, include_num_input_tokens_seen="all")
    assert trainer.state.num_input_tokens_seen == 24 * 8
