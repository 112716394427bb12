"""What a user sees of the method: figures for each log line, and rows of figures for each block."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

BLOCKS_FILE = "lsam_blocks.jsonl"

# A run is stuck if the losses of this share of the training, and of so many log lines with perturbed steps, stay
# within this distance of the first. (A fresh classifier's is log(classes), and noise moves it by less than that.)
_STUCK_SHARE, _STUCK_LINES, _STUCK_DISTANCE = 0.25, 5, 0.02
# Perturbations that wait to be summed up: a run that logs nothing would keep them all.
_MOST_PENDING = 256


@dataclass(frozen=True)
class Perturbed:
    """One perturbation."""

    applied: Tensor  # whether its gradient was finite and used: one boolean, on the device
    chosen: Sequence[int]  # indices of the perturbed candidates
    squares: Tensor  # squared gradient norm of each weight, candidate by candidate
    counts: Sequence[int]  # how many of these weights each candidate has
    length: float | Tensor  # how far the weights were moved
    first_block: int  # index of the first model block that held a perturbed weight
    overhead: float  # predicted cost of its pass 2, in plain steps


@dataclass
class StepLog:
    """Sums since the last log line."""

    names: Sequence[str]  # of the candidates
    trained: Sequence[str]  # those that were trained when the run began; the others are told of once they are
    steps: int = 0
    chances: int = 0  # steps, or micro-batches of scope `micro_batch`, that could have been perturbed
    perturbed: int = 0  # those that were
    skipped: int = 0  # those without anything to climb, or without a finite gradient in pass 2
    sums: dict[str, float] = field(default_factory=dict)  # of the figures of the log line
    counts: dict[str, float] = field(default_factory=dict)  # how often each candidate was selected
    norms: dict[str, float] = field(default_factory=dict)  # of each candidate's gradient, summed up
    pending: list[Perturbed] = field(default_factory=list)  # not summed up yet

    def add(self, perturbation: Perturbed) -> None:
        """Note a perturbation. Whether it was applied may still be on its way from the device: nobody waits for it."""
        if len(self.pending) == _MOST_PENDING:
            self.settle()
        self.pending.append(perturbation)

    def skip(self, reason: str) -> None:
        """Note a step, or micro-batch, that was not perturbed, and tell why, each reason once."""
        self.skipped += 1
        what = f"A step is plain where it was to be perturbed: {reason}"
        logger.warning_once(f"{what}. Steps of this kind are counted in lsam/skipped.")

    def settle(self) -> None:
        """Sum up what was noted: one wait for the device a log line, or where lines are far between, a few."""
        # Settings that change in the middle of a run may leave some of these on the device, and some on the host.
        applied = torch.stack([one.applied.cpu() for one in self.pending]).tolist() if self.pending else []
        for perturbation, was_applied in zip(self.pending, applied, strict=True):
            if was_applied:
                self._sum_up(perturbation)
            else:
                self.skip("the gradient at the perturbed weights was not finite (try a smaller rho), or pass 2 failed")
        self.pending.clear()

    def _sum_up(self, one: Perturbed) -> None:
        parts = np.split(one.squares.cpu().numpy(), np.cumsum(one.counts)[:-1])
        squares = {name: float(part.sum()) for name, part in zip(self.names, parts, strict=True)}
        chosen, total = [self.names[index] for index in one.chosen], sum(squares.values())
        self.perturbed += 1
        figures = {
            "grad_norm": total**0.5,
            "captured": sum(squares[name] for name in chosen) / total,
            "perturbation_norm": float(one.length),
            "first_block": float(one.first_block),
            "overhead": one.overhead,
        }
        norms = {name: square**0.5 for name, square in squares.items()}
        for sums, values in ((self.sums, figures), (self.counts, dict.fromkeys(chosen, 1)), (self.norms, norms)):
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value

    def line(self) -> dict[str, float]:
        """The figures of the log line: means over perturbed steps, if there are any, but `lsam/overhead` over all."""
        self.settle()
        chances = max(self.chances, 1)
        line = {f"lsam/{name}": value / self.perturbed for name, value in self.sums.items()}
        overhead, active = self.sums.get("overhead", 0.0) / chances, self.perturbed / chances
        return line | {"lsam/overhead": overhead, "lsam/active": active, "lsam/skipped": self.skipped}

    def row(self, step: int, epoch: float) -> dict[str, Any]:
        """The row of `lsam_blocks.jsonl`: how often each block was selected, and its mean gradient norm."""
        self.settle()
        names = [name for name in self.names if name in self.trained or self.norms.get(name)]
        row = dict(step=step, epoch=epoch, steps=self.steps, perturbed=self.perturbed, skipped=self.skipped)
        counts = {name: self.counts.get(name, 0) for name in names}
        norms = {name: self.norms[name] / self.perturbed for name in names if name in self.norms}
        return row | dict(counts=counts, norms=norms)

    def copy(self) -> "StepLog":
        """These sums, to which nothing is added any more."""
        sums, counts, norms = dict(self.sums), dict(self.counts), dict(self.norms)
        return replace(self, sums=sums, counts=counts, norms=norms, pending=list(self.pending))

    def state(self) -> dict[str, Any]:
        """The sums, for a checkpoint between two log lines."""
        self.settle()
        return {key: value for key, value in vars(self).items() if key not in ("names", "trained", "pending")}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `state()`."""
        vars(self).update(state)


def append_row(output_dir: str, row: dict[str, Any]) -> None:
    """Add `row` to the blocks file of `output_dir`; training goes on where it cannot be written, with a warning."""
    path = Path(output_dir) / BLOCKS_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        logger.warning_once(f"{path} cannot be written ({error}), so it lacks rows. Training goes on without them.")


def drop_rows_after(output_dir: str, step: int) -> None:
    """Drop the rows past `step`: a run that starts anew, or from a checkpoint, writes them again."""
    path = Path(output_dir) / BLOCKS_FILE
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            logger.warning(f"Dropped an unreadable row of {path}: {line[:80]!r}")
    draft = path.with_suffix(".draft")
    draft.write_text("".join(kept), encoding="utf-8")
    draft.replace(path)


@dataclass
class StuckWatch:
    """Warns once if the loss stays at its initial value (of the first log line) while steps are perturbed."""

    first_loss: float | None = None
    lines: int = 0
    done: bool = False

    def see(self, loss: float, perturbed: int, step: int, max_steps: int) -> None:
        """A log line's mean loss, with the number of perturbed steps in it, at `step` of `max_steps`."""
        if self.done:
            return
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.lines += perturbed > 0
        if abs(loss - self.first_loss) > _STUCK_DISTANCE * abs(self.first_loss):
            self.done = True
        elif perturbed > 0 and self.lines >= _STUCK_LINES and step >= _STUCK_SHARE * max_steps:
            self.done = True
            logger.warning(
                f"The loss has stayed at its initial value ({self.first_loss:.4g}) for {step} steps while the weights "
                "were perturbed, which may hold it there. Begin with plain steps (perturb_start=0.15), or lower rho."
            )
