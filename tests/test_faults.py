"""Whatever goes wrong, the weights are those of the last update, and the message names the way out."""

import pytest
from tiny import Examples, arguments, bert, largest_difference, weights

from hf_lsam import LSAMConfig, LSAMTrainer


class Injected(Exception):
    pass


class Surviving(LSAMTrainer):
    """
    Goes on after a micro-batch whose pass fails, as trainers do that leave out what does not fit into the memory.

    Args:
        faults: Pairs `(micro-batch, pass)`, counted from 0, that fail.
        factor: What the losses of those passes are multiplied by instead, if they are not to fail.
    """

    faults, factor = (), None

    def training_step(self, *args):
        self.count = getattr(self, "count", -1) + 1
        self.passes = iter(range(99))
        try:
            return super().training_step(*args)
        except Injected:
            return weights(self.model)["classifier.bias"].sum() * 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if (self.count, next(self.passes)) in self.faults:
            if self.factor is None:
                raise Injected
            return loss * self.factor
        return loss


def survive(folder, config, faults, factor=None):
    trainer = Surviving(
        model=bert(),
        args=arguments(folder, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=3, optim="sgd"),
        train_dataset=Examples(12),
        lsam_config=LSAMConfig(**config),
    )
    trainer.model_accepts_loss_kwargs = False
    trainer.faults, trainer.factor = faults, factor
    trainer.train()
    return weights(trainer.model)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("micro_batch", [0, 1, 2])
@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_a_micro_batch_that_fails_in_pass_1_and_is_left_out_takes_no_other_with_it(scope, micro_batch, tmp_path):
    """It is as if its loss were zero; where the last one of a step is left out, the others are not perturbed."""
    config = dict(rho=0.3, alpha=0.7, sharpness_scope=scope)
    left = survive(tmp_path, config, [(3 + micro_batch, 0)])
    # With "batch", the last micro-batch runs pass 2 of all three.
    faults = [(3 + micro_batch, 0), (3 + micro_batch, 1) if scope == "micro_batch" else (5, 1 + micro_batch)]
    if micro_batch == 2 and scope == "batch":
        config = config | dict(perturb_end=0.5)
    right = survive(tmp_path, config, faults, factor=0.0)
    assert largest_difference(left, right) < 1e-12
