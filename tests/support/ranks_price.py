"""Runs at a price in each of two processes, whose second passes cost differently; the test starts it."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from situations import Net, Situation, make
from tiny import Examples, training_lines, weights

from hf_lsam import LSAMConfig
from hf_lsam.blocks import find_blocks, find_candidates
from hf_lsam.costs import CostModel
from hf_lsam.selection import predicted_overheads

PRICE = 0.3
CASES = {
    "last": dict(block_selection="last", num_perturbed_blocks=3),
    "top_k": dict(block_selection="top_k", num_perturbed_blocks=2),
    "own": dict(block_selection="last", num_perturbed_blocks=3, sharpness_scope="micro_batch"),
}


class Shrinks(Net):
    """In the second process, the later blocks have a third of the positions."""

    def __init__(self):
        super().__init__(6, width=16)

    def run(self, x):
        for index, block in enumerate(self.blocks):
            if index == 3 and dist.get_rank() == 1:
                x = x[:, ::3]
            x = block(x)
        return x


class OfShrinks(Situation):
    new = Shrinks
    data = Examples(64)


def train(folder: Path, settings: dict) -> dict:
    """Train at `PRICE`; returns the perturbed steps, the costs of all steps, and the weights."""
    config = settings | dict(max_overhead=PRICE, rho=0.1)
    trainer = make(OfShrinks, folder, config, max_steps=12, gradient_accumulation_steps=2)
    own = trainer.model
    costs = CostModel.of(own, find_blocks(own))
    expected = predicted_overheads(LSAMConfig(**config), find_candidates(own, find_blocks(own), None), costs)[1]
    trainer.train()
    lines = training_lines(trainer)
    return dict(
        steps=[line["step"] - 1 for line in lines if line["lsam/active"]],
        costs=[line["lsam/overhead"] for line in lines],
        expected=expected,
        weights=weights(own),
    )


def main(folder: Path) -> None:
    found = {name: train(folder / name, settings) for name, settings in CASES.items()}
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
