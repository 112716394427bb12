"""Pass 2: the same micro-batches again, from the first perturbed block on and for the gradients of a few weights."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from .compiled import CompiledRegions
from .distributed import any_of_ranks, average_over_ranks
from .held import RandomState
from .pass_state import PassState, Snapshot
from .passes import only_gradients_of
from .perturbation import Tensors, distance, norms
from .replay import DroppedError, Recording, Replay

logger = logging.get_logger(__name__)

Pass = Callable[[], Tensor]
Window = Sequence["MicroBatch"]

# How far two passes over the same may be apart, as a share of the gradient, by the bits of the coarsest numbers in
# them: where a weight takes no gradient, `torch.matmul` may choose another kernel, whose last bits differ.
_TOLERANCE = {64: 1e-9, 32: 1e-4, 16: 3e-2}
# So many comparisons are made whenever they are due; from then on only where the number of steps has doubled.
_MOST_COMPARISONS = 8


@dataclass
class MicroBatch:
    """A micro-batch between its two passes."""

    rerun: Pass
    loss: Tensor
    recording: Recording
    before: Snapshot
    after: RandomState
    unseen: str | None  # the name of something that pass 1 changed and that `before` does not hold
    signature: tuple  # what pass 1 called, as far as it is free to compare


@dataclass
class Attempt:
    """A pass over some micro-batches: the loss of each and what it left, the gradients of all; or an error."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    left: list[set] = field(default_factory=list)
    error: Exception | None = None

    @property
    def failure(self) -> str:
        """What to tell of the error."""
        message, _, _ = str(self.error).partition("\n")
        return f"{type(self.error).__name__}: {message}"


