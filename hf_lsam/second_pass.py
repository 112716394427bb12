"""Pass 2: the same micro-batches again, from the first perturbed block on, for gradients of the selected weights.

Either saving may be wrong for some model or loss. So at the first perturbed step, and whenever the calls of pass 1 or
the trained parameters change, two passes are compared, in loss and gradients: at the unmoved weights, a full pass 2
with pass 1; at the moved weights, a replayed pass 2 with a full one. If they differ, the saving is no longer used.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from transformers.utils import logging

from .compiled import CompiledRegions
from .distributed import any_of_ranks, average_over_ranks
from .held import RandomState
from .pass_state import PassState, Snapshot
from .passes import only_gradients_of, outline_of, remove_hooks
from .perturbation import Tensors, distance, norms
from .replay import DroppedError, Recording, Replay
from .structure import Structure

logger = logging.get_logger(__name__)

Pass = Callable[[], Tensor]
Window = Sequence["MicroBatch"]

# Relative difference up to which two passes agree, by the bits of their least precise dtype: other kernels round
# differently, and `torch.matmul` may choose another one where a weight needs no gradient.
_TOLERANCE = {64: 1e-9, 32: 1e-4, 16: 3e-2}
_MOST_COMPARISONS = 8  # after this many comparisons, the next one waits until the number of steps has doubled


@dataclass
class MicroBatch:
    """A micro-batch between its two passes."""

    rerun: Pass
    loss: Tensor
    recording: Recording
    before: Snapshot
    after: RandomState
    uncopied: str | None  # the name of a tensor that pass 1 changed and of which `before` holds no copy
    signature: tuple  # the calls of pass 1 and the configuration of the model: a pass 2 is compared once for each


@dataclass
class Attempt:
    """The result of a pass over some micro-batches, or its error."""

    losses: list[Tensor] = field(default_factory=list)  # of each micro-batch
    gradients: list[Tensor] = field(default_factory=list)  # of all micro-batches together
    assigned: list[set] = field(default_factory=list)  # `Snapshot.assigned` after each micro-batch
    error: Exception | None = None

    @property
    def failure(self) -> str:
        """The error in one line."""
        return f"{type(self.error).__name__}: {(str(self.error).splitlines() or [''])[0]}"


class SecondPass:
    """Runs micro-batches of a model a second time.

    `replays` says whether replay can save anything, `replay_starts` at which calls it may begin after a pass 1, and
    `raises` whether an error of pass 2 is raised, instead of trying a more expensive pass 2.
    """

    def __init__(
        self,
        structure: Structure,
        blocks: Mapping[str, nn.Module],
        regions: CompiledRegions,
        state: PassState,
        parameters: list[Tensor],
        replays: bool,
        replay_starts: Callable[[Recording], Collection[int]],
        raises: Callable[[Exception], bool],
    ):
        self.structure, self.regions, self.state, self.parameters = structure, regions, state, parameters
        self.model = model = structure.model
        self.name, self.replay_starts, self.raises = type(model).__name__, replay_starts, raises
        self._wrapper = next((m for m in structure.modules if isinstance(m, DistributedDataParallel)), None)
        scripted = any(isinstance(block, torch.jit.ScriptModule) for block in blocks.values())
        hidden = scripted or regions.caller(model) is not model or regions.contains_any([model, *blocks.values()])
        own = [] if hidden else [regions.caller(block) for block in blocks.values()]
        self.replay = Replay(own, state.device, None if hidden else model)
        self.replays = replays and not hidden  # false once a replayed pass differs from a full one
        self.drops = True  # whether outputs at which no replay begins are dropped; false once the model reads one
        self.narrow = True  # whether only the selected weights require gradients; false once that changes them
        self.alters = False  # whether a pass 1 has changed gradients after its last backward pass
        self.collective = True  # whether all processes run these passes now, average their gradients, and agree
        self.bits = 64  # of the dtype in which gradients are averaged, where it is less precise than theirs
        self._outline: tuple[str, ...] = ()  # of the losses of this pass 1
        self.running = 0  # 2 in pass 2, 1 where pass 1 runs again
        self.checked: dict[tuple, int] = {}  # by signature and trained parameters: latest start of a correct pass 2
        self._comparisons, self._due = 0, 0
        self._kept: list[int] | None = None  # indices of calls whose outputs are kept; `None`: not known yet

    def see(self, loss: Tensor) -> None:
        """To be called with the loss of a pass 1 before its backward pass."""
        self._outline += outline_of(loss)

    def record(self, pass_1: Pass, pass_2: Pass, alone: bool) -> MicroBatch:
        """Run pass 1 of a micro-batch, and record what pass 2 needs; `alone`: it is the only one of the step."""
        # Several recordings are in memory at once, so they keep every second output only, and replay one block less.
        before, stride, known = self.state.before_pass_1(), 1 if alone else 2, self._kept
        sends = self._wrapper is not None and self._wrapper.will_sync_module_buffers()
        first_call = partial(before.refresh, self.model.buffers()) if sends else None
        kept = None if known is None or not self.drops else set(known[::stride])
        self._outline = ()
        with self.replay.recording(self.replays, kept, first_call) as recording:
            loss = pass_1()
        uncopied, after = self.state.keep_changes(before), RandomState.capture(self.state.device)
        if self.replays:
            self._kept = sorted(place - 1 for place in self.replay_starts(recording))
            if known is None:
                # All outputs were recorded, but a resumed run must begin its replay where an uninterrupted one does.
                for place, call in enumerate(recording.calls):
                    call.kept = place in self._kept[::stride]
        if not self.replay.draws_on_host and not after.same_host_state(before.random):
            self.replay.draws_on_host = True
            for call in recording.calls:
                call.kept = False  # cannot be replayed without the states of these generators
        settings = getattr(getattr(self.model, "config", None), "__dict__", {}).items()
        plain = tuple(item for item in settings if isinstance(item[1], (int, float, str, type(None))))
        calls = tuple((call.block, call.has_gradient) for call in recording.calls)
        signature = (calls, tuple(recording.models), plain, self._outline)
        return MicroBatch(pass_2, loss, recording, before, after, uncopied, signature)

    @contextmanager
    def reruns(self, window: Window) -> Iterator[None]:
        """Inside, passes may run again; afterwards everything is as the last pass 1 left it."""
        after, marks = self.state.after_pass_1(window[-1].after), self.state.marks()
        try:
            yield
        finally:
            after.put()
            self.state.warn_of_changes(marks)

    def agree(self, window: Window, blocks: set[int], trained: int, changed: bool) -> tuple[bool, bool]:
        """Whether this pass 2 is to be compared, and whether pass 1 `changed` what is not copied, in any process."""
        is_due, changed, alters = self.any(self.is_due(window, blocks, trained), changed, self.alters)
        if alters and self.narrow:
            self.run_in_full("its training_step changes gradients after the backward pass")
        return is_due, changed

    def is_due(self, window: Window, blocks: set[int], trained: int) -> bool:
        """Whether this pass 2, with `blocks` perturbed and parameters `trained` (their number), is to be compared."""
        self._new = {(batch.signature, trained): batch.recording.start(blocks) for batch in window}
        if all(self.checked.get(signature, -1) >= start for signature, start in self._new.items()):
            return False
        return self._comparisons < _MOST_COMPARISONS or self.state.steps >= self._due

    def compare_with_pass_1(self, window: Window, weights: Tensors, plain: Tensors) -> str | None:
        """Compare a full pass 2 for `weights` with pass 1 and its `plain` gradients; returns why a step is skipped."""
        self._comparisons, self._due = self._comparisons + 1, 2 * self.state.steps
        pass_1 = Attempt([micro_batch.loss for micro_batch in window], list(plain))
        problems: list[str] = []
        for narrow in [True] * self.narrow + [False]:
            attempt = self._attempt(window, weights, None, narrow)
            attempt.gradients = self._averaged(attempt, weights)
            problem = self._difference(window, pass_1, attempt)
            if not self.any(problem is not None)[0]:
                if problems:
                    self.run_in_full(problems[0])
                return None
            problems.append(problem or "they differ in another process")
        if self.any(attempt.error is not None)[0]:
            logger.warning_once(
                f"Pass 2 of {self.name} fails where pass 1 did not ({problems[-1]}), so the plain gradient is used. "
                "Steps of this kind are counted in lsam/skipped."
            )
            return "pass 2 failed"
        self.replays = False
        logger.warning_once(
            f"Pass 2 does not repeat pass 1 of {self.name}: with the same batch, weights and random state, "
            f"{problems[-1]}. The perturbation is then computed for one loss and the gradient for another. The model "
            "may draw from a random generator of its own, or change a state that cannot be restored. Use the global "
            "generators, and keep the state in buffers or attributes."
        )
        return None

    def compare_with_replay(self, window: Window, weights: Tensors, blocks: set[int]) -> list[Tensor]:
        """As `gradients`, after a comparison of a replayed pass 2 with a full one at the weights as they are now."""
        full = self._attempt(window, weights, None, self.narrow, with_changes=True)
        if full.error is not None:
            full = self._attempt(window, weights, None, False, with_changes=True)
        recordings = [micro_batch.recording for micro_batch in window]
        ran, replayed, problem = [recording.last for recording in recordings], full, None
        if self.replays and full.error is None:
            replayed = self._attempt(window, weights, blocks, self.narrow, with_changes=True)
            problem = self._difference(window, full, replayed)
            if problem is None and replayed.assigned != full.assigned:
                problem = f"it does not assign {sorted(map(str, full.assigned[-1] - replayed.assigned[-1]))[:3]}"
        has_dropped = any(recording.has_dropped for recording in recordings)
        differs, may_read = self.any(problem is not None, self.drops and has_dropped)
        # A resumed run compares where an uninterrupted one only replays, so both use the replayed gradients.
        gradients = self._averaged(full if differs else replayed, weights)
        if not differs:
            if full.error is None and bool(norms([*full.gradients, *gradients]).isfinite().all()):
                self.checked.update(self._new)
            return gradients
        for recording, last in zip(recordings, ran, strict=True):
            recording.last = last
        if may_read:
            # The difference may come from an output that was not kept: from the next step on, all are.
            self.drops = False
        else:
            self.replays = False
            self._warn_slower("by replay of block outputs", problem)
        return gradients

    def run_in_full(self, problem: str) -> None:
        """Let pass 2 compute all gradients from now on, without a replay."""
        self.narrow = self.replays = False
        self._warn_slower("for gradients of the selected weights only", problem)

    def gradients(self, window: Window, weights: Tensors, blocks: set[int]) -> list[Tensor]:
        """The gradients of `weights`, moved in `blocks`: by a replay or, if it fails, more expensively; else NaN."""
        for way in [(blocks, self.narrow)] * self.replays + [(None, True)] * self.narrow + [(None, False)]:
            attempt = self._attempt(window, weights, *way)
            if attempt.error is None:
                break
            if isinstance(attempt.error, DroppedError):
                self.drops = False
                continue
            self.checked.clear()
            self._comparisons = 0  # the next step compares again
            logger.warning_once(
                f"Pass 2 of {self.name} failed ({attempt.failure}). It is run again in full and, if that fails, for "
                "all weights; if that fails, too, the plain gradient is used."
            )
        return self._averaged(attempt, weights)

    def pass_1_again(self, window: Window, weights: Tensors) -> list[Tensor]:
        """The gradients of pass 1, computed again, since they were freed."""
        return self._averaged(self._attempt(window, weights, None, False, running=1), weights)

    def any(self, *flags: bool) -> list[bool]:
        """For each of `flags`, whether it is set in any of the processes that run these passes."""
        return any_of_ranks(flags, self.state.device) if self.collective else list(flags)

    def _averaged(self, attempt: Attempt, weights: Tensors) -> list[Tensor]:
        """The gradients, averaged over the processes that run these passes; NaN if the attempt has failed."""
        failed = attempt.error is not None
        gradients = [torch.full_like(weight, torch.nan) for weight in weights] if failed else attempt.gradients
        return average_over_ranks(gradients) if self.collective else gradients

    def _attempt(
        self, window: Window, weights: Tensors, perturbed: set[int] | None, narrow: bool, with_changes=False, running=2
    ) -> Attempt:
        """One way to run pass 2: blocks before the first of `perturbed` are replayed (`None`: in full)."""
        taken = self.regions.whole_regions(weights) if narrow else [p for p in self.parameters if p.requires_grad]
        losses, assigned, next_hook = [], [], RemovableHandle.next_id
        try:
            with only_gradients_of(self.parameters, taken, self.state.foreign):
                for micro_batch in window:
                    micro_batch.before.put(self.replay.draws_on_host)
                    self.running = running
                    with self.replay.replaying(micro_batch.recording, perturbed):
                        losses.append(micro_batch.rerun())
                    self.state.undo_pass_2()
                    if with_changes:
                        assigned.append(micro_batch.before.assigned())
                return Attempt(losses, [torch.zeros_like(w) if w.grad is None else w.grad for w in weights], assigned)
        except Exception as error:
            remove_hooks(self.structure.modules, self.parameters, next_hook)
            if self.raises(error):
                raise
            return Attempt(error=error)
        finally:
            self.running = 0

    def _difference(self, window: Window, wanted: Attempt, attempt: Attempt) -> str | None:
        """How the losses or gradients of `attempt` differ from the `wanted` ones; `None` if they do not."""
        if attempt.error is not None:
            return attempt.failure
        outputs = [call.dtype for micro_batch in window for call in micro_batch.recording.calls]
        dtypes = [*outputs, *(tensor.dtype for tensor in (*wanted.losses, *wanted.gradients))]
        bits = min(self.bits if self.collective else 64, *(torch.finfo(dtype).bits for dtype in dtypes))
        if bits == 32 and (not outputs or torch.get_float32_matmul_precision() != "highest"):
            bits = 16
        for loss, other in zip(wanted.losses, attempt.losses, strict=True):
            one, two = loss.item(), other.item()
            if abs(one - two) > _TOLERANCE[bits] * max(abs(one), abs(two), 1.0):
                return f"the loss was {one}, then {two}"
        apart = distance(attempt.gradients, wanted.gradients)
        return f"the gradients differ by {apart:.2g} of their norm" if apart > _TOLERANCE[bits] else None

    def _warn_slower(self, way: str, problem: str | None) -> None:
        logger.warning(
            f"Pass 2 of {self.name} cannot be run {way} from now on ({problem or 'they differ in another process'}). "
            "It is correct but slower: see lsam/overhead. Typical causes are a loss that reads what blocks store (the "
            "auxiliary loss of mixtures of experts), and a training_step that clips or changes gradients."
        )
