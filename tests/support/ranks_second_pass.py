"""Situations in each of two processes; the test starts it, and compares what they save with one process."""

import faulthandler
import gc
import sys
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from situations import LAST, Block, Net, Situation, hearing, make, tensors
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput


def inner(model):
    """The model in its wrapper; in one process it has none."""
    return model.module if dist.is_initialized() else model


class Through(Situation):
    """Reaches through the wrapper."""

    def loss(self, model, batch, items):
        return model(**batch).loss + 0.1 * inner(model).head.weight.square().sum()


class Teaches(Situation):
    """A mean teacher that follows the model in the wrapper."""

    keeps = ("teacher",)

    def begin(self, model):
        self.teacher = deepcopy(model).requires_grad_(False)

    def loss(self, model, batch, items):
        for mean, weight in zip(self.teacher.parameters(), inner(model).parameters(), strict=True):
            mean.data = 0.8 * mean.data + 0.2 * weight.data
        output = model(**batch)
        return output.loss + (output.logits - 2 * self.teacher(**batch).logits).square().mean()


class Counts(Situation):
    """Weighs its loss by what it counts, and by whether gradients are synchronised."""

    keeps = ("calls",)

    def begin(self, model):
        self.calls = []

    def loss(self, model, batch, items):
        self.calls.append(len(batch["labels"]))
        output = model(**batch)
        weight = len(self.calls) % 3 + self.accelerator.sync_gradients
        return output.loss + weight * output.logits.square().mean()


class Loaded(Block):
    def forward(self, x):
        y = super().forward(x)
        self.load = y.abs().mean((1, 2))
        return y


class LoadedNet(Net):
    """Reads what its blocks leave behind, where it is told to."""

    block = Loaded

    def forward(self, input_ids, attention_mask=None, labels=None, reads=False):
        output = super().forward(input_ids, attention_mask, labels)
        load = sum(block.load for block in self.blocks).mean() if reads else 0.0
        return SequenceClassifierOutput(loss=output.loss + load, logits=output.logits)


class ReadsLater(Situation):
    """From the second step on."""

    new = LoadedNet

    def loss(self, model, batch, items):
        return model(**batch, reads=self.state.global_step > 0).loss


class Halves(Situation):
    """Halves all gradients, what has been accumulated before included, after each micro-batch."""

    def step(self, model, batch, once):
        loss = once(batch)
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad.mul_(0.5)
        return loss


class Averages(Situation):
    """A running mean, which the wrapper sends from the first process to the others."""

    class Net(Net):
        class block(Block):
            def __init__(self, width):
                super().__init__(width)
                self.register_buffer("mean", torch.zeros(width))

            def forward(self, x):
                if self.training:
                    self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
                return super().forward(x - self.mean)

    new = Net


class Fails(Situation):
    """One process raises in the second pass of the second step."""

    rank, always = 1, False

    def begin(self, model):
        type(self).struck = []

    def loss(self, model, batch, items):
        mine = dist.is_initialized() and dist.get_rank() == self.rank
        if (
            mine
            and getattr(self, "in_second_pass", False)
            and self.state.global_step == 1
            and (self.always or not self.struck)
        ):
            self.struck.append(True)
            raise RuntimeError("a test's own")
        return model(**batch).loss


class AlwaysFails(Fails):
    always = True


SITUATIONS = [Situation, Through, Teaches, Counts, ReadsLater, Halves, Averages, Fails, AlwaysFails]
ACCUMULATIONS = (1, 2)


def train(situation, folder: Path, accumulation: int, rho: float | None, rows: int) -> dict:
    """What the training leaves: the weights, and what was seen on the way."""
    seen: set[str] = set()

    class Seen(situation):
        def loss(self, model, batch, items):
            seen.add(type(model).__name__)
            return super().loss(model, batch, items)

    config = None if rho is None else {**LAST, "rho": rho}
    options = dict(gradient_accumulation_steps=accumulation, per_device_train_batch_size=rows)
    if dist.is_initialized():
        options["ddp_find_unused_parameters"] = False
    with hearing() as messages:
        trainer = make(Seen, folder, config, **options)
        trainer.train()
    skipped = [line.get("lsam/skipped") for line in trainer.state.log_history if "loss" in line]
    teacher = {f"teacher.{name}": weight for name, weight in tensors(getattr(trainer, "teacher", nn.Module())).items()}
    trained = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    left = {**tensors(trainer.model), **teacher}
    return {"weights": trained, "left": left, "seen": seen, "skipped": skipped, "told": messages}


def main():
    # Processes that wait for each other for good come to an end.
    faulthandler.dump_traceback_later(120, exit=True)
    gc.freeze()
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    runs = [(situation, each, rho) for situation in SITUATIONS for each in ACCUMULATIONS for rho in (None, 1e-9, 0.5)]
    for situation, accumulation, rho in runs:
        try:
            result = train(situation, folder / "out", accumulation, rho, rows=2)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        draft = folder / f"{dist.get_rank()}.draft"
        torch.save(result, draft)
        draft.rename(folder / f"{situation.__name__}, {accumulation}, {rho}, {dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
