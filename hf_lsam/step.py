"""
The algorithm (Lee, KDD 2024, with `alpha` = lambda / rho): pass 1, select, perturb, pass 2, restore, mix.

    pass 1     g = grad L(w), of every weight                            `_batch_step`
    select     S, the k blocks with the largest ||g_i||                  `_find_ascent`
    perturb    w_i + eps_i with eps_i = rho * g_i / ||g_S|| for i in S   `_moved`
    pass 2     p_i = grad_i L(w + eps) for i in S                        `_gradients`
    restore    w                                                         the end of `_moved`
    mix        (1 - alpha) * g_i + alpha * p_i for i in S, else g_i      `_perturb_and_rerun`

The optimizer of the Trainer steps along the result, which is left in `.grad`. Nothing here knows a Trainer. A step is
given two callables for each micro-batch, "run pass 1" and "run pass 2", both of which run forward and backward and
return the loss.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from transformers.utils import logging

from .ascent import Ascent, Kept, find_ascent
from .blocks import Candidate, everything, find_blocks, find_candidates, multiplied_parameters
from .compiled import CompiledRegions
from .config import LSAMConfig
from .costs import CostModel, Weights
from .distributed import any_of_ranks, average_gradients
from .pass_state import PassState
from .perturbation import (
    Perturbation,
    add_along,
    check_rounding,
    mix,
    norms,
    orthogonal_part,
    unchanged,
    where,
    zero_unless,
)
from .replay import Recording
from .second_pass import MicroBatch, Pass, SecondPass
from .selection import beginnings, check_selection
from .shards import reshard, sharded_modules
from .step_log import Perturbed, StepLog

logger = logging.get_logger(__name__)


class LSAMStep:
    """
    One training run's steps on a model: called once for each micro-batch.

    Args:
        model: The model itself, not a wrapper of it; its blocks and parameters are found here.
        config: The settings.
        max_steps: Optimizer steps of the training, of which `perturb_start` and `perturb_end` are shares.
        scaler: The gradient scaler, if there is one: an overflow is left for it to see, so that it skips the step.
        called (`nn.Module`): What the passes call, where that is not `model`: a wrapper of it, or its compiled copy.
        optimized: The parameters that the optimizer trains; `None` where that is not known. Nothing else is selected.
            Those that are not the model's, as those of a loss, keep their plain gradients.
        roots: What else a pass may read and change, by the names that a user knows (see `PassState`).
        raises: Whether an error of pass 2 is for the caller. The others leave the plain gradient.
        has_begun: Whether training has begun, so that blocks may be frozen for now, and fewer are left than wanted.

    Raises:
        ValueError: if the model has no blocks to choose from, or the settings do not fit it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LSAMConfig,
        max_steps: int,
        scaler: GradScaler | None = None,
        called: nn.Module | None = None,
        optimized: Callable[[], Collection[Tensor] | None] = lambda: None,
        roots: Callable[[], Mapping[str, Any]] = dict,
        raises: Callable[[Exception], bool] = lambda error: False,
        has_begun: bool = False,
    ):
        self.model, self.config, self.max_steps, self.scaler = model, config, max_steps, scaler
        self.optimized = optimized
        self._made_for = _names(config)
        self.sharded_modules = sharded_modules(model)
        reshard(self.sharded_modules)
        blocks = find_blocks(model)
        called = model if called is None else called
        self.regions = CompiledRegions(called)
        if config.block_selection == "all":
            self.candidates = everything(model, blocks)
        else:
            self.candidates = find_candidates(model, blocks, config.block_pattern, has_begun)
        # The one-pass rule runs no second pass: there the costs only say which blocks are late ones.
        one_graph = self.regions.hide(blocks.values()) and config.ascent_gradient == "current"
        self.costs = CostModel.of(model, blocks, one_graph)
        if not has_begun:
            check_selection(config, [candidate for candidate in self.candidates if candidate.is_trained], self.costs)
        self.weights = Weights(model, list(blocks.values()))
        pays = config.block_selection != "all" and any(c.first_block > 0 for c in self.candidates)
        state = PassState(model, roots, self._is_trained)
        self.second_pass = SecondPass(model, called, blocks, self.regions, state, pays, self._beginnings, raises)
        self.perturbation = Perturbation()
        self.rounding_checked = False
        # Whether the gradient of pass 1 was let go of and pass 2 could not give it back: the same in all processes.
        self.has_lost = False
        self._optimized: Collection[Tensor] | None = None
        # What is trained, for each set of weights that had a gradient: candidates, and all weights that had one.
        self._trained: dict[tuple, tuple[list[Candidate], set[Tensor]]] = {}
        self._multiplied = multiplied_parameters(model)
        # Micro-batches of this step that wait for its last one.
        self.window: list[MicroBatch] = []
        # What goes from step to step (see `Kept`), and the step that runs with what it began with.
        self.previous: Ascent | None = None
        self.correction: tuple[list[Tensor], list[Tensor]] | None = None
        self.reset_log()
        self.current: tuple[int, Kept] | None = None
        # Weights whose `.grad` is no more what pass 1 left there, in the last call.
        self.mixed: list[Tensor] = []
        # Cost of the second passes of the last micro-batch, in plain passes over the same one.
        self.overhead = 0.0

    @property
    def keeps_plain(self) -> bool:
        """
        Whether the gradient of pass 1 is needed after the move.

        If not, memory holds that of one pass at a time, and where pass 2 is not finite, which is rare, it is computed
        again; where pass 2 fails at any weights, by pass 1 once more, and then kept from the next step on.
        """
        config = self.config
        return config.alpha < 1 or config.reuse_correction > 0 or config.adaptive or self.has_lost

    def reset_log(self) -> None:
        """Begin the sums of the next log line."""
        trained = [candidate.name for candidate in self.candidates if candidate.is_trained]
        self.log = StepLog([candidate.name for candidate in self.candidates], trained)

    def fits(self, config: LSAMConfig) -> bool:
        """Whether `config` chooses among the same modules; everything else may change from step to step."""
        return _names(config) == self._made_for

    def go_on_from(self, other: "LSAMStep") -> None:
        """Take over the sums of the log from `other`, made with other settings."""
        other.log.settle()
        self.log = replace(other.log, names=self.log.names, trained=self.log.trained)

    def perturbs(self, step: int) -> bool:
        """Whether optimizer step `step` is to be perturbed."""
        return self.config.is_perturbed(step, self.max_steps)

    def kept(self, step: int) -> Kept:
        """What optimizer step `step` begins with, for a checkpoint: on SIGTERM one is saved within the step."""
        if self.current is not None and self.current[0] == step:
            return self.current[1]
        return Kept(self.previous, self.correction, self.log.copy())

    def read_at(self, step: int) -> list[Tensor]:
        """The parameters whose gradients optimizer step `step` reads: to climb now, or in the next one (one pass)."""
        if self.config.ascent_gradient == "previous" and self.perturbs(step + 1):
            return [p for candidate in self.candidates for p in candidate.parameters if p.requires_grad]
        if self.config.ascent_gradient == "current" and self.perturbs(step):
            return [p for p in self.model.parameters() if p.requires_grad]
        return self.correction[0] if self.correction and self.config.is_active(step, self.max_steps) else []

    def __call__(self, pass_1: Pass, pass_2: Pass, step: int, is_last: bool) -> Tensor:
        """
        Run a micro-batch; at the last one of an optimizer step, `.grad` holds what the optimizer should get.

        Args:
            pass_1: Forward and backward at the current weights; returns the detached loss. With
                `sharpness_scope="micro_batch"`, and for pass 2 always, gradients stay those of this process.
            pass_2: The same again, of this process alone.
            step: Index of the optimizer step, 0-based.
            is_last: Whether this is the step's last micro-batch.

        Returns:
            The loss of pass 1.

        Raises:
            Whatever pass 1 raises; the weights are then where they were. Of pass 2 what is no `Exception` (Ctrl-C) or
            is for the caller; the selected weights may then have lost their gradient of this call.
        """
        self.overhead, self.mixed = 0.0, []
        self.current = (step, self.kept(step))
        self.perturbation.seed = step
        self.log.steps += is_last
        self.log.chances += is_last or self.config.sharpness_scope == "micro_batch"
        try:
            return self._run(pass_1, pass_2, step, is_last)
        except BaseException:
            # A trainer may leave out a micro-batch that fails; the gradients of those before it still count.
            if is_last:
                self.window.clear()
            raise
        finally:
            self.perturbation.put_back()

    def _run(self, pass_1: Pass, pass_2: Pass, step: int, is_last: bool) -> Tensor:
        is_perturbed = self.perturbs(step)
        if self.config.ascent_gradient == "previous":
            return self._one_pass(pass_1, step, is_perturbed, is_last)
        if is_perturbed and self.config.sharpness_scope == "micro_batch":
            return self._micro_batch_step(pass_1, pass_2, is_last)
        if is_perturbed:
            return self._batch_step(pass_1, pass_2, is_last)
        loss = pass_1()
        if is_last and self.config.is_active(step, self.max_steps):
            self._reuse_correction()
        return loss

    def _batch_step(self, pass_1: Pass, pass_2: Pass, is_last: bool) -> Tensor:
        """Pass 1 of every micro-batch, then, at the last one, pass 2 of all of them."""
        if not self.window:
            self.second_pass.state.begin_step()
        self.window.append(self.second_pass.record(pass_1, pass_2, alone=is_last and not self.window))
        loss = self.window[-1].loss
        if is_last:
            window, self.window = self.window, []
            self._perturb_and_rerun(window)
        return loss

    def _micro_batch_step(self, pass_1: Pass, pass_2: Pass, is_last: bool) -> Tensor:
        """Both passes of this micro-batch; its mixed gradient is added to those of the ones before."""
        sums = {p: p.grad for p in self.model.parameters() if p.grad is not None}
        for parameter in sums:
            parameter.grad = None
        self.second_pass.state.begin_step()
        try:
            micro_batch = self.second_pass.record(pass_1, pass_2, alone=True)
            self._perturb_and_rerun([micro_batch])
        finally:
            for parameter, total in sums.items():
                parameter.grad = total if parameter.grad is None else total + parameter.grad
        if is_last:
            average_gradients([p for p in self.model.parameters() if p.requires_grad])
        return micro_batch.loss

    def _perturb_and_rerun(self, window: Sequence[MicroBatch]) -> None:
        """From the gradient of pass 1 in `.grad` to the mixed one: select, perturb, pass 2, restore, mix."""
        recordings = [micro_batch.recording for micro_batch in window]
        graded = self._trained_now()[1]
        if recordings[-1].calls:
            self.costs = self.weights.costs(recordings[-1].first, recordings[-1].heads, graded)
        # S, and for each i in S: grad_i L(w).
        ascent = self._find_ascent()
        if isinstance(ascent, str):
            self.log.skip(ascent)
            return
        selected = [self.candidates[index] for index in ascent.chosen]
        blocks = set().union(*(candidate.blocks for candidate in selected))
        with self.second_pass.aside():
            perturbed = self._perturbed(window, ascent, blocks)
            if isinstance(perturbed, str):
                self.log.skip(perturbed)
                return
            finite = norms(perturbed).isfinite().all()
            if self.config.reuse_correction > 0:
                parts = orthogonal_part(perturbed, ascent.gradients)
                self.correction = (ascent.weights, zero_unless(finite, parts))
            # Where it is not finite, the plain gradient takes its place. A scaler has to see it, and skips the step.
            if self.scaler is None and ascent.gradients:
                perturbed = where(finite, perturbed, ascent.gradients)
            elif self.scaler is None and not finite:
                perturbed = self._gradients(window, ascent, None)
                if not norms(perturbed).isfinite().all():
                    together = self.config.sharpness_scope == "batch"
                    perturbed = self.second_pass.pass_1_again(window, ascent.weights, together)
                    self.has_lost = True
        # For each i in S: (1 - alpha) * grad_i L(w) + alpha * grad_i L(w + eps). Of the others, `.grad` stays.
        for weight, mixed in zip(ascent.weights, mix(ascent.gradients, perturbed, self.config.alpha), strict=True):
            weight.grad = mixed
        self.mixed = ascent.weights
        if not self.second_pass.narrow:
            self.overhead = 1.0
        elif recordings[-1].calls:
            self.overhead = self.weights.overhead(recordings, graded, self.regions.taken_with(ascent.weights))
        else:
            self.overhead = self.costs.overhead(selected, replayed=False)
        self._count(ascent, self.overhead, finite, min(selected, key=self.costs.start).first_block)

    def _perturbed(self, window: Sequence[MicroBatch], ascent: Ascent, blocks: set[int]) -> list[Tensor] | str:
        """For each i in S: grad_i L(w + eps); or why the step stays a plain one."""
        together = self.config.sharpness_scope == "batch"
        unseen = next((micro_batch.unseen for micro_batch in window if micro_batch.unseen is not None), None)
        flags = [self.second_pass.is_due(window, blocks, hash(next(iter(self._trained)))), unseen is not None]
        is_due, changed = any_of_ranks(flags, self.second_pass.state.device) if together else flags
        if changed:
            return f"pass 1 changed {unseen or 'something in another process'}, of which there is no copy yet"
        if is_due:
            problem = self.second_pass.compare_with_pass_1(window, ascent.weights, ascent.gradients, together)
            if problem is not None:
                return problem
        with self._moved(ascent):
            if not self.keeps_plain:
                ascent.release()
            if is_due:
                return self.second_pass.compare_with_replay(window, ascent.weights, blocks, together)
            return self._gradients(window, ascent, blocks)

    def _trained_now(self) -> tuple[list[Candidate], set[Tensor]]:
        """The candidates with what of them has a gradient and is trained, and all weights that have one."""
        optimized = self.optimized()
        if optimized is not self._optimized:
            self._optimized = optimized
            self.second_pass.parameters = list(dict.fromkeys([*self.model.parameters(), *(optimized or ())]))
        parameters = self.second_pass.parameters
        flags = [p.grad is not None for p in parameters]
        # DeepSpeed gives none before the last micro-batch, and then those of all.
        key = (tuple(flags if any(flags) else [p.requires_grad for p in parameters]), id(optimized))
        if key not in self._trained:
            graded = {p for p, has in zip(parameters, key[0], strict=True) if has}
            trained = graded if optimized is None else {p for p in graded if p in optimized}
            self._trained = {key: ([self._live(candidate, trained) for candidate in self.candidates], graded)}
        return self._trained[key]

    def _live(self, candidate: Candidate, trained: Collection[Tensor]) -> Candidate:
        parameters = tuple(p for p in candidate.parameters if p in trained)
        # What is compiled together takes its gradients together.
        taken = self.regions.taken_with(parameters) & self._multiplied
        return replace(candidate, parameters=parameters, size=sum(p.numel() for p in taken))

    def _is_trained(self, parameter: Tensor) -> bool:
        optimized = self.optimized()
        return parameter.requires_grad if optimized is None else parameter in optimized

    def _beginnings(self, recording: Recording) -> set[int]:
        """Where pass 2 may begin after such a pass 1."""
        candidates, graded = self._trained_now()
        live = [candidate for candidate in candidates if candidate.parameters]
        return beginnings(self.config, live, self.weights.costs(recording.first, recording.heads, graded))

    def _find_ascent(self) -> Ascent | str:
        """The ascent along `.grad`. A scaler's scale is in its direction and norm, not in `squared_norms`."""
        ascent = find_ascent(self._trained_now()[0], self.costs, self.config, self.second_pass.state.device)
        if isinstance(ascent, Ascent) and self.scaler is not None:
            # One wait for the device, and not one for each candidate.
            scale = self.scaler.get_scale()
            ascent.squared_norms = [square / scale**2 for square in ascent.squared_norms]
        return ascent

    @contextmanager
    def _moved(self, ascent: Ascent) -> Iterator[None]:
        """Inside, the weights of S are at w + eps, eps_i = rho * grad_i L(w) / ||grad_S L(w)||; then at w again."""
        reshard(self.sharded_modules)
        if ascent.spent:
            move = self.perturbation.at(ascent.weights, ascent.direction)
        else:
            move = self.perturbation.moved(ascent.weights, ascent.direction, self.config.rho / ascent.norm)
        with move as before:
            if not self.rounding_checked:
                self.rounding_checked = check_rounding(ascent.weights, before, ascent.direction, self.config.rho)
            yield

    def _gradients(self, window: Sequence[MicroBatch], ascent: Ascent, blocks: set[int] | None) -> list[Tensor]:
        """Pass 2: the gradients of the window with respect to the selected weights, where they are now."""
        return self.second_pass.gradients(window, ascent.weights, blocks, self.config.sharpness_scope == "batch")

    def _one_pass(self, pass_1: Pass, step: int, is_perturbed: bool, is_last: bool) -> Tensor:
        """Forward and backward at weights moved along the gradient of the step before."""
        ascent = self.previous if is_perturbed else None
        if ascent is None:
            loss = pass_1()
        else:
            if not self.config.adaptive:
                ascent.spend(self.config.rho)
            with self._moved(ascent), unchanged(ascent.weights):
                loss = pass_1()
        if is_last:
            if ascent is not None:
                first = min(self.candidates[index].first_block for index in ascent.chosen)
                self._count(ascent, 0.0, torch.tensor(True), first)
            self.previous = None
            if self.perturbs(step + 1):
                following = self._find_ascent()
                if isinstance(following, str):
                    self.log.skip(following)
                    return loss
                if not self.config.adaptive:
                    # The optimizer's clipping and zeroing change `.grad` in place.
                    following.direction = self.perturbation.copies(following.direction)
                following.gradients = []
                self.previous = following
        return loss

    @torch.no_grad()
    def _reuse_correction(self) -> None:
        """LookSAM between two perturbed steps: g + scale * ||g|| * v, v the last orthogonal part, of unit length."""
        if self.correction is None:
            return
        kept = [(w, w.grad, part) for w, part in zip(*self.correction, strict=True) if w.grad is not None]
        add_along([g for _, g, _ in kept], [part for *_, part in kept], self.config.reuse_correction)
        self.mixed = [weight for weight, *_ in kept]

    def _count(self, ascent: Ascent, overhead: float, applied: Tensor, first_block: int) -> None:
        length = ascent.length(self.config.rho) if self.config.adaptive else self.config.rho
        self.log.add(Perturbed(applied, ascent.chosen, ascent.squared_norms, length, first_block, overhead))


def _names(config: LSAMConfig) -> tuple[bool, str | None]:
    """What of the settings says which modules are chosen among."""
    return config.block_selection == "all", config.block_pattern
