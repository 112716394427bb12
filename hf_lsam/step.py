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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from transformers.utils import logging

from .ascent import Ascent, Kept, find_ascent
from .blocks import everything, find_blocks, find_candidates
from .compiled import CompiledRegions
from .config import LSAMConfig
from .distributed import average_gradients, average_over_ranks
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
from .second_pass import MicroBatch, Pass, SecondPass
from .selection import CostModel, check_selection, earliest_block
from .shards import reshard, sharded_modules
from .step_log import Perturbed, StepLog

logger = logging.get_logger(__name__)


class LSAMStep:
    """
    One training run's steps on a model: called once for each micro-batch.

    Args:
        model: The model itself, not a wrapper of it; its blocks and trainable parameters are found here.
        config: The settings.
        max_steps: Optimizer steps of the training, of which `perturb_start` and `perturb_end` are shares.
        scaler: The gradient scaler, if there is one: an overflow is left for it to see, so that it skips the step.
        called (`nn.Module`): What the passes call, where that is not `model`: a wrapper of it, or its compiled copy.
        beside: Parameters that are trained but not the model's, as those of a loss; they keep their plain gradients.

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
        beside: Sequence[Tensor] = (),
    ):
        self.model = model
        self.config = config
        self.max_steps = max_steps
        self.scaler = scaler
        self.sharded_modules = sharded_modules(model)
        reshard(self.sharded_modules)
        blocks = find_blocks(model)
        regions = CompiledRegions(model if called is None else called)
        if config.block_selection == "all":
            candidates = everything(model, blocks)
        else:
            candidates = find_candidates(model, blocks, config.block_pattern)
        self.candidates = regions.sized(candidates, model)
        # The one-pass rule runs no second pass: there the costs only say which blocks are late ones.
        one_graph = regions.hide(blocks.values()) and config.ascent_gradient == "current"
        self.costs = CostModel.of(model, blocks, one_graph)
        check_selection(config, self.candidates, self.costs)
        pays = any(candidate.first_block > 0 for candidate in self.candidates)
        earliest = earliest_block(config, self.candidates, self.costs)
        self.second_pass = SecondPass(model, list(blocks.values()), regions, beside, earliest, replays=pays)
        self.trained = [parameter.requires_grad for parameter in self.second_pass.parameters]
        self.rounding_checked = False
        self.perturbation = Perturbation()
        # Micro-batches of this step that wait for its last one.
        self.window: list[MicroBatch] = []
        # What goes from step to step (see `Kept`), and the step that runs with what it began with.
        self.previous: Ascent | None = None
        self.correction: tuple[list[Tensor], list[Tensor]] | None = None
        self.reset_log()
        self.current: tuple[int, Kept] | None = None
        # Predicted cost of the last pass 2 over a micro-batch, in plain passes over the same one.
        self.overhead = 0.0

    @property
    def keeps_plain(self) -> bool:
        """
        Whether the gradient of pass 1 is needed after the move.

        If not, memory holds that of one pass at a time, and where pass 2 is not finite, which is rare, it is computed
        again.
        """
        return self.config.alpha < 1 or self.config.reuse_correction > 0 or self.config.adaptive

    def reset_log(self) -> None:
        """Begin the sums of the next log line."""
        self.log = StepLog([candidate.name for candidate in self.candidates])

    def fits(self, beside: Sequence[Tensor]) -> bool:
        """Whether the same parameters are trained as when this was made, those of the optimizer included."""
        parameters = self.second_pass.parameters
        return self.trained == [p.requires_grad for p in parameters] and self.second_pass.known.issuperset(beside)

    def go_on_from(self, other: "LSAMStep") -> None:
        """Take over the sums of the log from `other`, made when other parameters were trained."""
        other.log.settle()
        self.log = replace(other.log, names=self.log.names)

    def perturbs(self, step: int) -> bool:
        """Whether optimizer step `step` is to be perturbed."""
        return self.config.is_perturbed(step, self.max_steps)

    def kept(self, step: int) -> Kept:
        """What optimizer step `step` begins with, for a checkpoint: on SIGTERM one is saved within the step."""
        if self.current is not None and self.current[0] == step:
            return self.current[1]
        return Kept(self.previous, self.correction, self.log.copy())

    def read_after(self, step: int) -> list[Tensor]:
        """The parameters whose gradients of optimizer step `step` are climbed in the next one (one pass)."""
        if not self.perturbs(step + 1):
            return []
        return [parameter for candidate in self.candidates for parameter in candidate.parameters]

    def __call__(self, pass_1: Pass, pass_2: Pass, step: int, is_last: bool) -> Tensor:
        """
        Run a micro-batch; at the last one of an optimizer step, `.grad` holds what the optimizer should get.

        Args:
            pass_1: Forward and backward at the current weights; returns the detached loss. With
                `sharpness_scope="micro_batch"`, and for pass 2 always, gradients stay those of this process.
            pass_2: The same again, counting nothing.
            step: Index of the optimizer step, 0-based.
            is_last: Whether this is the step's last micro-batch.

        Returns:
            The loss of pass 1.

        Raises:
            Whatever a pass raises; the weights are then where they were. If it was pass 2, the selected ones may have
            lost their gradient of this call.
        """
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
        # S, and for each i in S: grad_i L(w).
        ascent = self._find_ascent()
        if ascent is None:
            self.log.skip()
            return
        selected = [self.candidates[index] for index in ascent.chosen]
        blocks = set().union(*(candidate.blocks for candidate in selected))
        self.second_pass.check(window, together=self.config.sharpness_scope == "batch")
        # For each i in S: grad_i L(w + eps).
        with self._moved(ascent):
            if not self.keeps_plain:
                ascent.release()
            perturbed = self._gradients(window, ascent, blocks)
        finite = norms(perturbed).isfinite().all()
        if self.config.reuse_correction > 0:
            parts = orthogonal_part(perturbed, ascent.gradients)
            self.correction = (ascent.weights, zero_unless(finite, parts))
        # Where it is not finite, the plain gradient takes its place. A scaler has to see it, and skips the step.
        if self.scaler is None and self.keeps_plain:
            perturbed = where(finite, perturbed, ascent.gradients)
        elif self.scaler is None and not finite:
            perturbed = self._gradients(window, ascent, None)
        # For each i in S: (1 - alpha) * grad_i L(w) + alpha * grad_i L(w + eps). Of the others, `.grad` stays.
        for weight, mixed in zip(ascent.weights, mix(ascent.gradients, perturbed, self.config.alpha), strict=True):
            weight.grad = mixed
        replays, narrow = self.second_pass.replays, self.second_pass.narrow
        self.overhead = self.costs.overhead(selected, replayed=replays) if narrow else 1.0
        self._count(ascent, self.overhead, finite)

    def _find_ascent(self) -> Ascent | None:
        """The ascent along `.grad`. A scaler's scale is in its direction and norm, not in `squared_norms`."""
        ascent = find_ascent(self.candidates, self.costs, self.config)
        if ascent is not None and self.scaler is not None:
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
        gradients = self.second_pass.gradients(window, ascent.weights, blocks)
        return average_over_ranks(gradients) if self.config.sharpness_scope == "batch" else gradients

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
                self._count(ascent, 0.0, torch.tensor(True))
            self.previous = None
            if self.perturbs(step + 1):
                following = self._find_ascent()
                if following is None:
                    self.log.skip()
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
        kept = [(w.grad, part) for w, part in zip(*self.correction, strict=True) if w.grad is not None]
        add_along([g for g, _ in kept], [part for _, part in kept], self.config.reuse_correction)

    def _count(self, ascent: Ascent, overhead: float, applied: Tensor) -> None:
        length = ascent.length(self.config.rho) if self.config.adaptive else self.config.rho
        first_block = min(self.candidates[index].first_block for index in ascent.chosen)
        self.log.add(Perturbed(applied, ascent.chosen, ascent.squared_norms, length, first_block, overhead))
