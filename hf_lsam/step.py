"""The algorithm (Lee, KDD 2024, with `alpha` = lambda / rho): pass 1, select, perturb, pass 2, restore, mix.

    pass 1     g = grad L(w), for all trained weights                    `_batch_step`
    select     S, the k blocks with the largest ||g_i||                  `_find_ascent`
    perturb    w_i + eps_i with eps_i = rho * g_i / ||g_S|| for i in S   `Ascent.moved`
    pass 2     p_i = grad_i L(w + eps) for i in S                        `_gradients`
    restore    w                                                         the end of `Ascent.moved`
    mix        (1 - alpha) * g_i + alpha * p_i for i in S, else g_i      `_perturb_and_rerun`

The result is left in `.grad`, for the optimizer. This module does not depend on a Trainer: for each micro-batch it
gets two callables, which run forward and backward and return the loss.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from .account import Account
from .ascent import Ascent, StepState, find_ascent
from .blocks import everything, find_blocks, find_candidates
from .compiled import CompiledRegions
from .config import LSAMConfig
from .costs import CostModel, Trained
from .distributed import average_gradients, mean_of_ranks
from .pass_state import PassState
from .perturbation import Perturbation, add_along, mix, norms, orthogonal_part, unchanged, where, zero_unless
from .replay import Recording
from .second_pass import MicroBatch, Pass, SecondPass
from .selection import check_selection, predicted_overheads, replay_starts
from .shards import reshard, sharded_modules
from .step_log import Perturbed, StepLog
from .structure import Structure


class LSAMStep:
    """The steps of one training run on a model; called once for each micro-batch.

    Args:
        max_steps: Number of optimizer steps of the training, for `perturb_start` and `perturb_end`.
        scaler: The gradient scaler, if any. It has to see an overflow of pass 2, so that it skips the step.
        called: What the passes call, if that is not `model` itself: its wrapper, or its compiled copy.
        optimized: Returns the parameters in the optimizer, outside of which nothing is selected; `None` if unknown.
        roots: Returns other objects that a pass may read and change, by name (see `PassState`).
        raises: Whether an error of pass 2 is raised. After other errors, the step uses the plain gradient.
        has_begun: Whether training has begun. Blocks may then be frozen for a while, so their number is not checked;
            before that, it is a `ValueError` if the settings do not fit the model.
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
        self._selects_from = config.block_selection == "all", config.block_pattern
        self.sharded_modules = sharded_modules(model)
        reshard(self.sharded_modules)
        blocks, regions = find_blocks(model), CompiledRegions(model if called is None else called)
        if config.block_selection == "all":
            self.candidates = everything(model, blocks)
        else:
            self.candidates = find_candidates(model, blocks, config.block_pattern, has_begun)
        # The one-pass rule has no second pass: it uses the costs for the order of the blocks only.
        one_graph = regions.contains_any(blocks.values()) and config.ascent_gradient == "current"
        self.costs = CostModel.of(model, blocks, one_graph)
        if not has_begun:
            check_selection(config, [candidate for candidate in self.candidates if candidate.is_trained], self.costs)
        self.structure = Structure(model, called)
        self.trained = Trained(model, list(blocks.values()), self.candidates, regions, optimized)
        replay_helps = config.block_selection != "all" and any(c.first_block > 0 for c in self.candidates)
        state = PassState(self.structure, roots, self.trained.includes)
        self.second_pass = SecondPass(
            self.structure, blocks, regions, state, self.trained.parameters, replay_helps, self._replay_starts, raises
        )
        self.perturbation = Perturbation()
        self.window: list[MicroBatch] = []  # micro-batches of this step that wait for its last one
        self.previous: Ascent | None = None  # see `StepState`
        self.correction: tuple[list[Tensor], list[Tensor]] | None = None  # see `StepState`
        self.account: Account | None = None  # see `StepState`
        self._costs: list[float] = []  # of the passes 2 of this step, in plain passes over the same micro-batches
        self.reset_log()
        self.current: tuple[int, StepState] | None = None  # the number of the step that runs, and what it took over
        self.overhead = 0.0  # cost of the last pass 2, in plain passes over the same micro-batches
        self.mixed: list[Tensor] = []  # weights whose `.grad` is no longer that of pass 1

    def reset_log(self) -> None:
        """Begin the sums of the next log line."""
        self.log = StepLog([c.name for c in self.candidates], [c.name for c in self.candidates if c.is_trained])

    def give_up(self) -> None:
        """Forget the micro-batches of a step that has not ended."""
        self.window.clear()
        self._costs.clear()

    def fits(self, config: LSAMConfig) -> bool:
        """Whether `config` selects from the same weights; all other settings may change between steps."""
        selects_from = config.block_selection == "all", config.block_pattern
        return self._selects_from == selects_from and not self.trained.is_outdated()

    @property
    def frees_gradients(self) -> bool:
        """Whether pass 1's gradients are freed before pass 2: if that overflows, pass 1 runs again (full SAM)."""
        own = self.config
        return own.block_selection == "all" and own.alpha == 1 and not (own.reuse_correction or own.adaptive)

    def perturbs(self, step: int) -> bool:
        """Whether optimizer step `step` is to be perturbed."""
        may = self.config.is_perturbed(step, self.max_steps)
        if not self.config.is_priced:
            return may
        terms = Account.terms_of(self.config)
        if self.account is None or self.account.terms != terms:
            self.account = Account(terms, step, predicted_overheads(self.config, self.candidates, self.costs)[1])
        return may and self.account.affords(step, self.config, self.max_steps)

    def state_at(self, step: int) -> StepState:
        """What optimizer step `step` takes over, for a checkpoint, which on SIGTERM is saved during that step."""
        if self.current is not None and self.current[0] == step:
            return self.current[1]
        return StepState(self.previous, self.correction, self.log.copy(), self.account)

    def gradients_read_at(self, step: int) -> list[Tensor]:
        """The parameters whose mean gradients optimizer step `step` needs, to perturb this step or the next one."""
        if self.config.ascent_gradient == "previous" and self.perturbs(step + 1):
            return [p for candidate in self.candidates for p in candidate.parameters if p.requires_grad]
        if self.config.ascent_gradient == "current" and self.perturbs(step):
            return [p for p in self.model.parameters() if p.requires_grad]
        return self.correction[0] if self.correction and self.config.is_active(step, self.max_steps) else []

    def __call__(self, pass_1: Pass, pass_2: Pass, step: int, is_last: bool) -> Tensor:
        """Run a micro-batch of step `step` (0-based); after the last one, `.grad` is ready for the optimizer.

        Both passes run forward and backward and return the detached loss. The gradients of pass 2, and with
        `sharpness_scope="micro_batch"` those of pass 1, must not be averaged over processes yet.

        Returns the loss of pass 1. Raises the errors of pass 1, and those of pass 2 that are no `Exception` (Ctrl-C)
        or for which `raises` is true; the weights are restored first.
        """
        self.overhead, self.trained.is_current, self.mixed = 0.0, False, []
        if self.current is not None and self.current[0] != step:
            self.give_up()  # micro-batches of a step whose last one was left out
        self.current = (step, self.state_at(step))
        self.perturbation.seed = step
        self.log.steps += is_last
        self.log.chances += is_last or self.config.sharpness_scope == "micro_batch"
        try:
            if self.config.ascent_gradient == "previous":
                return self._one_pass(pass_1, step, is_last)
            if not self.perturbs(step):
                loss = pass_1()
                if is_last and self.config.is_active(step, self.max_steps):
                    self._reuse_correction()
                return loss
            run = self._batch_step if self.config.sharpness_scope == "batch" else self._micro_batch_step
            loss = run(pass_1, pass_2, is_last)
            self._pay(is_last)
            return loss
        except BaseException:
            if is_last:  # a trainer may skip a micro-batch that fails; the others of the step still count
                self.give_up()
            raise
        finally:
            self.perturbation.put_back()

    def _batch_step(self, pass_1: Pass, pass_2: Pass, is_last: bool) -> Tensor:
        """Pass 1 of every micro-batch, then, at the last one, pass 2 of all of them."""
        if not self.window:
            self.second_pass.state.begin_step()
        self.window.append(self.second_pass.record(pass_1, pass_2, alone=is_last and not self.window))
        loss = self.window[-1].loss
        if is_last:
            window, self.window = self.window, []
            try:
                self._perturb_and_rerun(window)
            finally:
                self.second_pass.state.end_step()
        return loss

    def _micro_batch_step(self, pass_1: Pass, pass_2: Pass, is_last: bool) -> Tensor:
        """Both passes of this micro-batch; its mixed gradient is added to those of the earlier ones."""
        sums = {p: p.grad for p in self.model.parameters() if p.grad is not None}
        for parameter in sums:
            parameter.grad = None
        self.second_pass.state.begin_step()
        try:
            micro_batch = self.second_pass.record(pass_1, pass_2, alone=True)
            self._perturb_and_rerun([micro_batch])
        finally:
            self.second_pass.state.end_step()
            for parameter, total in sums.items():
                parameter.grad = total if parameter.grad is None else total + parameter.grad
        if is_last:
            average_gradients([p for p in self.model.parameters() if p.requires_grad])
        return micro_batch.loss

    def _perturb_and_rerun(self, window: Sequence[MicroBatch]) -> None:
        """From the gradient of pass 1 in `.grad` to the mixed one: select, perturb, pass 2, restore, mix."""
        recordings = [micro_batch.recording for micro_batch in window]
        if is_recorded := bool(recordings[-1].calls):
            self.costs = self.trained.costs(recordings[-1])
        ascent = self._find_ascent()  # S, and for each i in S: grad_i L(w)
        if isinstance(ascent, str):
            self.log.skip(ascent)
            return
        with self.second_pass.reruns(window):
            perturbed = self._gradients(window, ascent)  # for each i in S: grad_i L(w + eps)
            if isinstance(perturbed, str):
                self.log.skip(perturbed)
                return
            finite = norms(perturbed).isfinite().all() & (ascent.norm > 0)
            if self.frees_gradients and self.scaler is None and not finite:  # a host synchronisation
                perturbed = self.second_pass.pass_1_again(window, ascent.weights)
        if self.config.reuse_correction > 0:
            self.correction = ascent.weights, zero_unless(finite, orthogonal_part(perturbed, ascent.gradients))
        # A gradient that is not finite is replaced by the plain one, unless a scaler has to see it.
        if self.scaler is None and not self.frees_gradients:
            perturbed = where(finite, perturbed, ascent.gradients)
        # For each i in S: (1 - alpha) * grad_i L(w) + alpha * grad_i L(w + eps). Of the others, `.grad` stays.
        for weight, mixed in zip(ascent.weights, mix(ascent.gradients, perturbed, self.config.alpha), strict=True):
            weight.grad = mixed
        self.mixed = ascent.weights
        if not self.second_pass.narrow:
            self.overhead = 1.0
        elif is_recorded:
            self.overhead = self.trained.overhead(recordings, ascent.chosen, ascent.weights)
        else:
            self.overhead = self.costs.overhead([self.candidates[i] for i in ascent.chosen], replayed=False)
        self._count(ascent, finite)

    def _pay(self, is_last: bool) -> None:
        """Pay for the passes 2 of a step from the account, the same amount in all processes."""
        if is_last or self.config.sharpness_scope == "micro_batch":
            self._costs.append(self.overhead)
        if is_last and self.account is not None and self.config.is_priced:
            cost = sum(self._costs) / len(self._costs)
            self.account = self.account.after(mean_of_ranks(cost, self.second_pass.state.device))
        if is_last:
            self._costs.clear()

    def _replay_starts(self, recording: Recording) -> set[int]:
        """Indices of the calls at which a pass 2 after this pass 1 may begin."""
        live = [candidate for candidate in self.trained.now().candidates if candidate.parameters]
        return replay_starts(self.config, live, self.trained.costs(recording))

    def _find_ascent(self) -> Ascent | str:
        """The ascent along `.grad`; a scaler's factor is in its direction and norm, but not in `squares`."""
        ascent = find_ascent(self.trained.now().candidates, self.costs, self.config, self.second_pass.state.device)
        if isinstance(ascent, Ascent) and self.scaler is not None:
            ascent.squares = ascent.squares / self.scaler.scale(torch.ones_like(ascent.squares)) ** 2
        return ascent

    def _gradients(self, window: Sequence[MicroBatch], ascent: Ascent) -> list[Tensor] | str:
        """Pass 2: the gradients of S at the moved weights, or the reason why the step stays plain."""
        passes = self.second_pass
        passes.collective = self.config.sharpness_scope == "batch"
        blocks = set().union(*(self.candidates[index].blocks for index in ascent.chosen))
        uncopied = next((micro_batch.uncopied for micro_batch in window if micro_batch.uncopied is not None), None)
        is_due, changed = passes.agree(window, blocks, self.trained.now().number, uncopied is not None)
        if changed:
            return f"pass 1 changed {uncopied or 'a tensor in another process'}, of which there is no copy yet"
        if is_due and (problem := passes.compare_with_pass_1(window, ascent.weights, ascent.gradients)) is not None:
            return problem
        reshard(self.sharded_modules)
        with ascent.moved(self.perturbation, self.config.rho):
            if self.frees_gradients:
                ascent.release()
            run = passes.compare_with_replay if is_due else passes.gradients
            return run(window, ascent.weights, blocks)

    def _one_pass(self, pass_1: Pass, step: int, is_last: bool) -> Tensor:
        """The only pass of `ascent_gradient="previous"`, at weights moved along the gradient of the step before."""
        ascent = self.previous if self.perturbs(step) else None
        if ascent is None:
            loss = pass_1()
        else:
            if not self.config.adaptive:
                ascent.move_in_place(self.config.rho)
            reshard(self.sharded_modules)
            with ascent.moved(self.perturbation, self.config.rho), unchanged(ascent.weights):
                loss = pass_1()
            if is_last:
                self._count(ascent, (ascent.norm > 0) & ascent.norm.isfinite())
        if is_last:
            self.previous = self._next_ascent() if self.perturbs(step + 1) else None
        return loss

    def _next_ascent(self) -> Ascent | None:
        """The ascent of the next step."""
        ascent = self._find_ascent()
        if isinstance(ascent, str):
            self.log.skip(ascent)
            return None
        if not self.config.adaptive:
            ascent.direction = self.perturbation.copies(ascent.direction)  # clipping changes `.grad` in place
        ascent.gradients = []
        return ascent

    def _reuse_correction(self) -> None:
        """LookSAM between two perturbed steps: g + scale * ||g|| * v, where v is the orthogonal part, normalised."""
        if self.correction is None:
            return
        kept = [(w, w.grad, part) for w, part in zip(*self.correction, strict=True) if w.grad is not None]
        add_along([g for _, g, _ in kept], [part for *_, part in kept], self.config.reuse_correction)
        self.mixed = [weight for weight, *_ in kept]

    def _count(self, ascent: Ascent, applied: Tensor) -> None:
        first = min((self.candidates[index] for index in ascent.chosen), key=self.costs.start).first_block
        length = ascent.length(self.config.rho) if self.config.adaptive else self.config.rho
        self.log.add(Perturbed(applied, ascent.chosen, ascent.squares, ascent.counts, length, first, self.overhead))
