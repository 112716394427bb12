"""Pass 2: the same micro-batches again, from the first perturbed block on and for the gradients of a few weights."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from .compiled import CompiledRegions
from .distributed import any_of_ranks, average_over_ranks
from .held import RandomState
from .pass_state import PassState, Snapshot
from .passes import only_gradients_of
from .perturbation import distance, norms
from .replay import DroppedError, Recording, Replay

logger = logging.get_logger(__name__)

Pass = Callable[[], Tensor]

# How far two passes over the same may be apart, as a share of the gradient, by the bits of the coarsest numbers in
# them: where a weight takes no gradient, `torch.matmul` may choose another kernel, whose last bits differ.
_TOLERANCE = {64: 1e-9, 32: 1e-4, 16: 3e-2}
# So many comparisons are made whenever they are due; from then on only where the number of steps has doubled.
_MOST_COMPARISONS = 8


@dataclass
class MicroBatch:
    """
    A micro-batch between its two passes.

    Attributes:
        before: What pass 1 began with.
        after: The random states that it ended with.
        unseen: Name of something that pass 1 changed and that `before` does not hold.
        signature: What pass 1 called, as far as it is free to compare.
    """

    rerun: Pass
    loss: Tensor
    recording: Recording
    before: Snapshot
    after: RandomState
    unseen: str | None
    signature: tuple


@dataclass
class Attempt:
    """A pass 2 over some micro-batches: the loss of each and what it left, the gradients of all; or an error."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    left: list[set] = field(default_factory=list)
    error: Exception | None = None

    @property
    def failure(self) -> str | None:
        """What to tell of the error."""
        error = self.error
        return None if error is None else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class SecondPass:
    """
    Runs micro-batches a second time.

    Args:
        model: The model itself.
        called: What the passes call: the model, its compiled copy, or a wrapper of either.
        blocks: The model's blocks, by name.
        regions: What of it is compiled.
        state: Holds what passes read and leave.
        replays: Whether to replay the blocks before the first perturbed one.
        begins: Places of the calls that a replay of such a pass may begin with.
        raises: Whether an error of pass 2 is for the caller.

    Attributes:
        parameters: All that are trained or may be.
        modules: Those of what is called.
        together: Whether every process runs these passes now; their gradients are then averaged, and they agree.
        replays: The same as given, if it is possible: not inside of a compiled model, nor where a replayed pass was
            found to be another one.
        drops: Whether outputs of blocks may be dropped: not where the model reads more than that of the last one.
        narrow: Whether only the selected weights take a gradient: not where passes ask for those of others.
        checked: What pass 1 called, by its signature, where pass 2 was found to be right, and the place of the call
            that the latest such replay began with.
        running: Whether pass 2 runs.
    """

    def __init__(
        self,
        model: nn.Module,
        called: nn.Module,
        blocks: Mapping[str, nn.Module],
        regions: CompiledRegions,
        state: PassState,
        replays: bool,
        begins: Callable[[Recording], Collection[int]],
        raises: Callable[[Exception], bool],
    ):
        self.model, self.regions, self.state, self.begins, self.raises = model, regions, state, begins, raises
        # Looked up seldom: to go through all modules takes as long as to launch a few blocks on a GPU.
        self.parameters: list[Tensor] = list(model.parameters())
        self.called, self.modules = called, list(called.modules())
        scripted = any(isinstance(block, torch.jit.ScriptModule) for block in blocks.values())
        hidden = scripted or regions.caller(model) is not model or regions.hide([model, *blocks.values()])
        own = [] if hidden else [regions.caller(block) for block in blocks.values()]
        self.replay = Replay(own, state.device, None if hidden else model)
        self.replays = replays and not hidden
        self.together = self.drops = self.narrow = True
        self.checked: dict[tuple, int] = {}
        self.running = self._compares = False
        self._comparisons, self._due = 0, 0
        # Places of the calls whose outputs are kept; `None` before the first recording.
        self._kept: Collection[int] | None = None
        self._settings: dict = {}
        self._settings_changed = 0
        self._wrapper = next((m for m in self.modules if isinstance(m, DistributedDataParallel)), None)

    def record(self, pass_1: Pass, pass_2: Pass, alone: bool) -> MicroBatch:
        """
        Run pass 1 of a micro-batch, and record what pass 2 needs of it.

        If the optimizer step has others, as it has where it is not `alone`, the records of all of them lie in memory
        together. So only every second output is kept: a block more may run again, forward only.
        """
        before = self.state.before_pass_1()
        if self.state.looks:
            self.modules = list(self.called.modules())
        stride = 1 if alone else 2
        kept = None if self._kept is None or not self.drops else set(sorted(self._kept)[::stride])
        wrapper = self._wrapper
        is_sent = wrapper is not None and wrapper.require_forward_param_sync and wrapper.broadcast_buffers
        sent = (lambda: before.take_again(self.model.buffers())) if is_sent else (lambda: None)
        with self.replay.recording(self.replays, kept, sent) as recording:
            loss = pass_1()
        unseen, after = self.state.learn(before), RandomState.capture(self.state.device)
        if not self.replay.draws_on_host:
            self.replay.draws_on_host = not after.same_host_state(before.random)
            recording.replayable &= not self.replay.draws_on_host
        if self.replays:
            known, self._kept = self._kept, {place - 1 for place in self.begins(recording)}
            if known is None:
                # All outputs are there, but a run that resumes is to begin where an uninterrupted one does.
                for place in set(range(len(recording.calls))).difference(sorted(self._kept)[::stride]):
                    recording.calls[place].kept = False
        calls = tuple((call.block, call.has_gradient) for call in recording.calls)
        signature = (calls, tuple(recording.models), self._settings_of_model())
        return MicroBatch(pass_2, loss, recording, before, after, unseen, signature)

    def _settings_of_model(self) -> int:
        """How often the plain values of the model's config have changed."""
        settings = vars(getattr(self.model, "config", None) or object)
        plain = {k: v for k, v in settings.items() if isinstance(v, (bool, int, float, str, type(None)))}
        if self._settings != plain:
            self._settings, self._settings_changed = plain, self._settings_changed + 1
        return self._settings_changed

    @contextmanager
    def aside(self, window: Sequence[MicroBatch]) -> Iterator[None]:
        """Inside, passes may run again; afterwards all is as the last pass 1 left it."""
        after, marks = self.state.after_pass_1(window[-1].after), self.state.marks()
        try:
            yield
        finally:
            after.put()
            self.state.tell_changes(marks)

    def is_due(self, window: Sequence[MicroBatch], blocks: set[int], trained: int) -> bool:
        """
        Whether pass 2 has to be compared before it is trusted: it was not, for what these micro-batches called.

        Args:
            window: Micro-batches in their order.
            blocks: Indices of the blocks that hold a selected weight.
            trained: Another number for other weights with a gradient.
        """
        self._new = {(batch.signature, trained): batch.recording.start(blocks) for batch in window}
        if all(self.checked.get(signature, -1) >= start for signature, start in self._new.items()):
            return False
        return self._comparisons < _MOST_COMPARISONS or self.state.steps >= self._due

    def compare_with_pass_1(
        self, window: Sequence[MicroBatch], weights: Sequence[Tensor], plain: Sequence[Tensor]
    ) -> str | None:
        """
        See, where the weights are as they were, whether pass 2 repeats pass 1 when it is narrowed to `weights`.

        Otherwise it is narrowed no more, or a warning tells that it is another one. `plain` are the gradients that
        pass 1 left. Returns why pass 2 cannot run at all, if it cannot.
        """
        self._compares, self._comparisons, self._due = True, self._comparisons + 1, 2 * self.state.steps
        losses = [micro_batch.loss for micro_batch in window]
        problems: list[str] = []
        for narrow in (True, False) if self.narrow else (False,):
            attempt = self._attempt(window, weights, None, narrow)
            problem = self._difference(window, attempt, losses, plain, self._averaged(attempt, plain))
            if not self.any(problem is not None)[0]:
                if problems:
                    self.narrow = self.replays = False
                    logger.warning(self._message("for some of the weights alone, so that all take one", problems[0]))
                return None
            problems.append(problem or "in another process")
        name = type(self.model).__name__
        if self.any(attempt.error is not None)[0]:
            logger.warning_once(
                f"Pass 2 of {name} fails where pass 1 did not ({problems[-1]}), so the plain gradient is used. Steps "
                "of this kind are counted in lsam/skipped."
            )
            return "pass 2 failed"
        self.replays = False
        logger.warning_once(
            f"Pass 2 does not repeat pass 1 of {name}: with the same batch, weights and random state, {problems[-1]}. "
            "If it draws from a generator of its own, or depends on something that a pass changes, the perturbation "
            "climbs one loss and the gradient is that of another. Let it draw from the global generators, and keep "
            "what it changes in buffers or on the trainer."
        )
        return None

    def compare_with_replay(
        self, window: Sequence[MicroBatch], weights: Sequence[Tensor], blocks: set[int]
    ) -> list[Tensor]:
        """As `gradients`, of a full pass 2; see whether a replayed one, where the weights are now, has the same."""
        full = self._attempt(window, weights, None, self.narrow)
        if full.error is not None:
            full = self._attempt(window, weights, None, False)
        ran, replayed, problem = [micro_batch.recording.last for micro_batch in window], full, None
        if self.replays and full.error is None:
            replayed = self._attempt(window, weights, blocks, self.narrow)
            problem = self._difference(window, replayed, full.losses, full.gradients, replayed.gradients)
            if problem is None and replayed.left != full.left:
                problem = f"it leaves no {sorted(map(str, full.left[-1] - replayed.left[-1]))[:3]} behind"
        self._compares = False
        has_dropped = any(micro_batch.recording.has_dropped for micro_batch in window)
        differs, may_read = self.any(problem is not None, self.drops and has_dropped)
        if differs:
            for micro_batch, last in zip(window, ran, strict=True):
                micro_batch.recording.last = last
        # A resumed run compares, where an uninterrupted one replays: both go on from what is replayed.
        gradients = self._averaged(full if differs else replayed, weights)
        if differs and may_read:
            # Perhaps it only reads what was not kept: from the next step on everything is.
            self.drops = False
        elif differs:
            self.replays = False
            reason = problem or "in another process"
            logger.warning(self._message("from records of its blocks, so that it runs all of them", reason))
        elif full.error is None and bool(norms([*full.gradients, *gradients]).isfinite().all()):
            self.checked.update(self._new)
        return gradients

    def gradients(
        self, window: Sequence[MicroBatch], weights: Sequence[Tensor], blocks: set[int] | None
    ) -> list[Tensor]:
        """
        The gradients of all of `window` with respect to `weights`, where they are now; `.grad` stays as it is.

        Where a pass fails that is replayed, one in full follows, then one for all weights. Where that fails, too, the
        gradients are not numbers. `blocks` are the indices of those that hold a weight which is not where it was in
        pass 1; `None` replays nothing.
        """
        replayed = [(blocks, True)] if self.replays and blocks is not None else []
        for perturbed, narrow in [*replayed, *[(None, True)] * self.narrow, (None, False)]:
            attempt = self._attempt(window, weights, perturbed, narrow and self.narrow)
            if attempt.error is None:
                break
            if isinstance(attempt.error, DroppedError):
                self.drops = False
                continue
            # It is compared anew at the next step.
            self.checked.clear()
            self._comparisons = 0
            logger.warning_once(
                f"Pass 2 of {type(self.model).__name__} failed ({attempt.failure}). It is run again in full and, if "
                "that fails, for all weights; if nothing helps, the plain gradient is used."
            )
        return self._averaged(attempt, weights)

    def any(self, *flags: bool) -> list[bool]:
        """Each of `flags`, set if it is so in any process that runs these passes with this one."""
        return any_of_ranks(flags, self.state.device) if self.together else list(flags)

    def _averaged(self, attempt: Attempt, weights: Sequence[Tensor]) -> list[Tensor]:
        failed = attempt.error is not None
        gradients = [torch.full_like(weight, torch.nan) for weight in weights] if failed else attempt.gradients
        return average_over_ranks(gradients) if self.together else gradients

    def _attempt(
        self, window: Sequence[MicroBatch], weights: Sequence[Tensor], perturbed: set[int] | None, narrow: bool
    ) -> Attempt:
        taken = self.regions.taken_with(weights) if narrow else [p for p in self.parameters if p.requires_grad]
        losses, left = [], []
        try:
            with only_gradients_of(self.parameters, taken, self.state.foreign):
                for micro_batch in window:
                    micro_batch.before.put(self.replay.draws_on_host)
                    self.running = True
                    with self.replay.replaying(micro_batch.recording, perturbed):
                        losses.append(micro_batch.rerun())
                    self.state.settle()
                    left.append(micro_batch.before.touched() if self._compares else set())
                return Attempt(losses, [torch.zeros_like(w) if w.grad is None else w.grad for w in weights], left)
        except Exception as error:
            if self.raises(error):
                raise
            return Attempt(error=error)
        finally:
            self.running = False

    def _difference(
        self,
        window: Sequence[MicroBatch],
        attempt: Attempt,
        losses: Sequence[Tensor],
        gradients: Sequence[Tensor],
        own: Sequence[Tensor],
    ) -> str | None:
        """What to tell of an attempt, with gradients of its `own`, that has not these losses and gradients."""
        if attempt.error is not None:
            return attempt.failure
        outputs = [call.dtype for micro_batch in window for call in micro_batch.recording.calls]
        bits = min(torch.finfo(dtype).bits for dtype in [*outputs, *(t.dtype for t in (*losses, *gradients))])
        if bits == 32 and (not outputs or torch.get_float32_matmul_precision() != "highest"):
            bits = 16
        for loss, other in zip(losses, attempt.losses, strict=True):
            one, two = loss.item(), other.item()
            if abs(one - two) > _TOLERANCE[bits] * max(abs(one), abs(two), 1.0):
                return f"the loss was {one}, then {two}"
        apart = distance(own, gradients)
        return f"gradients are apart by {apart:.2g} of their norm" if apart > _TOLERANCE[bits] else None

    def _message(self, way: str, reason: str) -> str:
        return (
            f"Pass 2 of {type(self.model).__name__} cannot be run {way} from now on ({reason}). It is correct, and "
            "slower: lsam/overhead tells how much. Models whose loss reads what blocks leave behind, such as the "
            "auxiliary loss of mixtures of experts, and trainers that clip or change gradients within training_step "
            "are among these."
        )
