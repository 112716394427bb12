"""Runs of a Trainer with a loss of its own, and how far they end from the plain Trainer's."""

from tiny import Examples, arguments, bert, largest_difference, weights
from transformers import Trainer

from hf_lsam import LSAMConfig, LSAMMixin, LSAMTrainer

LAST = dict(block_selection="last", num_perturbed_blocks=1)


def run(kind, folder, model=None, config=None, data=None, **options):
    """A finished run of the Trainer class `kind` on a BERT in float64."""
    own = {"lsam_config": LSAMConfig(**(config or LAST))} if issubclass(kind, LSAMMixin) else {}
    trainer = kind(
        model or bert(blocks=6).double(), arguments(folder, **options), train_dataset=data or Examples(32), **own
    )
    trainer.train()
    return trainer


def distance_to_plain(loss, folder, model=lambda: bert(blocks=6).double(), config=LAST, **options):
    """How far the weights and buffers of a run with a rho of next to nothing end from those of the plain Trainer."""
    plain = run(type("Plain", (loss, Trainer), {}), folder, model(), **options)
    kind = type("Perturbed", (loss, LSAMTrainer), {})
    perturbed = run(kind, folder, model(), {**config, "rho": 1e-9}, **options)
    return largest_difference(weights(plain.model), weights(perturbed.model)), perturbed
