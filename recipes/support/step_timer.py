"""The time of an optimizer step, and the peak memory."""

import resource
import statistics
import sys
import time

import torch
from transformers import TrainerCallback


def peak_memory_mib(on_gpu: bool) -> float:
    """Peak memory in MiB: allocated on the GPU since its statistics were reset or, without one, resident memory."""
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class StepTimer(TrainerCallback):
    """Measures the wall time of each optimizer step: passes and update, without data loading and evaluation."""

    def __init__(self):
        self.seconds: list[float] = []
        self.started = False
        self._start = 0.0
        self._on_gpu = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = True
        self._on_gpu = args.device.type == "cuda"
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self._now() - self._start)

    def metrics(self) -> dict[str, float]:
        """The median of `seconds` as `train_step_seconds`, and `train_peak_memory_mib`."""
        seconds = {"train_step_seconds": statistics.median(self.seconds)} if self.seconds else {}
        return seconds | {"train_peak_memory_mib": peak_memory_mib(self._on_gpu)}

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()
