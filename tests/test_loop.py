"""`LSAM`: a loop without a Trainer does what the Trainer does."""

import functools
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from launching import launch
from ranks_loop import train as train_loop
from test_right import METHODS, STEPS, optimizer_for
from tiny import MODELS, Examples, arguments, assert_equal, bert, largest_difference, weights
from torch import nn
from transformers import BatchEncoding

import hf_lsam
from hf_lsam import LSAM, LSAMConfig, LSAMTrainer

SETTINGS = {name: settings for name, (settings, _) in METHODS.items()} | {
    "micro-batch": dict(rho=0.1, alpha=0.8, sharpness_scope="micro_batch"),
    "later": dict(rho=0.1, perturb_start=0.3, perturb_end=0.8),
}


class Noting(LSAMTrainer):
    """Notes the random state that it begins to train with: to make a loader's iterator draws from it."""

    random = None

    def training_step(self, *args, **kwargs):
        self.random = torch.get_rng_state() if self.random is None else self.random
        return super().training_step(*args, **kwargs)


def loop(model, optimizer, lsam, examples, steps, size=4, accumulation=1, begin=0, scaler=None):
    """Train as the README says; returns the losses."""
    model.train()
    losses = []
    for number in range(begin * accumulation, steps * accumulation):
        batch = examples.batch(number * size, size)
        is_last = number % accumulation == accumulation - 1
        losses.append(lsam.backward(lambda: model(**batch).loss / accumulation, is_last=is_last))  # noqa: B023
        if is_last:
            (optimizer if scaler is None else scaler).step(*[] if scaler is None else [optimizer])
            if scaler is not None:
                scaler.update()
            optimizer.zero_grad()
    return losses


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name, optimizer", [("bert", "adamw"), ("llama", "sgd")])
@pytest.mark.parametrize("method", list(SETTINGS))
def test_is_the_trainer_bit_for_bit(method, name, optimizer, accumulation, tmp_path):
    steps, size, config = 6, 2, LSAMConfig(**SETTINGS[method])
    examples = Examples(steps * size * accumulation, language_model=name == "llama")
    theirs, ours = MODELS[name](dropout=0.1), MODELS[name](dropout=0.1)
    start = weights(ours)
    options = dict(max_steps=steps, max_grad_norm=0.0, logging_steps=steps, per_device_train_batch_size=size)
    trainer = Noting(
        model=theirs,
        args=arguments(tmp_path, gradient_accumulation_steps=accumulation, **options),
        train_dataset=examples,
        lsam_config=config,
        optimizers=(optimizer_for(optimizer, theirs), None),
    )
    # A mean over each micro-batch, as the loop has it.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()

    torch.set_rng_state(trainer.random)
    our_optimizer = optimizer_for(optimizer, ours)
    lsam = LSAM(ours, our_optimizer, config, max_steps=steps)
    loop(ours, our_optimizer, lsam, examples, steps, size, accumulation)
    assert_equal(weights(ours), weights(theirs))
    assert largest_difference(weights(ours), start) > 1e-4
    [line] = [line for line in trainer.state.log_history if "loss" in line]
    assert lsam.step == steps
    assert not config.enabled or lsam.log() == {key: value for key, value in line.items() if key.startswith("lsam/")}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["sam", "top 1, mixed", "looksam", "one pass, top 2", "budget"])
def test_equals_the_reference(method):
    settings, literal = METHODS[method]
    examples = Examples(STEPS * 4)
    fast, slow = bert(), bert()
    fast_optimizer, slow_optimizer = optimizer_for("adamw", fast), optimizer_for("adamw", slow)
    loop(fast, fast_optimizer, LSAM(fast, fast_optimizer, LSAMConfig(**settings), STEPS), examples, STEPS)
    literal_step = literal(slow, "bert")
    slow.train()
    for step in range(STEPS):
        literal_step(slow, [examples.batch(step * 4, 4)], slow_optimizer)
    assert largest_difference(weights(fast), weights(slow)) < 1e-12


# Gradient scaler


class Overflowing(nn.Module):
    """A model whose loss is infinite in pass 1 or pass 2 of one step."""

    def __init__(self, model, step, second_pass):
        super().__init__()
        self.model, self.step, self.second_pass = model, step, second_pass
        self.lsam: LSAM | None = None

    def forward(self, **batch):
        outputs = self.model(**batch)
        if self.lsam.step == self.step and self.lsam.in_second_pass == self.second_pass:
            outputs["loss"] = outputs["loss"] * torch.inf
        return outputs


