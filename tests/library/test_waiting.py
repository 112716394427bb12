"""A perturbed step waits for the device where it selects blocks by their norms, once, and nowhere else."""

import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import Examples, arguments, bert, largest_difference, weights
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

import hf_lsam
from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.ascent import Ascent

# `float(tensor)`, `bool(tensor)`, `.item()` and the like, and what asks for values to know what it returns.
READING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}
INDEXING = {"index", "index_put", "index_put_"}
PACKAGE, TORCH = (str(Path(module.__file__).parent) for module in (hf_lsam, torch))


class Waits:
    """
    Inside, the places that would wait for an accelerator, as this process does not: it has none.

    A mode sees the operators that read values. On a CPU, `.cpu()` and `.tolist()` call none, so another mode sees the
    methods themselves. What `.cpu()` returned is on the host, where nobody waits for it.
    """

    def __init__(self):
        self.places: list[str] = []
        self._on_host: list[torch.Tensor] = []
        waits = self

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                name = func.overloadpacket.__name__
                by_mask = name in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
                if name in READING or by_mask:
                    waits.note(args[0])
                return func(*args, **(kwargs or {}))

        class Methods(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if func is torch.Tensor.cpu:
                    waits.note(args[0])
                    # Another tensor, as on an accelerator.
                    waits._on_host.append(args[0].clone())
                    return waits._on_host[-1]
                if func in (torch.Tensor.tolist, torch.Tensor.numpy) and args[0].numel() > 0:
                    waits.note(args[0])
                return func(*args, **(kwargs or {}))

        self._modes = (Operators(), Methods())

    def note(self, tensor):
        frames, frame = [], sys._getframe(2)
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        own = [f for f in frames if f.f_code.co_filename.startswith(PACKAGE) and f.f_code.co_name != "train"]
        # What the model itself reads in its forward pass, as BERT does before transformers 5.0, it reads in each pass.
        is_models = any("/transformers/model" in f.f_code.co_filename for f in frames)
        if not is_models and not any(tensor is other for other in self._on_host):
            others = [f for f in frames if not f.f_code.co_filename.startswith(TORCH) and "__" not in f.f_code.co_name]
            self.places.append(" < ".join(map(told, own[:4] or others[:3])))

    def __enter__(self):
        self._stack = ExitStack()
        for mode in self._modes:
            self._stack.enter_context(mode)
        return self

    def __exit__(self, *error):
        self._stack.close()


@pytest.fixture
def accelerator(monkeypatch):
    """What takes another way on an accelerator, since values are not there, takes it here."""
    for module in ("ascent", "perturbation", "rounding"):
        monkeypatch.setattr(f"hf_lsam.{module}.on_host", lambda tensor: False)


def told(frame):
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


class Unmasked(Examples):
    """Without a mask, which the model would wait for in each pass to see whether it masks anything."""

    def __getitem__(self, index):
        return {key: value for key, value in super().__getitem__(index).items() if key != "attention_mask"}


class Steps(TrainerCallback):
    """The places of each step; a lock tells that no pass changes what is kept here, so that nobody looks into it."""

    def __init__(self, waits):
        self.lock = threading.Lock()
        self.waits, self.places = waits, []

    def on_step_end(self, args, state, control, **kwargs):
        self.places.append(list(self.waits.places))
        self.waits.places.clear()


def places_of_steps(kind, folder, accumulation, **extra):
    with Waits() as waits:
        steps = Steps(waits)
        options = dict(max_steps=12, gradient_accumulation_steps=accumulation, logging_steps=100)
        # Several epochs would look for the last batch of each.
        examples = Unmasked(4 * 12 * accumulation)
        trainer = kind(
            model=bert(dropout=0.1),
            args=arguments(folder, **options),
            train_dataset=examples,
            callbacks=[steps],
            **extra,
        )
        trainer.train()
    assert len(steps.places) == 12
    # Steps 1, 2, 4 and 8 look at everything and are compared; the last one leaves nothing for a next one to climb.
    return steps.places[8:11]


METHODS = {
    # It lets go of the gradient of pass 1, and waits where the Trainer does so next.
    "all": (dict(block_selection="all"), 1),
    "all, mixed": (dict(block_selection="all", alpha=0.6), 0),
    "last 2": (dict(block_selection="last"), 0),
    "last 2, mixed": (dict(block_selection="last", alpha=0.6), 0),
    "one pass of all": (dict(ascent_gradient="previous", block_selection="all"), 0),
    "one pass of the last 2": (dict(ascent_gradient="previous", block_selection="last"), 0),
    "one pass of the top 2": (dict(ascent_gradient="previous"), 1),
    "top 2": ({}, 1),
    "top 2, mixed": (dict(alpha=0.6), 1),
    "budget": (dict(block_selection="budget", max_overhead=0.5), 1),
}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("method", list(METHODS))
def test_a_perturbed_step_waits_for_the_norms_alone_if_at_all(method, accumulation, accelerator, tmp_path):
    settings, expected = METHODS[method]
    plain = places_of_steps(Trainer, tmp_path, accumulation)
    own = places_of_steps(LSAMTrainer, tmp_path, accumulation, lsam_config=LSAMConfig(**settings))
    for places, plain_places in zip(own, plain, strict=True):
        extra = [place for place in places if place not in plain_places]
        assert len(places) - len(plain_places) == expected, extra


def test_a_norm_that_is_zero_or_not_finite_moves_nothing():
    """No host reads it."""
    for norm in (0.0, float("nan"), float("inf")):
        ascent = Ascent([0], torch.ones(1), [1], torch.tensor(norm, dtype=torch.float64), [], [], [])
        assert float(ascent.scale(0.05)) == 0
    assert float(replace(ascent, norm=torch.tensor(0.5)).scale(0.05)) == pytest.approx(0.1)


@pytest.mark.parametrize("method", ["all", "all, mixed", "last 2", "one pass of all", "top 2"])
def test_an_accelerators_way_gives_the_same_weights(method, float64, request, tmp_path):
    results = []
    for _ in range(2):
        options = dict(max_steps=4, logging_steps=2)
        config = LSAMConfig(rho=0.5, **METHODS[method][0])
        trainer = LSAMTrainer(bert(), arguments(tmp_path, **options), train_dataset=Examples(16), lsam_config=config)
        trainer.train()
        results.append((weights(trainer.model), [line.get("lsam/grad_norm") for line in trainer.state.log_history]))
        request.getfixturevalue("accelerator")
    assert largest_difference(results[0][0], results[1][0]) < 1e-12
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize(
    ("read", "count"),
    [
        (lambda t: t.sum().item(), 1),
        (lambda t: float(t.sum()), 1),
        (lambda t: bool(t.any()), 1),
        (lambda t: int(t[0]), 1),
        (lambda t: t.tolist(), 1),
        (lambda t: t.numpy(), 1),
        (lambda t: t[0].tolist(), 1),
        (lambda t: t.cpu().numpy(), 1),
        (lambda t: t.cpu().tolist(), 1),
        (lambda t: float(t[:1].cpu()), 1),
        (lambda t: (t.cpu(), float(t[0])), 2),
        (lambda t: torch.equal(t, t + 1), 1),
        (lambda t: t[t > 1], 1),
        (lambda t: (t + 1).sum().sqrt(), 0),
        (lambda t: torch.where(t.any(), t, -t), 0),
    ],
)
def test_every_way_to_read_a_tensor_is_counted(read, count):
    tensor = torch.arange(3.0)
    with Waits() as waits:
        read(tensor)
    assert len(waits.places) == count and all("test_waiting.py" in place for place in waits.places)


@pytest.mark.parametrize("method", ["all", "last 2", "one pass of all", "one pass of the last 2"])
def test_a_gradient_of_zero_is_no_perturbation_though_no_host_sees_it(method, accelerator, tmp_path):
    class Nothing(LSAMTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * 0

    config = LSAMConfig(**METHODS[method][0])
    trainer = Nothing(
        bert(), arguments(tmp_path, max_steps=3, logging_steps=3), train_dataset=Examples(12), lsam_config=config
    )
    before = weights(trainer.model)
    trainer.train()
    line = trainer.state.log_history[0]
    # One pass has nothing to climb in the first step.
    assert line["lsam/active"] == 0 and line["lsam/skipped"] == (2 if method.startswith("one") else 3)
    assert largest_difference(before, weights(trainer.model)) == 0
