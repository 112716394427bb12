"""Pass 2: the same micro-batches again, from the first perturbed block on and for the gradients of a few weights."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
        unseen: Name of something that pass 1 changed and that `before` does not hold.
        signature: What pass 1 called, as far as it is free to compare.
    """

    rerun: Pass
    loss: Tensor
    recording: Recording
    before: Snapshot
    unseen: str | None
    signature: tuple


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
        replays: The same as given, if it is possible: not inside of a compiled model, nor where a replayed pass was
            found to be another one.
        drops: Whether outputs of blocks may be dropped: not where the model reads more than that of the last one.
        narrow: Whether only the selected weights take a gradient: not where passes ask for those of others.
        bits: Of the numbers in which pass 1 averages gradients over processes, where those are coarser than gradients.
        checked: What pass 1 called, by its signature, where pass 2 was found to be right, and the place of the call
            that the latest such replay began with.
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
        self.model, self.regions, self.state = model, regions, state
        self.begins, self.raises = begins, raises
        # Looked up once: to go through all modules takes as long as to launch a few blocks on a GPU.
        self.parameters: list[Tensor] = list(model.parameters())
        scripted = any(isinstance(block, torch.jit.ScriptModule) for block in blocks.values())
        hidden = scripted or regions.caller(model) is not model or regions.hide([model, *blocks.values()])
        own = [] if hidden else [regions.caller(block) for block in blocks.values()]
        self.replay = Replay(own, state.device, None if hidden else model)
        self.replays = replays and not hidden
        self.drops = True
        self.narrow = True
        self.bits = 64
        self.checked: dict[tuple, int] = {}
        # Which pass runs again, if one does: 2, or where nothing else helps 1.
        self.running = 0
        self._comparing = False
        self._comparisons, self._due = 0, 0
        # Places of the calls whose outputs are kept; `None` before the first recording.
        self._kept: Collection[int] | None = None
        self._settings: dict = {}
        self._settings_changed = 0
        wrappers = (m for m in called.modules() if isinstance(m, DistributedDataParallel))
        self._wrapper = next(wrappers, None)

    def record(self, pass_1: Pass, pass_2: Pass, alone: bool) -> MicroBatch:
        """
        Run pass 1 of a micro-batch, and record what pass 2 needs of it.

        Args:
            pass_1: Forward and backward.
            pass_2: The same again, for later.
            alone: Whether the optimizer step has no other micro-batch. If it has, the records of all of them lie in
                memory together, so only every second output is kept: a block more may run again, forward only.
        """
        before = self.state.before_pass_1()
        stride = 1 if alone else 2
        kept = None if self._kept is None or not self.drops else set(sorted(self._kept)[::stride])
        wrapper = self._wrapper
        is_sent = wrapper is not None and wrapper.require_forward_param_sync and wrapper.broadcast_buffers
        sent = (lambda: before.take_again(self.model.buffers())) if is_sent else None
        with self.replay.recording(self.replays, kept, sent) as recording:
            loss = pass_1()
        unseen = self.state.learn(before)
        if self.replays:
            known, self._kept = self._kept, {place - 1 for place in self.begins(recording)}
            if known is None:
                # All outputs are there, but a run that resumes is to begin where an uninterrupted one does.
                for place in set(range(len(recording.calls))).difference(sorted(self._kept)[::stride]):
                    recording.calls[place].kept = False
            if not self.replay.draws_on_host:
                after = RandomState.capture(self.state.device)
                self.replay.draws_on_host = not after.same_host_state(before.random)
                recording.replayable = not self.replay.draws_on_host
        calls = tuple((call.block, call.has_gradient) for call in recording.calls)
        signature = (calls, tuple(recording.models), self._settings_of_model())
        return MicroBatch(pass_2, loss, recording, before, unseen, signature)

    def _settings_of_model(self) -> int:
        """How often the values of the model's config have changed."""
        settings = vars(getattr(self.model, "config", self))
        plain = {k: v for k, v in settings.items() if isinstance(v, (bool, int, float, str, type(None)))}
        if self._settings != plain and settings is not vars(self):
            self._settings, self._settings_changed = plain, self._settings_changed + 1
        return self._settings_changed

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, passes may run again; afterwards all is as the last pass 1 left it."""
        after, marks = self.state.after_pass_1(), self.state.marks()
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
        self._new = {(micro_batch.signature, trained): self._start(micro_batch, blocks) for micro_batch in window}
        if all(self.checked.get(signature, -1) >= start for signature, start in self._new.items()):
            return False
        return self._comparisons < _MOST_COMPARISONS or self.state.steps >= self._due

    @staticmethod
    def _start(micro_batch: MicroBatch, blocks: set[int]) -> int:
        starts = micro_batch.recording.starts()
        return min((starts[block] for block in blocks if block in starts), default=0)

    def compare_with_pass_1(
        self, window: Sequence[MicroBatch], weights: Sequence[Tensor], plain: Sequence[Tensor], together: bool
    ) -> str | None:
        """
        See, where the weights are as they were, whether pass 2 repeats pass 1 when it is narrowed to `weights`.

        Otherwise it is narrowed no more, or a warning tells that it is another one.

        Args:
            window: Micro-batches in their order.
            weights: Parameters.
            plain: The gradients that pass 1 left.
            together: Whether every process calls this now; their gradients are then averaged, and they agree.

        Returns:
            Why pass 2 cannot run at all, if it cannot.
        """
        self._comparisons, self._due = self._comparisons + 1, 2 * self.state.steps
        losses = [micro_batch.loss for micro_batch in window]
        problems: list[str] = []
        for narrow in (True, False) if self.narrow else (False,):
            attempt = self._attempt(window, weights, None, narrow)
            problem = self._difference(window, attempt, losses, plain, together)
            if not self._any([problem is not None], together)[0]:
                if problems:
                    self.narrow = self.replays = False
                    logger.warning(self._message("for some of the weights alone, so that all take one", problems[0]))
                return None
            problems.append(problem or "in another process")
        failed = isinstance(attempt, Exception)
        if self._any([failed], together)[0]:
            logger.warning_once(
                f"Pass 2 of {type(self.model).__name__} fails where pass 1 did not ({problems[-1]}), so the plain "
                "gradient is used. Steps of this kind are counted in lsam/skipped."
            )
            return "pass 2 failed"
        self.replays = False
        logger.warning_once(
            f"Pass 2 does not repeat pass 1 of {type(self.model).__name__}: with the same batch, weights and random "
            f"state, {problems[-1]}. If it draws from a generator of its own, or depends on something that a pass "
            "changes, the perturbation climbs one loss and the gradient is that of another. Let it draw from the "
            "global generators, and keep what it changes in buffers or on the trainer."
        )
        return None

    def compare_with_replay(
        self, window: Sequence[MicroBatch], weights: Sequence[Tensor], blocks: set[int], together: bool
    ) -> list[Tensor]:
        """
        The gradients of a full pass 2; see whether a replayed one, where the weights are now, has the same.

        Args and returns: see `gradients`.
        """
        self._comparing = True
        full = self._attempt(window, weights, None, self.narrow)
        if isinstance(full, Exception):
            full = self._attempt(window, weights, None, False)
        ran, replayed, problem = [micro_batch.recording.last for micro_batch in window], full, None
        if self.replays and not isinstance(full, Exception):
            left = self._touched
            replayed = self._attempt(window, weights, blocks, self.narrow)
            problem = self._difference(window, replayed, *full, together=False)
            if problem is None and self._touched != left:
                problem = f"it leaves no {sorted(map(str, left[-1] - self._touched[-1]))[:3]} behind"
        self._comparing = False
        has_dropped = any(micro_batch.recording.has_dropped for micro_batch in window)
        differs, may_read = self._any([problem is not None, self.drops and has_dropped], together)
        if differs:
            for micro_batch, last in zip(window, ran, strict=True):
                micro_batch.recording.last = last
        # A resumed run compares, where an uninterrupted one replays: both go on from what is replayed.
        gradients = self._averaged(full if differs else replayed, weights, together)
        if differs and may_read:
            # Perhaps it only reads what was not kept: from the next step on everything is.
            self.drops = False
        elif differs:
            self.replays = False
            reason = problem or "in another process"
            logger.warning(self._message("from records of its blocks, so that it runs all of them", reason))
        elif not isinstance(full, Exception) and bool(norms([*full[1], *gradients]).isfinite().all()):
            self.checked.update(self._new)
        return gradients

    def gradients(
        self, window: Sequence[MicroBatch], weights: Sequence[Tensor], blocks: set[int] | None, together: bool
    ) -> list[Tensor]:
        """
        The gradients of all of `window` with respect to `weights`, where they are now; `.grad` stays as it is.

        Where a pass fails that is replayed, one in full follows, then one for all weights. Where that fails, too, the
        gradients are not numbers.

        Args:
            window: Micro-batches in their order.
            weights: Parameters.
            blocks: Indices of the blocks that hold a weight which is not where it was in pass 1; `None` replays
                nothing.
            together: Whether every process calls this now, and the gradients are their mean.
        """
        ways = (
            [(blocks, True)] * (self.replays and blocks is not None) + [(None, True)] * self.narrow + [(None, False)]
        )
        for perturbed, narrow in ways:
            attempt = self._attempt(window, weights, perturbed, narrow and self.narrow)
            if not isinstance(attempt, Exception):
                break
            if isinstance(attempt, DroppedError):
                self.drops = False
            else:
                # It is compared anew at the next step.
                self.checked.clear()
                self._comparisons = 0
                logger.warning_once(
                    f"Pass 2 of {type(self.model).__name__} failed ({_told(attempt)}). It is run again in full and, if"
                    " that fails, for all weights; if nothing helps, the plain gradient is used."
                )
        return self._averaged(attempt, weights, together)

    def pass_1_again(self, window: Sequence[MicroBatch], weights: Sequence[Tensor], together: bool) -> list[Tensor]:
        """The gradients of pass 1, where they were let go of and pass 2 fails at any weights."""
        return self._averaged(self._attempt(window, weights, None, False, running=1), weights, together)

    @staticmethod
    def _averaged(
        attempt: "tuple[list[Tensor], list[Tensor]] | Exception", weights: Sequence[Tensor], together: bool
    ) -> list[Tensor]:
        if isinstance(attempt, Exception):
            attempt = [], [torch.full_like(weight, torch.nan) for weight in weights]
        return average_over_ranks(attempt[1]) if together else attempt[1]

    def _attempt(
        self,
        window: Sequence[MicroBatch],
        weights: Sequence[Tensor],
        perturbed: set[int] | None,
        narrow: bool,
        running: int = 2,
    ) -> tuple[list[Tensor], list[Tensor]] | Exception:
        """The losses of a pass 2 over each micro-batch, and the gradients of all together; or what it raised."""
        taken = self.regions.taken_with(weights) if narrow else [p for p in self.parameters if p.requires_grad]
        losses = []
        self._touched: list[set] = []
        try:
            with only_gradients_of(self.parameters, taken, self.state.foreign):
                for micro_batch in window:
                    micro_batch.before.put()
                    self.running = running
                    with self.replay.replaying(micro_batch.recording, perturbed):
                        losses.append(micro_batch.rerun())
                    self.state.settle()
                    if self._comparing:
                        self._touched.append(micro_batch.before.touched())
                return losses, [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        except Exception as error:
            if self.raises(error):
                raise
            return error
        finally:
            self.running = 0

    def _difference(
        self,
        window: Sequence[MicroBatch],
        attempt: tuple[list[Tensor], list[Tensor]] | Exception,
        losses: Sequence[Tensor],
        gradients: Sequence[Tensor],
        together: bool,
    ) -> str | None:
        """What to tell of an attempt that has not these losses and gradients."""
        own = self._averaged(attempt, gradients, together)
        if isinstance(attempt, Exception):
            return _told(attempt)
        outputs = [call.dtype for micro_batch in window for call in micro_batch.recording.calls]
        dtypes = [*outputs, *(tensor.dtype for tensor in (*losses, *gradients))]
        bits = min(self.bits if together else 64, *(torch.finfo(dtype).bits for dtype in dtypes))
        if bits == 32 and (not outputs or torch.get_float32_matmul_precision() != "highest"):
            bits = 16
        for loss, other in zip(losses, attempt[0], strict=True):
            one, two = loss.item(), other.item()
            if abs(one - two) > _TOLERANCE[bits] * max(abs(one), abs(two), 1.0):
                return f"the loss was {one}, then {two}"
        apart = distance(own, gradients)
        return f"gradients are apart by {apart:.2g} of their norm" if apart > _TOLERANCE[bits] else None

    def _any(self, flags: Sequence[bool], together: bool) -> list[bool]:
        return any_of_ranks(flags, self.state.device) if together else list(flags)

    def _message(self, way: str, reason: str) -> str:
        return (
            f"Pass 2 of {type(self.model).__name__} cannot be run {way} from now on ({reason}). It is correct, and "
            "slower: lsam/overhead tells how much. Models whose loss reads what blocks leave behind, such as the "
            "auxiliary loss of mixtures of experts, and trainers that clip or change gradients within training_step "
            "are among these."
        )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
