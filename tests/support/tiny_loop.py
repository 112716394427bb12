"""A loop without a Trainer, and the settings that the tests of it take."""

import torch
from test_right import METHODS

from hf_lsam import LSAMTrainer

SETTINGS = {name: settings for name, (settings, _) in METHODS.items()} | {
    "micro-batch": dict(rho=0.1, alpha=0.8, sharpness_scope="micro_batch"),
    "later": dict(rho=0.1, perturb_start=0.3, perturb_end=0.8),
}


class Noting(LSAMTrainer):
    """Notes the random state that it begins to train with: to make a loader's iterator draws from it."""

    random = None

    def training_step(self, *args, **kwargs):
        self.random = torch.get_rng_state() if self.random is None else self.random
        return super().training_step(*args, **kwargs)


def loop(model, optimizer, lsam, examples, steps, size=4, accumulation=1, begin=0, scaler=None):
    """Train as the README says; returns the losses."""
    model.train()
    losses = []
    for number in range(begin * accumulation, steps * accumulation):
        batch = examples.batch(number * size, size)
        is_last = number % accumulation == accumulation - 1
        losses.append(lsam.backward(lambda: model(**batch).loss / accumulation, is_last=is_last))  # noqa: B023
        if is_last:
            (optimizer if scaler is None else scaler).step(*[] if scaler is None else [optimizer])
            if scaler is not None:
                scaler.update()
            optimizer.zero_grad()
    return losses
