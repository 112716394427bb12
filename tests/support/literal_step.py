"""A literal step in plain loops; every step of a run is held to it, from the weights and the states it began with."""

import copyreg
from collections import deque
from collections.abc import Iterable, Mapping
from copy import deepcopy
from random import Random
from types import SimpleNamespace

import numpy as np
import torch
from situations import ALL, BUDGET, LAST, TOP, Run, Situation, follow, put, tensors, told
from torch import nn

from hf_lsam import LSAMConfig

# By name: the settings (none of the plain Trainer), and micro-batches a step.
WAYS = {"plain": (None, 2), "last": (LAST, 1), "top_k, two": (TOP, 2), "all, two": (ALL, 2)}
MORE_WAYS = {**WAYS, "last, two": (LAST, 2), "top_k": (TOP, 1), "budget, two": (BUDGET, 2)}
LIMIT = 1e-9


class Literal:
    """
    A step in plain loops, from what it began with: every micro-batch's pass 2 begins with what its pass 1 began with.

    Args:
        situation: What the Trainer does.
        start: What the step began with.
        batches: Its micro-batches.
        step: Its number.
        scales: What the loss of each of them is multiplied by, where that is not their mean.
    """

    def __init__(self, situation: type[Situation], start: dict, batches: list, step: int, scales: list | None = None):
        self.model, self.holder = situation.new().train(), situation()
        put(self.model, start["model"])
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(name not in start["frozen"])
        vars(self.holder).update(deepcopy(start["kept"]), state=SimpleNamespace(global_step=step))
        self.holder.current_gradient_accumulation_steps = len(batches)
        self.holder.attach(self.model)
        self.batches, self.items = batches, count(batches)
        self.scales = scales or [1 if situation.scaled else 1 / len(batches)] * len(batches)

    def gradients(self, config: LSAMConfig, chosen: set[str]) -> dict[str, torch.Tensor]:
        """(1 - alpha) * grad L(w) + alpha * grad L(w + eps) of the chosen weights, grad L(w) of the others."""
        every = list(range(len(self.batches)))
        windows = [[index] for index in every] if config.sharpness_scope == "micro_batch" else [every]
        total: dict[str, torch.Tensor] = {}
        for window in windows:
            for name, part in self.window(window, config, chosen).items():
                total[name] = total.get(name, 0) + part
        return total

    def window(self, window: list[int], config: LSAMConfig, chosen: set[str]) -> dict[str, torch.Tensor]:
        befores = []
        for index in window:
            befores.append(self.now())
            self.run(index)
        after, plain = self.now(), self.take()
        size = {name: p.detach().abs() if config.adaptive else 1.0 for name, p in self.model.named_parameters()}
        # What norms are taken of: with `adaptive` the gradient times the weights' size.
        self.scores = {name: size[name] * gradient for name, gradient in plain.items()}
        weights = {name: p for name, p in self.model.named_parameters() if name in chosen and name in plain}
        if not weights:
            return plain
        length = norm(self.scores[name] for name in weights)
        own = {name: weight.detach().clone() for name, weight in weights.items()}
        for index, before in zip(window, befores, strict=True):
            self.back(before)
            for name, weight in weights.items():
                weight.data.copy_(own[name] + config.rho * size[name] * self.scores[name] / length)
            self.run(index)
        perturbed, zero = self.take(), torch.zeros(())
        self.back(after)
        return plain | {n: (1 - config.alpha) * plain[n] + config.alpha * perturbed.get(n, zero) for n in weights}

    def run(self, index: int) -> None:
        """One pass over a micro-batch."""
        self.holder.accelerator.sync_gradients = index == len(self.batches) - 1

        def once(batch):
            loss = self.holder.loss(self.model, batch, self.items) * self.scales[index]
            loss.backward()
            return loss.detach()

        self.holder.step(self.model, deepcopy(self.batches[index]), once)

    def take(self) -> dict[str, torch.Tensor]:
        """The gradients, which are then gone."""
        gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return gradients

    def now(self) -> tuple:
        return deepcopy((tensors(self.model), self.kept(), self.items))

    def kept(self) -> dict:
        """What the Trainer keeps, by name."""
        names = (*self.holder.keeps, "accelerator")
        return {name: value for name, value in vars(self.holder).items() if name in names}

    def back(self, before: tuple) -> None:
        values, kept, self.items = deepcopy(before)
        put(self.model, values)
        for name in self.holder.keeps:
            vars(self.holder).pop(name, None)
        vars(self.holder).update(kept)


def members(model: nn.Module, modules: Iterable[str], optimized: Iterable[str]) -> dict[str, set[str]]:
    """The names of the optimized weights of each module; one that several share belongs to the first of them."""
    names, result = {id(weight): name for name, weight in model.named_parameters() if name in optimized}, {}
    for module in modules:
        weights = (model if module == "all" else model.get_submodule(module)).parameters()
        own = {names[id(weight)] for weight in weights if id(weight) in names}
        result[module] = own.difference(*result.values())
    return result


def norm(gradients) -> float:
    return float(sum(gradient.abs().square().sum() for gradient in gradients) ** 0.5)


def count(batches: list):
    """What the Trainer hands on as `num_items_in_batch`."""
    labels = [batch["labels"] for batch in batches if isinstance(batch, Mapping) and "labels" in batch]
    return sum(each.ne(-100).sum() for each in labels) if labels else None


