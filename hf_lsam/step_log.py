"""What is logged: a line at the start, figures in each log line, and a row of figures for each block."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import get_logger

from .blocks import Candidate
from .config import LSAMConfig
from .costs import CostModel
from .selection import predicted_overheads, sums_of

logger = get_logger(__name__)

BLOCKS_FILE = "lsam_blocks.jsonl"

# A run is stuck if the losses of this share of the training, and of this many log lines with perturbed steps, stay
# within this distance of the first (that of a new classifier is log(classes), and noise moves it by less).
_STUCK_SHARE, _STUCK_LINES, _STUCK_DISTANCE = 0.25, 5, 0.02
_MOST_PENDING = 256  # perturbations that are not summed up yet, for a run that logs nothing

# In a script that does not configure logging, Python prints warnings only; this prints level info, too, to stderr.
_console, _package = logging.StreamHandler(), logging.getLogger("hf_lsam")
_console.addFilter(lambda record: not logging.root.handlers)
_console.setFormatter(logging.Formatter("\n%(message)s"))  # the current line may hold a progress bar
_package.addHandler(_console)
_package.setLevel(_package.level or logging.INFO)


def announce(config: LSAMConfig, candidates: Sequence[Candidate], costs: CostModel, max_steps: int) -> None:
    """Log what is perturbed, at which steps (counted from 1), and at what predicted cost; warn if no step is."""
    steps, is_one_pass = config.perturbed_steps(max_steps), config.ascent_gradient == "previous"
    if is_one_pass and 0 in steps:
        steps = steps[1:]  # the first step has no previous gradient
    least, most = predicted_overheads(config, candidates, costs)
    counts = {len(steps)}
    if config.is_priced:
        counts = {min(int(config.budget * max_steps / one + 1e-9), len(steps)) for one in (least, most)}
    if counts == {0}:
        logger.warning(
            f"No step of the {max_steps} of this run is perturbed with perturb_start={config.perturb_start}, "
            f"perturb_end={config.perturb_end}, perturb_interval={config.perturb_interval}, ascent_gradient="
            f"{config.ascent_gradient!r} and max_overhead={config.max_overhead}. Change these settings, or train "
            "longer."
        )
        return
    trained = [candidate for candidate in candidates if candidate.is_trained] or list(candidates)
    count = min(config.num_perturbed_blocks or len(trained), len(trained))
    among = f"{len(trained)} {'blocks' if config.block_pattern is None else 'modules of block_pattern'}"
    cost, ends = f"{most:.2f}", [most]
    if config.block_selection == "all":
        what = "all trainable parameters"
    elif config.block_selection == "budget":
        what, cost = f"up to {count} of {among}", f"at most {most:.2f}"
    elif count == len(trained):
        what = f"all {among}"
    elif config.block_selection == "last":
        what = f"the last {count} of {among}"
    else:
        what = f"the {count} of {among} with the largest gradient norm"
        cost, ends = f"{least:.2f} (last {count}) to {most:.2f} (first {count})", [least, most]
    cost += " of a plain step"
    if len(steps) < max_steps and not config.is_priced:
        averages = [f"{one * len(steps) / max_steps:.2f}" for one in ends]
        cost += f", and {' to '.join(averages)} on average"
    pays = f", of which max_overhead={config.budget:g} pays for {' to '.join(map(str, sorted(counts)))}"
    price = pays if config.is_priced else ""
    extra = f"Predicted cost of pass 2: {cost}" if not is_one_pass else "There is no second pass"
    interval = f" (1 in {config.perturb_interval})" if config.perturb_interval > 1 else ""
    scope = "each micro-batch of " if config.sharpness_scope == "micro_batch" else ""
    logger.info(
        f"LSAM perturbs {what} with rho={config.rho:g}, alpha={config.alpha:g}{', adaptive' * config.adaptive}, at "
        f"{scope}steps {steps[0] + 1} to {steps[-1] + 1} of {max_steps}{interval}{price}. {extra}."
    )


@dataclass(frozen=True)
class Perturbed:
    """One perturbation."""

    applied: Tensor  # whether its gradient was finite and used: a boolean scalar on the device
    chosen: Sequence[int]  # indices of the perturbed candidates
    squares: Tensor  # squared gradient norm of each weight, candidate by candidate
    counts: Sequence[int]  # number of these weights in each candidate
    length: float | Tensor  # distance by which the weights were moved
    first_block: int  # index of the first block of the model with a perturbed weight
    overhead: float  # predicted cost of its pass 2, in plain steps


@dataclass
class StepLog:
    """Sums since the last log line."""

    names: Sequence[str]  # of the candidates
    trained: Sequence[str]  # those trained at the start; the others are logged once they have a gradient
    steps: int = 0
    chances: int = 0  # steps (micro-batches, with `sharpness_scope="micro_batch"`) that could have been perturbed
    perturbed: int = 0  # those that were perturbed
    skipped: int = 0  # those that should have been perturbed, but had no usable gradient
    sums: dict[str, float] = field(default_factory=dict)  # of the figures of the log line
    counts: dict[str, float] = field(default_factory=dict)  # number of selections of each candidate
    norms: dict[str, float] = field(default_factory=dict)  # sum of the gradient norms of each candidate
    pending: list[Perturbed] = field(default_factory=list)  # not summed up yet

    def add(self, perturbation: Perturbed) -> None:
        """Add a perturbation, without a synchronisation to learn whether it was applied."""
        if len(self.pending) == _MOST_PENDING:
            self.settle()
        self.pending.append(perturbation)

    def skip(self, reason: str) -> None:
        """Count a step (or micro-batch) that was not perturbed, and warn once for each reason."""
        self.skipped += 1
        logger.warning_once(f"A step was not perturbed: {reason}. Such steps are counted in lsam/skipped.")

    def settle(self) -> None:
        """Sum up the pending perturbations, with one host synchronisation."""
        # After a change of settings, some of these may be on the device, and others on the host.
        applied = torch.stack([one.applied.cpu() for one in self.pending]).tolist() if self.pending else []
        for perturbation, was_applied in zip(self.pending, applied, strict=True):
            if was_applied:
                self._sum_up(perturbation)
            else:
                self.skip("the gradient at the perturbed weights was not finite (try a smaller rho), or pass 2 failed")
        self.pending.clear()

    def _sum_up(self, one: Perturbed) -> None:
        squares = dict(zip(self.names, sums_of(one.squares.cpu().numpy(), one.counts), strict=True))
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
        """The figures of the log line: means over the perturbed steps; `lsam/overhead` is a mean over all steps."""
        self.settle()
        chances = max(self.chances, 1)
        line = {f"lsam/{name}": value / self.perturbed for name, value in self.sums.items()}
        overhead, active = self.sums.get("overhead", 0.0) / chances, self.perturbed / chances
        return line | {"lsam/overhead": overhead, "lsam/active": active, "lsam/skipped": self.skipped}

    def row(self, step: int, epoch: float) -> dict[str, Any]:
        """The row of `lsam_blocks.jsonl`: the number of selections and the mean gradient norm of each block."""
        self.settle()
        names = [name for name in self.names if name in self.trained or self.norms.get(name)]
        row = dict(step=step, epoch=epoch, steps=self.steps, perturbed=self.perturbed, skipped=self.skipped)
        counts = {name: self.counts.get(name, 0) for name in names}
        norms = {name: self.norms[name] / self.perturbed for name in names if name in self.norms}
        return row | dict(counts=counts, norms=norms)

    def copy(self) -> "StepLog":
        """A copy that does not change with this one."""
        sums, counts, norms = dict(self.sums), dict(self.counts), dict(self.norms)
        return replace(self, sums=sums, counts=counts, norms=norms, pending=list(self.pending))

    def state(self) -> dict[str, Any]:
        """The sums since the last log line, for a checkpoint."""
        self.settle()
        return {key: value for key, value in vars(self).items() if key not in ("names", "trained", "pending")}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from the `state()` of a checkpoint."""
        vars(self).update(state)


