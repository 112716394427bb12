"""Trains tiny models in each of two processes; the test starts it, and compares what they save with one process."""

import functools
import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from test_split import Ragged
from tiny import MODELS, Examples, arguments, bert, out_of_reach, weights
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.replay import ReplayError


class RowsTrainer(LSAMTrainer):
    """
    Notes the rows of each micro-batch; takes `micro_batches`, one list of rows each, where they are given.

    Its loss is gathered over the processes where it `communicates`, as trl's trainers do for their metrics, and fails
    where it `asks_for_all` gradients and some weight has none.
    """

    def __init__(
        self,
        micro_batches: list[list[int]] | None,
        communicates: bool = False,
        asks_for_all: bool = False,
        **options,
    ):
        super().__init__(**options)
        self.micro_batches = micro_batches
        self.communicates = communicates
        self.asks_for_all = asks_for_all
        self.rows: list[list[int]] = []

    def get_train_dataloader(self):
        if self.micro_batches is None:
            return super().get_train_dataloader()
        return DataLoader(self.train_dataset, batch_sampler=self.micro_batches)

    def compute_loss(self, *args, **kwargs):
        if self.asks_for_all and not all(p.requires_grad for p in self.model.parameters()):
            raise ValueError("a test's own: some weight has no gradient")
        loss = super().compute_loss(*args, **kwargs)
        if self.communicates:
            self.accelerator.gather(loss.detach())
        return loss

    def training_step(self, model, inputs, *rest):
        tokens = self.train_dataset.tokens.tolist()
        self.rows.append([tokens.index(row) for row in inputs["input_ids"].tolist()])
        return super().training_step(model, inputs, *rest)


def add_fault(model: torch.nn.Module, call: int, factor: float | None) -> None:
    """Multiply the loss of the model's `call`-th forward pass by `factor`, or end that pass in an error."""
    notes, forward = out_of_reach(calls=0), model.forward

    @functools.wraps(forward)
    def faulty(*args, **kwargs):
        notes.calls += 1
        outputs = forward(*args, **kwargs)
        if notes.calls == call:
            if factor is None:
                raise ReplayError("a test's own")
            outputs["loss"] = outputs["loss"] * factor
        return outputs

    model.forward = faulty


def train(case: dict, folder: Path, rank: int = 0, callbacks: Sequence[TrainerCallback] = ()) -> dict:
    """What the training that `case` describes leaves: the weights, and what was done on the way."""
    model = MODELS[case["model"]]()
    count = case["rows"]
    trainer = RowsTrainer(
        case.get("micro_batches"),
        case.get("communicates", False),
        case.get("asks_for_all", False),
        model=model,
        args=arguments(folder, max_steps=4, optim="sgd", learning_rate=0.05, **case["arguments"]),
        train_dataset=Ragged(count, language_model=True) if case["model"] == "llama" else Examples(count),
        lsam_config=LSAMConfig(**case["config"]),
        callbacks=[*callbacks],
    )
    # BERT's loss is a mean over its micro-batch, whatever number of items it is told.
    if case["model"] == "bert":
        trainer.model_accepts_loss_kwargs = False
    if rank in case.get("faulty_ranks", ()):
        add_fault(model, *case["fault"])
    trainer.train()
    result = {"weights": weights(model), "rows": trainer.rows, "selected": {}, "skipped": 0}
    if trainer.lsam_config.enabled:
        log = trainer._lsam.log
        log.settle()
        result |= {"selected": log.counts, "skipped": log.skipped}
    return result


def refusal(folder: Path, config: dict, **options) -> str:
    """The message with which training is refused."""
    trainer = LSAMTrainer(
        model=bert(), args=arguments(folder, **options), train_dataset=Examples(8), lsam_config=LSAMConfig(**config)
    )
    try:
        trainer.train()
    except NotImplementedError as error:
        return str(error)
    return f"not refused in {trainer.args.world_size} processes"


def main():
    # The Trainer collects garbage at the start of each training; what was imported need not be looked through.
    gc.freeze()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    folder = Path(sys.argv[1])
    calls: list[int] = []
    plain_all_reduce = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return plain_all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    rank = int(os.environ["RANK"])
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        calls.clear()
        with torch.profiler.profile() if case.get("profiled") else nullcontext() as profile:
            result = train(case, folder / "out", rank)
        sent = Counter(event.name for event in profile.events() if event.name.startswith("gloo:")) if profile else {}
        torch.save(result | {"all_reduced": list(calls), "sent": dict(sent)}, folder / f"{name}.{rank}.pt")
    uneven = dict(accelerator_config={"even_batches": False}, gradient_accumulation_steps=3)
    refusals = {
        "uneven": refusal(folder / "out", {"sharpness_scope": "micro_batch"}, **uneven),
        # The last, since Accelerate forgets the other process by it.
        "alone": refusal(folder / "out", {}, use_cpu=False),
    }
    (folder / f"refusals.{rank}.json").write_text(json.dumps(refusals))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