class SecondPass:
    """Runs micro-batches a second time. Replays begin where `begins` says; errors may be for the caller (`raises`)."""

    def __init__(
        self,
        model: nn.Module,
        called: nn.Module,
        blocks: Mapping[str, nn.Module],
        regions: CompiledRegions,
        state: PassState,
        parameters: list[Tensor],
        replays: bool,
        begins: Callable[[Recording], Collection[int]],
        raises: Callable[[Exception], bool],
    ):
        self.model, self.regions, self.state, self.begins, self.raises = model, regions, state, begins, raises
        self.name, self.parameters = type(model).__name__, parameters
        # Looked up seldom: to go through all modules takes as long as to launch a few blocks on a GPU.
        self.called, self.modules = called, list(called.modules())
        self._wrapper = next((m for m in self.modules if isinstance(m, DistributedDataParallel)), None)
        scripted = any(isinstance(block, torch.jit.ScriptModule) for block in blocks.values())
        hidden = scripted or regions.caller(model) is not model or regions.hide([model, *blocks.values()])
        own = [] if hidden else [regions.caller(block) for block in blocks.values()]
        self.replay = Replay(own, state.device, None if hidden else model)
        # Not inside of a compiled model, nor where a replayed pass was found to be another one.
        self.replays = replays and not hidden
        # Whether outputs of blocks may be dropped: not where the model reads more than that of the last one.
        self.drops = True
        # Whether only the selected weights take a gradient: not where passes ask for those of others.
        self.narrow = True
        # Whether every process runs these passes now; their gradients are then averaged, and they agree.
        self.together = True
        # Of the numbers in which processes average gradients, where those are coarser than the gradients.
        self.bits = 64
        self.running = 0  # 2 in pass 2, 1 where pass 1 runs again
        # By its signature, a pass 1 whose pass 2 was found to be right, and where the latest such replay began.
        self.checked: dict[tuple, int] = {}
        self._comparisons, self._due = 0, 0
        # Places of the calls whose outputs are kept; `None` before the first recording.
        self._kept: list[int] | None = None

    def record(self, pass_1: Pass, pass_2: Pass, alone: bool) -> MicroBatch:
        """Run pass 1 of a micro-batch, and record what pass 2 needs of it."""
        # Records of several lie in memory together, so of those every second output is kept: a block more runs again.
        before, stride, known = self.state.before_pass_1(), 1 if alone else 2, self._kept
        if self.state.looks:
            self.modules = list(self.called.modules())
        sends = self._wrapper is not None and self._wrapper.will_sync_module_buffers()
        first_call = partial(before.take_again, self.model.buffers()) if sends else None
        kept = None if known is None or not self.drops else set(known[::stride])
        with self.replay.recording(self.replays, kept, first_call) as recording:
            loss = pass_1()
        unseen, after = self.state.learn(before), RandomState.capture(self.state.device)
        if self.replays:
            self._kept = sorted(place - 1 for place in self.begins(recording))
            if known is None:
                # All outputs are there, but a run that resumes is to begin where an uninterrupted one does.
                for place, call in enumerate(recording.calls):
                    call.kept = place in self._kept[::stride]
        if not self.replay.draws_on_host and not after.same_host_state(before.random):
            self.replay.draws_on_host = True
            for call in recording.calls:
                call.kept = False  # without these states it cannot be replayed
        settings = getattr(getattr(self.model, "config", None), "__dict__", {}).items()
        plain = tuple(item for item in settings if isinstance(item[1], (int, float, str, type(None))))
        calls = tuple((call.block, call.has_gradient) for call in recording.calls)
        signature = (calls, tuple(recording.models), plain)
        return MicroBatch(pass_2, loss, recording, before, after, unseen, signature)

    @contextmanager
    def aside(self, window: Window) -> Iterator[None]:
        """Inside, passes may run again; afterwards all is as the last pass 1 left it."""
        after, marks = self.state.after_pass_1(window[-1].after), self.state.marks()
        try:
            yield
        finally:
            after.put()
            self.state.tell_changes(marks)

    def is_due(self, window: Window, blocks: set[int], trained: int) -> bool:
        """Whether pass 2, where `blocks` and these weights are `trained`, was not yet compared for what it calls."""
        self._new = {(batch.signature, trained): batch.recording.start(blocks) for batch in window}
        if all(self.checked.get(signature, -1) >= start for signature, start in self._new.items()):
            return False
        return self._comparisons < _MOST_COMPARISONS or self.state.steps >= self._due

    def compare_with_pass_1(self, window: Window, weights: Tensors, plain: Tensors) -> str | None:
        """See whether pass 2, narrowed to `weights`, has pass 1's `plain` gradients; returns why it cannot run."""
        self._comparisons, self._due = self._comparisons + 1, 2 * self.state.steps
        pass_1 = Attempt([micro_batch.loss for micro_batch in window], list(plain))
        problems: list[str] = []
        for narrow in [True] * self.narrow + [False]:
            attempt = self._attempt(window, weights, None, narrow)
            attempt.gradients = self._averaged(attempt, weights)
            problem = self._difference(window, pass_1, attempt)
            if not self.any(problem is not None)[0]:
                if problems:
                    self.narrow = self.replays = False
                    self._tell_slower("for some of the weights alone, so that all take one", problems[0])
                return None
            problems.append(problem or "in another process")
        if self.any(attempt.error is not None)[0]:
            logger.warning_once(
                f"Pass 2 of {self.name} fails where pass 1 did not ({problems[-1]}), so the plain gradient is used. "
                "Steps of this kind are counted in lsam/skipped."
            )
            return "pass 2 failed"
        self.replays = False
        logger.warning_once(
            f"Pass 2 does not repeat pass 1 of {self.name}: with the same batch, weights and random state, "
            f"{problems[-1]}. If it draws from a generator of its own, or depends on something that a pass changes, "
            "the perturbation climbs one loss and the gradient is that of another. Let it draw from the global "
            "generators, and keep what it changes in buffers or on the trainer."
        )
        return None

    def compare_with_replay(self, window: Window, weights: Tensors, blocks: set[int]) -> list[Tensor]:
        """As `gradients`, of a full pass 2; see whether a replayed one, where the weights are now, has the same."""
        full = self._attempt(window, weights, None, self.narrow, looks=True)
        if full.error is not None:
            full = self._attempt(window, weights, None, False, looks=True)
        recordings = [micro_batch.recording for micro_batch in window]
        ran, replayed, problem = [recording.last for recording in recordings], full, None
        if self.replays and full.error is None:
            replayed = self._attempt(window, weights, blocks, self.narrow, looks=True)
            problem = self._difference(window, full, replayed)
            if problem is None and replayed.left != full.left:
                problem = f"it leaves no {sorted(map(str, full.left[-1] - replayed.left[-1]))[:3]} behind"
        has_dropped = any(recording.has_dropped for recording in recordings)
        differs, may_read = self.any(problem is not None, self.drops and has_dropped)
        # A resumed run compares, where an uninterrupted one replays: both go on from what is replayed.
        gradients = self._averaged(full if differs else replayed, weights)
        if not differs:
            if full.error is None and bool(norms([*full.gradients, *gradients]).isfinite().all()):
                self.checked.update(self._new)
            return gradients
        for recording, last in zip(recordings, ran, strict=True):
            recording.last = last
        if may_read:
            # Perhaps it only reads what was not kept: from the next step on everything is.
            self.drops = False
        else:
            self.replays = False
            self._tell_slower("from records of its blocks, so that it runs all of them", problem)
        return gradients

    def gradients(self, window: Window, weights: Tensors, blocks: set[int]) -> list[Tensor]:
        """Those of `weights`, moved in `blocks`: by a replay, else in full, else for all weights, else not numbers."""
        for way in [(blocks, self.narrow)] * self.replays + [(None, True)] * self.narrow + [(None, False)]:
            attempt = self._attempt(window, weights, *way)
            if attempt.error is None:
                break
            if isinstance(attempt.error, DroppedError):
                self.drops = False
                continue
            self.checked.clear()
            self._comparisons = 0  # it is compared anew at the next step
            logger.warning_once(
                f"Pass 2 of {self.name} failed ({attempt.failure}). It is run again in full and, if that fails, for "
                "all weights; if nothing helps, the plain gradient is used."
            )
        return self._averaged(attempt, weights)

    def pass_1_again(self, window: Window, weights: Tensors) -> list[Tensor]:
        """The gradients of pass 1, where they were let go of."""
        return self._averaged(self._attempt(window, weights, None, False, running=1), weights)

    def any(self, *flags: bool) -> list[bool]:
        """Each of `flags`, set if it is so in any process that runs these passes with this one."""
        return any_of_ranks(flags, self.state.device) if self.together else list(flags)

    def _averaged(self, attempt: Attempt, weights: Tensors) -> list[Tensor]:
        """Over all processes; not numbers, where the attempt has failed."""
        failed = attempt.error is not None
        gradients = [torch.full_like(weight, torch.nan) for weight in weights] if failed else attempt.gradients
        return average_over_ranks(gradients) if self.together else gradients

    def _attempt(
        self, window: Window, weights: Tensors, perturbed: set[int] | None, narrow: bool, looks=False, running=2
    ) -> Attempt:
        """Pass 2, which replays what it can where `perturbed` are moved; `looks` asks for what it leaves."""
        taken = self.regions.taken_with(weights) if narrow else [p for p in self.parameters if p.requires_grad]
        losses, left = [], []
        try:
            with only_gradients_of(self.parameters, taken, self.state.foreign):
                for micro_batch in window:
                    micro_batch.before.put(self.replay.draws_on_host)
                    self.running = running
                    with self.replay.replaying(micro_batch.recording, perturbed):
                        losses.append(micro_batch.rerun())
                    self.state.settle()
                    if looks:
                        left.append(micro_batch.before.touched())
                return Attempt(losses, [torch.zeros_like(w) if w.grad is None else w.grad for w in weights], left)
        except Exception as error:
            if self.raises(error):
                raise
            return Attempt(error=error)
        finally:
            self.running = 0

    def _difference(self, window: Window, wanted: Attempt, attempt: Attempt) -> str | None:
        """What to tell of an `attempt` that has not the losses and gradients of the `wanted` one."""
        if attempt.error is not None:
            return attempt.failure
        outputs = [call.dtype for micro_batch in window for call in micro_batch.recording.calls]
        dtypes = [*outputs, *(tensor.dtype for tensor in (*wanted.losses, *wanted.gradients))]
        bits = min(self.bits if self.together else 64, *(torch.finfo(dtype).bits for dtype in dtypes))
        if bits == 32 and (not outputs or torch.get_float32_matmul_precision() != "highest"):
            bits = 16
        for loss, other in zip(wanted.losses, attempt.losses, strict=True):
            one, two = loss.item(), other.item()
            if abs(one - two) > _TOLERANCE[bits] * max(abs(one), abs(two), 1.0):
                return f"the loss was {one}, then {two}"
        apart = distance(attempt.gradients, wanted.gradients)
        return f"gradients are apart by {apart:.2g} of their norm" if apart > _TOLERANCE[bits] else None

    def _tell_slower(self, way: str, problem: str | None) -> None:
        reason = problem or "in another process"
        logger.warning(
            f"Pass 2 of {self.name} cannot be run {way} from now on ({reason}). It is correct, and slower: "
            "lsam/overhead tells how much. This is so where a loss reads what blocks leave behind (as the auxiliary "
            "loss of mixtures of experts does), or training_step clips or changes gradients."
        )