@pytest.mark.parametrize("config", [LSAMConfig(rho=0.1), LSAMConfig(rho=0.1, sharpness_scope="micro_batch")])
def test_a_scaler_of_a_power_of_two_changes_nothing(config):
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12)):
        model = bert()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        lsam = LSAM(model, optimizer, config, max_steps=5, scaler=scaler)
        losses = loop(model, optimizer, lsam, Examples(60), 5, accumulation=3, scaler=scaler)
        results.append(weights(model) | {"losses": torch.stack(losses)})
    assert_equal(*results)


@pytest.mark.parametrize("second_pass", [False, True])
def test_a_scaler_skips_a_step_of_either_pass_that_overflows(second_pass):
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    wrapped = Overflowing(model, 2, second_pass)
    lsam = wrapped.lsam = LSAM(wrapped, optimizer, LSAMConfig(rho=0.1), max_steps=4, scaler=scaler)
    examples = Examples(16)
    loop(wrapped, optimizer, lsam, examples, 2, scaler=scaler)
    before = weights(model)
    loop(wrapped, optimizer, lsam, examples, 3, begin=2, scaler=scaler)
    assert_equal(weights(model), before)
    assert scaler.get_scale() == 2.0**11 and lsam.log()["lsam/skipped"] == 1
    loop(wrapped, optimizer, lsam, examples, 4, begin=3, scaler=scaler)
    assert largest_difference(weights(model), before) > 1e-4 and lsam.log()["lsam/active"] == 1


@pytest.mark.parametrize("accumulation", [1, 3])
def test_autocast_around_the_call_is_autocast_within(accumulation):
    """Autocast keeps the rounded weights until its end: those of pass 1 are not those of pass 2."""
    within, around = torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", torch.bfloat16)
    results = []
    for inner, outer in ((within, nullcontext()), (nullcontext(), around)):
        model = bert().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        lsam = LSAM(model, optimizer, LSAMConfig(rho=1.0), max_steps=3)
        wrapped = Within(model, inner)
        with outer:
            loop(wrapped, optimizer, lsam, Examples(12 * accumulation), 3, accumulation=accumulation)
        results.append(weights(model))
    assert_equal(*results)


class Within(nn.Module):
    """A model that is called within a context."""

    def __init__(self, model, context):
        super().__init__()
        self.model, self.context = model, context

    def forward(self, **batch):
        with self.context:
            return self.model(**batch)


# Processes