def apart(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest difference of any tensor, as a share of the norm of all of `right`; one that is missing is zero."""
    zero = torch.zeros(())
    gaps = [norm([left.get(name, zero) - right.get(name, zero)]) for name in left.keys() | right.keys()]
    return max(gaps) / norm(right.values())


def flat(value) -> list:
    """What a state holds, in a fixed order: numbers, and texts for whatever has to be equal to the last bit."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return [value]
    if isinstance(value, (np.ndarray, np.generic)):
        return [value.shape, *np.asarray(value, dtype=float).flatten().tolist()]
    if isinstance(value, torch.Tensor):
        real = torch.view_as_real(value) if value.is_complex() else value
        return [tuple(value.shape), *real.detach().double().flatten().tolist()]
    if isinstance(value, torch.Generator):
        return [str(value.get_state().tolist())]
    if isinstance(value, (Random, np.random.Generator)):
        return [str(value.getstate() if isinstance(value, Random) else value.bit_generator.state)]
    if isinstance(value, Mapping):
        return [part for key in sorted(value, key=str) for part in [str(key), *flat(value[key])]]
    if isinstance(value, (set, frozenset)):
        return flat(sorted(value, key=str))
    if isinstance(value, (list, tuple, deque)):
        return [len(value), *(part for each in value for part in flat(each))]
    if isinstance(value, (nn.Module, torch.optim.Optimizer)):
        return flat(value.state_dict())
    slots = {name: getattr(value, name) for name in copyreg._slotnames(type(value)) if hasattr(value, name)}
    return [type(value).__name__, *flat({**getattr(value, "__dict__", {}), **slots})]


def alike(left: list, right: list, limit: float) -> bool:
    """Whether two states are equal, numbers up to `limit`."""
    numbers = [all(isinstance(each, (int, float)) for each in pair) for pair in zip(left, right, strict=False)]
    return len(left) == len(right) and all(
        abs(one - other) <= limit * max(1, abs(other)) if number else one == other
        for number, one, other in zip(numbers, left, right, strict=True)
    )


def batches_of(situation: type[Situation], first: int, number: int) -> list:
    """Micro-batches of a run that takes the data in their order."""
    rows = [[situation.data[4 * index + row] for row in range(4)] for index in range(first, first + number)]
    return [situation.collate(each) for each in rows]


def expected(config: LSAMConfig, modules: dict[str, set[str]], scores: dict[str, torch.Tensor]) -> set[str]:
    """The modules that the rule selects by itself."""
    norms = {module: norm(scores[name] for name in names & scores.keys()) for module, names in modules.items()}
    alive = [module for module in modules if norms[module] > 0]
    if config.block_selection == "top_k":
        alive.sort(key=lambda module: norms[module])
    return set(alive[-(config.num_perturbed_blocks or len(alive)) :])


def assert_literal(run: Run, may_skip: str = "", limit: float = LIMIT) -> None:
    """
    Every step's gradient, and what it left, are those of the literal step from where it began.

    A step may be plain if `may_skip` is found in a warning, and it is counted as such.
    """
    assert len(run.gradients) == len(run.starts) - 1 == run.trainer.state.max_steps
    each, rate = run.trainer.args.gradient_accumulation_steps, run.trainer.args.learning_rate
    for step, (start, end, got) in enumerate(zip(run.starts[:-1], run.starts[1:], run.gradients, strict=True)):
        config = start["config"]
        literal = Literal(run.situation, start, batches_of(run.situation, step * each, each), step)
        counts = run.rows[step]["counts"] if config.enabled else {}
        modules = members(literal.model, counts, start["optimized"])
        chosen = {name for name, times in counts.items() if times}
        if config.enabled and not chosen:
            assert may_skip and told(run.messages, may_skip), f"step {step} is plain: {run.messages}"
            assert run.lines[step]["lsam/skipped"] == 1
        right = literal.gradients(config, set().union(*(modules[name] for name in chosen)))
        by_rule = config.block_selection == "top_k" or (config.block_selection != "budget" and literal.holder.in_order)
        if chosen and by_rule and config.sharpness_scope == "batch":
            assert chosen == expected(config, modules, literal.scores)
        assert apart(got, right) < limit, f"step {step}: the gradient is off by {apart(got, right):.3g}"
        for name, tensor in tensors(literal.model).items():
            stepped = start["model"][name] - rate * got[name] if name in got and name in start["optimized"] else tensor
            assert end["model"][name].shape == stepped.shape
            assert alike(flat(end["model"][name]), flat(stepped), limit), f"step {step}: {name}"
        left, kept = flat(end["kept"]), flat(literal.kept())
        assert alike(left, kept, limit), f"step {step} leaves {str(left)[:300]} and not {str(kept)[:300]}"


def assert_right(
    situation: type[Situation], folder, way: str, may_skip: str = "", limit: float = LIMIT, **options
) -> Run:
    """Follow a run in one of the ways, hold it to the literal step, and give it back."""
    config, accumulation = MORE_WAYS[way]
    if config is BUDGET:
        # One that a full pass 2 does not fit may leave nothing to perturb.
        may_skip = f"{may_skip}|max_overhead".removeprefix("|")
    run = follow(situation, folder, config, accumulation, **options)
    assert_literal(run, may_skip, limit)
    return run


def assert_as_plain(situation: type[Situation], folder, accumulation: int = 1, config: dict = LAST, **options) -> None:
    """With a rho of next to nothing the weights, buffers and states end where those of the plain Trainer do."""
    plain = follow(situation, folder / "plain", None, accumulation, **options)
    ours = follow(situation, folder / "ours", {**config, "rho": 1e-9}, accumulation, **options)
    ends = [flat([run.starts[-1][what] for what in ("model", "kept")]) for run in (plain, ours)]
    assert alike(*ends, 1e-7)
