"""Pass 2: the same micro-batches again, from the first perturbed block on and for the gradients of a few weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers.utils import logging

from .compiled import CompiledRegions
from .distributed import is_distributed
from .passes import norm_layers, only_gradients_of, running_statistics_paused
from .replay import Recording, Replay, ReplayError
from .shards import compute_device

logger = logging.get_logger(__name__)

Pass = Callable[[], Tensor]


@dataclass
class MicroBatch:
    """A micro-batch between its two passes."""

    rerun: Pass
    loss: Tensor
    recording: Recording


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
        self.norms = norm_layers(model)
        hidden = regions.hide(blocks)
        self.blocks = [] if hidden else [regions.caller(block) for block in blocks]
        self.device = compute_device(next(model.parameters()))
        self.replay = Replay(self.blocks, self.device)
        self.replays = replays and not hidden
        self.earliest = earliest
        self.drops = True
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
        with self.replay.recording(self.replays, self._dropped(1 if alone else 2)) as recording:
            loss = pass_1()
        return MicroBatch(pass_2, loss, recording)

    def _dropped(self, stride: int) -> frozenset[int]:
        """Blocks whose outputs are not kept: all but each `stride`-th from the one before the earliest on."""
        if not self.drops:
            return frozenset()
        return frozenset(range(len(self.blocks))) - set(range(self.earliest - 1, len(self.blocks), stride))

    def check(self, window: Sequence[MicroBatch]) -> None:
        """
        Replaying all it can at the unperturbed weights must give the loss of pass 1, bitwise.

        Or that of a full pass 2: where weights take no gradient `torch.matmul` may choose another kernel than in pass
        1, whose last bit differs on some CPUs. That pass is run by a single process only, as others would wait for it.

        Looked at once, in the last micro-batch, and again where more outputs are dropped than before. A model that
        reads dropped ones gets all of them from the next step on, and a full pass 2 in this one.
        """
        micro_batch = window[-1]
        calls, dropped = micro_batch.recording.calls, micro_batch.recording.dropped
        if not calls or (self.checked is not None and dropped <= self.checked):
            return
        for block in (call.block for call in reversed(calls)):
            weights = [p for p in self.blocks[block].parameters() if p.requires_grad and p.grad is not None]
            if weights:
                break
        try:
            with self._only(weights), self.replay.replaying(micro_batch.recording, {block}):
                loss = micro_batch.rerun()
            agrees = torch.equal(loss, micro_batch.loss)
            if not agrees and not dropped and not is_distributed():
                with self._only(weights), self.replay.replaying(micro_batch.recording, None):
                    agrees = torch.equal(loss, micro_batch.rerun())
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error):
                raise
            problem = f"{type(error).__name__}: {error}"
        else:
            if agrees:
                self.checked = dropped
                return
            problem = f"the loss was {loss.item()} instead of {micro_batch.loss.item()}"
        if dropped:
            self.drops = False
            for entry in window:
                entry.recording.replayable = False
        else:
            self._give_up_replay(problem)

    def gradients(self, window: Sequence[MicroBatch], weights: Sequence[Tensor], perturbed: set[int]) -> list[Tensor]:
        """
        The gradients of all of `window` with respect to `weights`, where they are now; `.grad` stays as it is.

        Every micro-batch runs on the random state of its pass 1, and the state afterwards is that of pass 1.

        Args:
            window: Micro-batches in their order.
            weights: Parameters.
            perturbed: Indices of the blocks that hold a weight which is not where it was in pass 1.
        """
        with self._only(weights):
            try:
                self._rerun(window, perturbed if self.replays else None)
            except ReplayError as error:
                self._give_up_replay(str(error))
                for weight in weights:
                    weight.grad = None
                self._rerun(window, None)
            finally:
                window[-1].recording.after.restore()
            return [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]

    def _rerun(self, window: Sequence[MicroBatch], perturbed: set[int] | None) -> None:
        for micro_batch in window:
            with self.replay.replaying(micro_batch.recording, perturbed):
                micro_batch.rerun()

    @contextmanager
    def _only(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Inside, only `weights`, and what is compiled together with them, take a gradient, and nothing is counted."""
        taken = self.regions.taken_with(weights)
        with only_gradients_of(self.parameters, taken), running_statistics_paused(self.norms):
            yield

    def _give_up_replay(self, reason: str) -> None:
        self.replays = False
        logger.warning(
            f"Pass 2 cannot replay the blocks of {type(self.model).__name__} ({reason}), so it runs all of them from "
            "now on: right, but slower than lsam/overhead predicts. Models whose loss reads what blocks leave behind, "
            "such as the auxiliary loss of mixtures of experts, are among these."
        )