CASES = {
    "top 2": {"config": dict(rho=0.1, alpha=0.8)},
    "micro-batch": {"config": dict(rho=0.1, sharpness_scope="micro_batch", block_selection="last")},
    "one pass": {"config": dict(rho=0.1, ascent_gradient="previous")},
    "looksam": {"config": dict(rho=0.1, block_selection="all", perturb_interval=2, reuse_correction=0.7)},
    "fault": {"config": dict(rho=0.1), "fails_in": 1},
    "views": {"config": dict(rho=0.1), "ddp": {"gradient_as_bucket_view": True}},
    # The last ones: an Accelerator stays.
    "accelerate": {"config": dict(rho=0.1, alpha=0.8), "accelerate": True},
    "accelerate, one pass": {"config": dict(rho=0.1, ascent_gradient="previous"), "accelerate": True},
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What two processes leave of each case."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "cases.json").write_text(json.dumps(CASES))
    launch(str(Path(__file__).parent / "ranks_loop.py"), folder)
    return folder


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_with_all_of_the_batch(name, launched):
    one, two = (torch.load(launched / f"{name}.{rank}.pt", weights_only=True) for rank in range(2))
    assert_equal(one["weights"], two["weights"])
    assert one["step"] == 4 and one["log"]["lsam/active"] >= 0.5 and one["log"]["lsam/skipped"] == 0
    # Buffers are sent before the first pass of a step, as ever.
    assert two["calls_left"] == 0 and one["buffers_sent"] == [False] * (1 if name == "micro-batch" else 4)
    # Until the last micro-batch each has gradients of its own.
    unsynced = [(left, right) for left, right in zip(one["unsynced"], two["unsynced"], strict=True) if left]
    assert len(unsynced) == 8 and all(left != right for left, right in unsynced)
    if name != "micro-batch":
        case = {"config": CASES[name]["config"]}
        assert largest_difference(one["weights"], train_loop(case)["weights"]) < 1e-12


@pytest.mark.usefixtures("float64")
def test_micro_batches_of_two_processes_are_those_of_one(launched):
    """Six micro-batches of two rows in one process are three in each of two."""
    config = LSAMConfig(**CASES["micro-batch"]["config"])
    examples, model = Examples(48), bert().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    lsam = LSAM(model, optimizer, config, max_steps=4)
    loop(model, optimizer, lsam, examples, 4, size=2, accumulation=6)
    two = torch.load(launched / "micro-batch.0.pt", weights_only=True)
    assert largest_difference(weights(model), two["weights"]) < 1e-12


def test_processes_that_would_train_alone_and_static_graphs_are_refused(launched):
    told = json.loads((launched / "refusals.1.json").read_text())
    assert told["alone"].startswith("2 processes run, and each would train alone. Give LSAM the model that")
    assert told["static"].startswith("static_graph=True expects the same work in each pass")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("config", [dict(rho=0.1), dict(rho=0.1, ascent_gradient="previous"), dict(rho=0)])
def test_accelerate_changes_nothing(config, monkeypatch):
    # What Trainers of other tests have left in this process: precision, compilation.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    ours, plain = train_loop({"config": config, "accelerate": True}), train_loop({"config": config})
    assert_equal(ours["weights"], plain["weights"])
    assert ours["log"] == plain["log"] and ours["step"] == plain["step"] == 4


# Resuming


@pytest.mark.parametrize("method", ["top 2", "looksam", "one pass, top 2", "none"])
def test_a_resumed_loop_is_the_uninterrupted_one(method, tmp_path):
    config, examples = LSAMConfig(**SETTINGS[method]), Examples(64)

    def make():
        model = bert(dropout=0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return model, optimizer, LSAM(model, optimizer, config, max_steps=8)

    model, optimizer, lsam = make()
    torch.manual_seed(0)
    loop(model, optimizer, lsam, examples, 5, size=2, accumulation=4)
    lsam.save(str(tmp_path))
    kept = weights(model)
    kept_optimizer, random = optimizer.state_dict(), torch.get_rng_state()
    torch.save(kept_optimizer, tmp_path / "optimizer.pt")
    loop(model, optimizer, lsam, examples, 8, size=2, accumulation=4, begin=5)

    other, other_optimizer, resumed = make()
    other.load_state_dict(kept)
    other_optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    torch.set_rng_state(random)
    resumed.load(str(tmp_path))
    assert resumed.step == 5
    loop(other, other_optimizer, resumed, examples, 8, size=2, accumulation=4, begin=5)
    assert_equal(weights(other), weights(model))
    assert resumed.log() == lsam.log() and resumed.step == 8


def test_a_loop_that_goes_on_after_max_steps_is_told_so_once(caplog):
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    lsam = LSAM(model, optimizer, LSAMConfig(rho=0.1), max_steps=2)
    loop(model, optimizer, lsam, Examples(16), 2)
    assert "max_steps" not in caplog.text
    loop(model, optimizer, lsam, Examples(16), 4, begin=2)
    assert caplog.text.count("has run the max_steps=2 optimizer steps that LSAM was told of") == 1
    assert lsam.log()["lsam/active"] == 0.5


def test_log_begins_anew():
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    lsam = LSAM(model, optimizer, LSAMConfig(rho=0.1, perturb_end=0.5), max_steps=4)
    loop(model, optimizer, lsam, Examples(16), 2)
    assert lsam.log()["lsam/active"] == 1
    loop(model, optimizer, lsam, Examples(16), 4, begin=2)
    assert lsam.log() == {"lsam/overhead": 0, "lsam/active": 0, "lsam/skipped": 0}


def test_what_is_off_is_plain_and_needs_no_blocks():
    results = []
    for config in (None, LSAMConfig(rho=0), LSAMConfig(block_selection="none"), LSAMConfig(alpha=0)):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lsam = LSAM(model, optimizer, config, max_steps=3) if config else None
        for _ in range(3):
            rows = torch.randn(4, 3)
            if lsam is None:
                model(rows).square().mean().backward()
            else:
                lsam.backward(lambda: model(rows).square().mean())  # noqa: B023
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(model))
    for result in results[1:]:
        assert_equal(result, results[0])


# What compute_loss does


def after(make_loss, batch_of=dict, steps=6):
    """Weights after some steps whose losses `make_loss(model, batch, lsam)` computes, three micro-batches each."""
    examples, model = Examples(steps * 12), bert(dropout=0.1).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    lsam = LSAM(model, optimizer, LSAMConfig(rho=0.1), max_steps=steps)
    torch.manual_seed(0)
    for number in range(steps * 3):
        compute_loss = make_loss(model, batch_of(examples.batch(number * 4, 4)), lsam)
        lsam.backward(compute_loss, is_last=number % 3 == 2)
        if number % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    return weights(model), lsam


def plainly(model, batch, lsam):
    return lambda: model(**batch).loss


def popping(model, batch, lsam):
    def compute_loss():
        labels = batch.pop("labels")
        batch["input_ids"].sub_(1)
        return nn.functional.cross_entropy(model(**batch).logits, labels)

    return compute_loss


def popping_a_default(model, batch, lsam):
    """What linters ask for in a loop."""
    return lambda batch=batch: nn.functional.cross_entropy(model(batch["input_ids"]).logits, batch.pop("labels"))


def without_attention_mask(model, batch, lsam):
    return lambda: model(batch["input_ids"], labels=batch["labels"]).loss


def without_popping(model, batch, lsam):
    batch["input_ids"].sub_(1)
    return plainly(model, batch, lsam)


@pytest.mark.parametrize("batch_of", [dict, BatchEncoding])
def test_labels_may_be_popped_and_batches_changed(batch_of):
    (popped, lsam), (plain, _) = after(popping, batch_of), after(without_popping)
    assert_equal(popped, plain)
    assert lsam.log()["lsam/skipped"] == 0


def test_a_batch_may_be_a_default():
    (popped, lsam), (plain, _) = after(popping_a_default), after(without_attention_mask)
    assert_equal(popped, plain)
    assert lsam.log()["lsam/skipped"] == 0


def test_what_a_loss_counts_counts_once():
    counts, meter = [], SimpleNamespace(seen=0)

    def counting(model, batch, lsam):
        def compute_loss(extra):
            counts.append(lsam.in_second_pass)
            meter.seen += extra
            return model(**batch).loss * (1 + meter.seen / 100)

        return functools.partial(compute_loss, 2)

    after(counting)
    assert counts == [False] * 18 and meter.seen == 36


SCRIPT = """
scale = 0.0

def forward():
    global scale
    scale += 0.01
    return model(labels=batch.pop('labels'), **batch).loss * (1 + scale)

lsam = LSAM(model, optimizer, LSAMConfig(rho=0.1), max_steps=4)
for number in range(12):
    batch = examples.batch(number * 4, 4)
    lsam.backward(lambda: forward(), is_last=number % 3 == 2)
    if number % 3 == 2:
        optimizer.step()
        optimizer.zero_grad()
"""


def test_variables_of_a_script_are_those_of_pass_1():
    """Pass 2 of the first micro-batch runs when `batch` is the third one; a function's variables are as a script's."""
    results = []
    for script in (
        SCRIPT,
        "def main():\n" + SCRIPT.replace("\n", "\n    ").replace("global", "nonlocal") + "\nmain()",
    ):
        model = bert().train()
        names = dict(LSAM=LSAM, LSAMConfig=LSAMConfig, model=model, examples=Examples(48))
        names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.05)
        exec(script, names)
        results.append(weights(model))
        assert script is not SCRIPT or names["scale"] == pytest.approx(0.12)
    assert_equal(*results)
    plain, scales = bert().train(), iter(range(1, 13))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    lsam = LSAM(plain, optimizer, LSAMConfig(rho=0.1), max_steps=4)
    for number in range(12):
        batch, scale = Examples(48).batch(number * 4, 4), next(scales)
        loss = functools.partial(lambda batch, scale: plain(**batch).loss * (1 + 0.01 * scale), batch, scale)
        lsam.backward(loss, is_last=number % 3 == 2)
        if number % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert largest_difference(results[0], weights(plain)) < 1e-6


