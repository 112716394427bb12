"""Pass 2: the same micro-batches again, from the first perturbed block on and for the gradients of a few weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers.utils import logging

from .compiled import CompiledRegions
from .distributed import any_of_ranks, is_distributed
from .passes import Buffers, norm_layers, only_gradients_of, running_statistics_paused
from .replay import DroppedError, Recording, Replay, ReplayError
from .shards import compute_device

logger = logging.get_logger(__name__)

Pass = Callable[[], Tensor]

# What other kernels make of a loss, in 16 bits, is less than this share of it.
_OTHER_KERNELS = 0.01


@dataclass
class MicroBatch:
    """
    A micro-batch between its two passes.

    Attributes:
        buffers: What pass 1 read of the buffers that passes change.
    """

    rerun: Pass
    loss: Tensor
    recording: Recording
    buffers: dict[Tensor, Tensor]


class SecondPass:
    """
    Runs micro-batches a second time.

    Args:
        model: The model itself.
        blocks: Its blocks.
        regions: What of it is compiled.
        beside: Parameters that are trained but not the model's.
        earliest: Index of the first block that may be perturbed; outputs before it are not needed.
        replays: Whether to replay the blocks before the first perturbed one.

    Attributes:
        replays: The same, and that it is possible: not inside of a compiled model, nor where a replayed pass was found
            to be another one.
        drops: Whether outputs of blocks may be dropped: not where the model reads more than that of the last one.
        narrow: Whether only the selected weights take a gradient: not where the loss asks for those of others.
        checked: Blocks without whose outputs a replay was found to be right; `None` before the first look.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        regions: CompiledRegions,
        beside: Sequence[Tensor],
        earliest: int,
        replays: bool,
    ):
        self.model = model
        self.regions = regions
        # Looked up once: to go through all modules takes as long as to launch a few blocks on a GPU.
        self.parameters = list(dict.fromkeys([*model.parameters(), *beside]))
        self.known = set(self.parameters)
        self.norms = norm_layers(model)
        self.buffers = Buffers(model, self.norms)
        hidden = regions.hide(blocks)
        self.blocks = [] if hidden else [regions.caller(block) for block in blocks]
        self.device = compute_device(next(model.parameters()))
        self.replay = Replay(self.blocks, self.device)
        # The same in all processes, as are `drops` and `checked` with `sharpness_scope="batch"`.
        self.may_replay = replays and not hidden
        self.replays = self.may_replay
        self.earliest = earliest
        self.drops = True
        self.narrow = True
        self.checked: frozenset[int] | None = None

    def record(self, pass_1: Pass, pass_2: Pass, alone: bool) -> MicroBatch:
        """
        Run pass 1 of a micro-batch, and record what pass 2 needs of it.

        Args:
            pass_1: Forward and backward.
            pass_2: The same again, for later.
            alone: Whether the optimizer step has no other micro-batch. If it has, the records of all of them lie in
                memory together, so only every second output is kept: a block more may run again, forward only.
        """
        with (
            self.buffers.noted() as buffers,
            self.replay.recording(self.replays, self._dropped(1 if alone else 2)) as recording,
        ):
            loss = pass_1()
        return MicroBatch(pass_2, loss, recording, buffers)

    def _dropped(self, stride: int) -> frozenset[int]:
        """Blocks whose outputs are not kept: all but each `stride`-th from the one before the earliest on."""
        if not self.drops:
            return frozenset()
        return frozenset(range(len(self.blocks))) - set(range(self.earliest - 1, len(self.blocks), stride))

    def check(self, window: Sequence[MicroBatch], together: bool) -> None:
        """
        Replaying all it can at the unperturbed weights must give the loss of pass 1, bitwise.

        Or that of a full pass 2: where weights take no gradient `torch.matmul` may choose another kernel than in pass
        1, whose last bit differs on some CPUs. That pass is run by a single process only, as others would wait for it.

        Looked at once, in the last micro-batch, and again where more outputs are dropped than before. A model that
        reads dropped ones gets all of them from the next step on, and a full pass 2 in this one.

        Args:
            window: Micro-batches in their order.
            together: Whether every process calls this now. They then agree, so that each runs as many passes as the
                others: a loss may communicate.
        """
        micro_batch = window[-1]
        dropped = micro_batch.recording.dropped
        if not self.may_replay or (self.checked is not None and dropped <= self.checked):
            return
        problem = self._problem(micro_batch) if micro_batch.recording.calls else None
        flags = [bool(micro_batch.recording.calls), problem is not None]
        looked, failed = any_of_ranks(flags, self.device) if together else flags
        if failed and dropped:
            self.drops = False
            for entry in window:
                entry.recording.replayable = False
        elif failed:
            self._give_up_replay(problem or self._no_replay("another process found that it cannot"))
        elif looked:
            self.checked = dropped

    def _problem(self, micro_batch: MicroBatch) -> str | None:
        """
        What to tell of a replay of all it can, if it is not right; may find that other weights need their gradients.
        """
        for block in (call.block for call in reversed(micro_batch.recording.calls)):
            weights = [p for p in self.blocks[block].parameters() if p.requires_grad and p.grad is not None]
            if weights:
                break
        replayed = self._attempt(micro_batch, weights, {block})
        if isinstance(replayed, Tensor) and torch.equal(replayed, micro_batch.loss):
            return None
        # A loss that reads dropped outputs, or what blocks leave behind, is no wonder without these. Others are.
        strange = isinstance(replayed, Exception) and not isinstance(replayed, ReplayError)
        if not is_distributed() and (strange or not micro_batch.recording.dropped):
            full = self._attempt(micro_batch, weights, None)
            if isinstance(full, Exception):
                self.narrow = False
            elif isinstance(replayed, Tensor) and torch.equal(replayed, full):
                return None
            elif not torch.allclose(full, micro_batch.loss, rtol=_OTHER_KERNELS):
                return self._no_repeat(micro_batch.loss, full)
        elif strange:
            self.narrow = False
        if isinstance(replayed, Exception):
            return self._no_replay(f"{type(replayed).__name__}: {replayed}")
        return self._no_replay(f"the loss was {replayed.item()} instead of {micro_batch.loss.item()}")

    def _attempt(
        self, micro_batch: MicroBatch, weights: Sequence[Tensor], perturbed: set[int] | None
    ) -> Tensor | Exception:
        """The loss of a pass 2 over `micro_batch`, or what it raised."""
        try:
            with self._only(weights):
                return self._rerun([micro_batch], perturbed)[0]
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error):
                raise
            return error

    def gradients(
        self, window: Sequence[MicroBatch], weights: Sequence[Tensor], perturbed: set[int] | None
    ) -> list[Tensor]:
        """
        The gradients of all of `window` with respect to `weights`, where they are now; `.grad` stays as it is.

        Every micro-batch runs on the random state of its pass 1, and the state afterwards is that of pass 1.

        Args:
            window: Micro-batches in their order.
            weights: Parameters.
            perturbed: Indices of the blocks that hold a weight which is not where it was in pass 1; `None` replays
                nothing.
        """
        with self._only(weights):
            try:
                self._rerun(window, perturbed if self.replays else None)
            except ReplayError as error:
                if isinstance(error, DroppedError):
                    self.drops = False
                else:
                    self._give_up_replay(self._no_replay(str(error)))
                for weight in weights:
                    weight.grad = None
                self._rerun(window, None)
            finally:
                window[-1].recording.after.restore()
            return [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]

    def _rerun(self, window: Sequence[MicroBatch], perturbed: set[int] | None) -> list[Tensor]:
        """The losses of pass 2."""
        losses = []
        for micro_batch in window:
            self.buffers.put(micro_batch.buffers)
            with self.replay.replaying(micro_batch.recording, perturbed):
                losses.append(micro_batch.rerun())
        return losses

    @contextmanager
    def _only(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Inside, only `weights`, and what is compiled together with them, take a gradient, and nothing is counted."""
        taken = self.regions.taken_with(weights) if self.narrow else [p for p in self.parameters if p.requires_grad]
        with only_gradients_of(self.parameters, taken), running_statistics_paused(self.norms), self.buffers.kept():
            yield

    def _give_up_replay(self, warning: str) -> None:
        self.replays = False
        logger.warning(warning)

    def _no_replay(self, reason: str) -> str:
        return (
            f"Pass 2 cannot replay the blocks of {type(self.model).__name__} ({reason}), so it runs all of them from "
            "now on: right, but slower than lsam/overhead predicts. Models whose loss reads what blocks leave behind, "
            "such as the auxiliary loss of mixtures of experts, are among these."
        )

    def _no_repeat(self, loss: Tensor, other: Tensor) -> str:
        return (
            f"Pass 2 does not repeat pass 1 of {type(self.model).__name__}: the same batch, weights and random state "
            f"had a loss of {loss.item()}, then of {other.item()}. Where it draws from a generator of its own, or "
            "goes on from a state that a pass changes, the weights climb one loss and descend another: let it draw "
            "from the global generators, and keep its state in buffers or on the trainer."
        )
