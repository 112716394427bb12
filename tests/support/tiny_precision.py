"""What the tests of precision share on a CPU and on a GPU: methods, and callbacks that watch a training."""

import collections

from tiny import Kept, weights
from transformers import TrainerCallback

METHODS = {
    "top 2": dict(rho=0.2, alpha=0.6),
    "adaptive": dict(rho=2.0, adaptive=True),
    "all": dict(rho=0.2, block_selection="all"),
    "micro-batch": dict(rho=0.2, alpha=0.6, sharpness_scope="micro_batch"),
    "looksam": dict(rho=0.2, block_selection="all", perturb_interval=2, reuse_correction=0.7),
    "one pass": dict(rho=0.2, ascent_gradient="previous"),
}


class Watch(TrainerCallback):
    """The weights, and the scale, at the end of each step, and how many passes it had."""

    def __init__(self, trainer):
        self.trainer, self.weights, self.scales = trainer, [weights(trainer.model)], []
        self.passes = Kept(counts=collections.Counter())

    def count_pass(self, step):
        self.passes.counts[step] += 1
        return self.passes.counts[step]

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(weights(self.trainer.model))
        if self.trainer.accelerator.scaler is not None:
            self.scales.append(self.trainer.accelerator.scaler.get_scale())


class Replays(TrainerCallback):
    """Switches replay off, unless it is wanted."""

    def __init__(self, trainer, wanted):
        self.trainer, self.wanted = trainer, wanted

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._lsam.second_pass.replays &= self.wanted