def test_an_error_in_pass_2_leaves_the_plain_gradient():
    def failing(model, batch, lsam):
        def compute_loss():
            if lsam.in_second_pass:
                raise ValueError("a test's own")
            return model(**batch).loss

        return compute_loss

    failed, lsam = after(failing)
    assert lsam.log()["lsam/skipped"] == 6 and not lsam.in_second_pass

    def plain_loop(model, batch, lsam):
        vars(lsam)["_lsam"].config = LSAMConfig(rho=0)
        return plainly(model, batch, lsam)

    plain, _ = after(plain_loop)
    assert_equal(failed, plain)


def test_an_error_in_pass_1_is_the_callers_and_the_step_can_be_taken_again():
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    lsam = LSAM(model, optimizer, LSAMConfig(rho=0.1), max_steps=2)
    before = weights(model)
    with pytest.raises(ZeroDivisionError):
        lsam.backward(lambda: torch.tensor(1 / 0))
    assert lsam.step == 0
    assert_equal(weights(model), before)
    loop(model, optimizer, lsam, Examples(8), 2)
    assert lsam.step == 2 and lsam.log()["lsam/perturbation_norm"] == pytest.approx(0.1)


# What is refused


def hooked():
    model = bert()
    model.classifier.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


FullyShardedDataParallel = type("FullyShardedDataParallel", (nn.Sequential,), {})