def append_row(output_dir: str, row: dict[str, Any]) -> None:
    """Add `row` to `lsam_blocks.jsonl` in `output_dir`; warn if it cannot be written."""
    path = Path(output_dir) / BLOCKS_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        logger.warning_once(f"{path} cannot be written ({error}). Training continues, and the file will lack rows.")


def drop_rows_after(output_dir: str, step: int) -> None:
    """Drop the rows after `step`, which a run that restarts or resumes writes again."""
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
    """Warns once if the loss stays at that of the first log line while steps are perturbed."""

    first_loss: float | None = None
    lines: int = 0
    done: bool = False

    def see(self, loss: float, perturbed: int, step: int, max_steps: int) -> None:
        """Check the mean `loss` of a log line with this many `perturbed` steps, at `step` of `max_steps`."""
        if self.done:
            return
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.lines += perturbed > 0
        if not abs(loss - self.first_loss) <= _STUCK_DISTANCE * abs(self.first_loss):  # also if it is NaN
            self.done = True
        elif perturbed > 0 and self.lines >= _STUCK_LINES and step >= _STUCK_SHARE * max_steps:
            self.done = True
            logger.warning(
                f"The loss has stayed at its initial value ({self.first_loss:.4g}) for {step} steps, possibly because "
                "the weights were perturbed. Begin with plain steps (perturb_start=0.15), or lower rho."
            )
