"""Loops without a Trainer in each of some processes; `test_loop_ranks.py` starts them, and runs them alone, too."""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from tiny import Examples, Kept, bert, weights
from torch.nn.parallel import DistributedDataParallel

from hf_lsam import LSAM, LSAMConfig

STEPS, ACCUMULATION, ROWS = 4, 3, 4


def train(case: dict, rank: int = 0, world: int = 1) -> dict:
    """What a loop leaves, of this process's share of the rows of each micro-batch."""
    examples, size = Examples(STEPS * ACCUMULATION * ROWS), ROWS // world
    model = bert().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    accelerator = None
    if case.get("accelerate"):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
        called, optimizer = accelerator.prepare(model, optimizer)
    else:
        called = DistributedDataParallel(model, **case.get("ddp", {})) if world > 1 else model
    lsam = LSAM(called, optimizer, LSAMConfig(**case["config"]), STEPS, accelerator=accelerator)
    losses, sent, buffers_sent = [], [], []
    if world > 1:
        send_buffers = called._sync_buffers
        called._sync_buffers = lambda: (buffers_sent.append(lsam.in_second_pass), send_buffers())
    # A pass 2 that fails in one process runs again there, and the other one does not wait for it.
    fault = Kept(calls_left=20 if rank == case.get("fails_in") else 0)

    def compute_loss(batch):
        if lsam.in_second_pass and fault.calls_left:
            fault.calls_left -= 1
            if not fault.calls_left:
                raise ValueError("a test's own")
        return called(**batch).loss

    for number in range(STEPS * ACCUMULATION):
        batch = examples.batch(number * ROWS + rank * size, size)
        with nullcontext() if accelerator is None else accelerator.accumulate(called):
            if accelerator is None:
                is_last = number % ACCUMULATION == ACCUMULATION - 1
                loss = lsam.backward(lambda: compute_loss(batch) / ACCUMULATION, is_last=is_last)  # noqa: B023
            else:
                is_last = accelerator.sync_gradients
                loss = lsam.backward(lambda: compute_loss(batch))  # noqa: B023
            sent.append(None if is_last else model.classifier.bias.grad.tolist())
            if is_last or accelerator is not None:
                optimizer.step()
                optimizer.zero_grad()
        losses.append(float(loss))
    left = {"log": lsam.log(), "step": lsam.step, "calls_left": fault.calls_left, "buffers_sent": buffers_sent}
    return {"weights": weights(model), "losses": losses, "unsynced": sent} | left


def refusals() -> dict[str, str]:
    """The messages with which two settings are refused."""
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    told = {}
    static = DistributedDataParallel(model, static_graph=True)
    for name, given, scope in (("alone", model, "batch"), ("static", static, "micro_batch")):
        try:
            LSAM(given, optimizer, LSAMConfig(sharpness_scope=scope), 1)
        except NotImplementedError as error:
            told[name] = str(error)
    return told


def main():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    folder, rank, world = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        torch.save(train(case, rank, world), folder / f"{name}.{rank}.pt")
    (folder / f"refusals.{rank}.json").write_text(json.dumps(refusals()))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