@pytest.mark.parametrize(
    "make, config, options, error, message",
    [
        (lambda: nn.Linear(2, 2), {}, {}, ValueError, "None of the 0 blocks of Linear can be trained"),
        (bert, dict(block_pattern="nothing"), {}, ValueError, "block_pattern 'nothing' matches no module"),
        (lambda: nn.DataParallel(bert()), {}, {}, NotImplementedError, "DataParallel is not supported by LSAM"),
        (lambda: FullyShardedDataParallel(bert()), {}, {}, NotImplementedError, "FullyShardedDataParallel is not"),
        (hooked, {}, {}, NotImplementedError, "classifier.weight has hooks"),
        (
            bert,
            {},
            dict(accelerator=SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, scaler=None)),
            NotImplementedError,
            "DEEPSPEED is not supported by LSAM, .* LSAMTrainer runs under .* DeepSpeed ZeRO 1 and 2",
        ),
        (
            bert,
            {},
            dict(accelerator=SimpleNamespace(distributed_type=DistributedType.FSDP, scaler=None)),
            NotImplementedError,
            "FSDP is not supported by LSAM, .* LSAMTrainer runs under FSDP2",
        ),
        (
            bert,
            {},
            dict(accelerator=SimpleNamespace(scaler=None), scaler=torch.amp.GradScaler("cpu")),
            ValueError,
            "An accelerator scales the loss by a scaler of its own",
        ),
    ],
)
def test_is_refused_when_it_is_made(make, config, options, error, message):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(error, match=message):
        LSAM(model, optimizer, LSAMConfig(**config), 1, **options)


# The page

PAGE = (Path(__file__).parents[1] / "docs" / "features.md").read_text()


def test_the_loops_of_the_page_run():
    """Each on what the one before has left."""
    model = bert().train()
    names = dict(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), epochs=1, max_steps=8)
    names |= dict(loader=[Examples(32).batch(4 * number, 4) for number in range(8)], torch=torch)
    snippets = re.findall(r"```python\n(.*?)```", PAGE.split("## A loop without a Trainer")[1], re.DOTALL)
    assert len(snippets) == 4
    for snippet in snippets[:3]:
        before = weights(model)
        if "lsam" in names:
            names["lsam"].step = 0
        exec(snippet.replace("GradScaler()", 'GradScaler("cpu")').replace('"cuda", torch.float16', '"cpu"'), names)
        assert largest_difference(weights(model), before) > 1e-5
        assert names["lsam"].log()["lsam/active"] == 1 and names["lsam"].step in (8, 2, 1)
    names["accelerator"] = Accelerator(cpu=True)
    before = weights(model)
    exec(snippets[3], names)
    assert largest_difference(weights(model), before) > 1e-5 and names["lsam"].step == 8


# Types

USER = """
import torch
from hf_lsam import LSAM, LSAMConfig

def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]) -> dict[str, float]:
    lsam = LSAM(model, optimizer, LSAMConfig(rho=0.1), max_steps=len(batches))
    for batch in batches:
        loss = lsam.backward(lambda: model(batch).mean(), is_last=True)
        print(float(loss), lsam.step, lsam.in_second_pass)
    lsam.save("out")
    wrong: int = lsam.log()
    lsam.backward(batches[0], last=True)
    LSAM(model, optimizer)
    return lsam.log()
"""


def test_mypy_is_strict_on_the_file_of_a_user(tmp_path):
    others = "".join(
        f"[mypy-{name}.*]\nfollow_imports = skip\nignore_missing_imports = true\n"
        for name in ("torch", "transformers", "accelerate", "numpy", "safetensors")
    )
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n{others}[mypy-hf_lsam.*]\nfollow_imports = silent\n")
    (tmp_path / "user.py").write_text(USER)
    root = str(Path(hf_lsam.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "user.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"MYPYPATH": root, "PATH": "", "PYTHONPATH": ""},
    )
    found = re.findall(r"^user.py:(\d+): error: .*\[([\w-]+)\]$", result.stdout, re.MULTILINE)
    assert found == [("11", "assignment"), ("12", "call-arg"), ("13", "call-arg")], result.stdout + result.stderr
