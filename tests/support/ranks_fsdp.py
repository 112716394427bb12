"""Trains tiny models that FSDP2 shards over two processes; the test starts it, and compares with one process."""

import gc
import json
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from test_split import Ragged
from tiny import MODELS, Examples, arguments, checkpoint, out_of_reach, weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.blocks import find_blocks
from hf_lsam.step import LSAMStep

# AdamW's usual eps would blow up the rounding of gradients that are zero but for it (the key biases of attention).
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, eps=1e-3),
}


def shard(model, case):
    """Each block, and the rest, as accelerate does it."""
    mesh = init_device_mesh("cpu", case["mesh"], mesh_dim_names=("replicate", "shard")[-len(case["mesh"]) :])
    policy = MixedPrecisionPolicy(**{name: getattr(torch, value) for name, value in case.get("policy", {}).items()})
    for block in find_blocks(model).values():
        fully_shard(block, mesh=mesh, reshard_after_forward=case.get("reshard", True), mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


class Collectives(TorchDispatchMode):
    """Counts by kind what the processes send each other."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional") and "tensor" not in function.__name__:
            self.counts[function.__name__.split(".")[0].strip("_")] += 1
        return function(*args, **(kwargs or {}))


class Run:
    """A model, its optimizer and its steps over the rows of a data set, sharded or in one process."""

    def __init__(self, case: dict, sharded: bool):
        self.case, self.sharded = case, sharded
        self.ranks, self.rank = (2, dist.get_rank()) if sharded else (1, 0)
        self.model = MODELS[case["model"]](**case.get("options", {})).train()
        if case.get("checkpointing"):
            checkpoint(self.model, use_reentrant=case["checkpointing"] == "reentrant")
        self.notes = out_of_reach(attention_runs=0)
        for block in find_blocks(self.model).values():
            inner = block.attention if case["model"] == "bert" else block.self_attn
            inner.register_forward_hook(self._count)
        if sharded:
            shard(self.model, case)
        if case.get("evaluated"):
            self.evaluate()
        self.step = LSAMStep(self.model, LSAMConfig(**case["config"]), case["steps"])
        self.step.second_pass.replays &= case.get("replay", True)
        self.optimizer = OPTIMIZERS[case["optimizer"]](self.model.parameters())
        rows = 4 * case["accumulation"] * case["steps"]
        self.examples = Ragged(rows, language_model=True) if case["model"] == "llama" else Examples(rows)
        if case.get("options", {}).get("num_labels") == 1:
            # A regression.
            self.examples.labels = self.examples.labels.to(torch.get_default_dtype())
        self.chosen, self.collectives, self.runs, self.losses = [], [], [], []

    def _count(self, *_):
        self.notes.attention_runs += 1

    def evaluate(self):
        """A forward pass without a backward pass, after which FSDP2 keeps the root's weights gathered."""
        with torch.no_grad():
            self.model(**Examples(4, language_model=self.case["model"] == "llama").batch(0, 4))

    def take(self, number: int) -> None:
        """Optimizer step `number`."""
        accumulation, size = self.case["accumulation"], 4 // self.ranks
        windows = [(number * accumulation + place) * 4 for place in range(accumulation)]
        # Whatever the loss, the mean over all of a step's tokens or rows.
        items = sum(int((self.examples.batch(start, 4)["labels"][..., 1:] != -100).sum()) for start in windows)
        begun = weights(self.model)
        for place, start in enumerate(windows):
            batch = self.examples.batch(start + self.rank * size, size)
            is_last = place == accumulation - 1

            def forward_backward(batch=batch):
                if self.case["model"] == "llama":
                    loss = self.model(**batch, num_items_in_batch=items).loss * self.ranks
                else:
                    loss = self.model(**batch).loss / accumulation
                loss.backward()
                return loss.detach()

            def pass_1(forward_backward=forward_backward, is_last=is_last):
                # As the Trainer has it: gradients of the micro-batches before the last are not reduced.
                if self.sharded:
                    self.model.set_requires_gradient_sync(is_last)
                return forward_backward()

            collectives = Collectives()
            with collectives if self.case.get("counted") else nullcontext():
                self.losses.append(float(self.step(pass_1, forward_backward, number, is_last)))
            self.collectives.append(dict(collectives.counts))
        assert all(torch.equal(_whole(begun[name]), _whole(now)) for name, now in weights(self.model).items())
        self._check_gradients()
        self.chosen.append([p.chosen for p in self.step.log.pending])
        self.step.reset_log()
        self.runs.append(self.notes.attention_runs)
        self.notes.attention_runs = 0
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.case.get("evaluated"):
            self.evaluate()

    def _check_gradients(self):
        for name, parameter in self.model.named_parameters():
            assert isinstance(parameter, DTensor) == self.sharded, name
            if self.sharded and parameter.grad is not None:
                assert isinstance(parameter.grad, DTensor), name
                assert parameter.grad.placements == parameter.placements, name
                assert parameter.grad.shape == parameter.shape, name

    def result(self) -> dict:
        return {
            "weights": {name: _whole(tensor) for name, tensor in weights(self.model).items()},
            "chosen": self.chosen,
            "collectives": self.collectives,
            "runs": self.runs,
            "losses": self.losses,
            "replayed": self.step.second_pass.replays,
        }


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(case: dict, sharded: bool) -> dict:
    """What came of the steps that `case` describes."""
    run = Run(case, sharded)
    for number in range(case["steps"]):
        run.take(number)
    return run.result()


def train_with_trainer(case: dict, folder: Path) -> dict:
    """
    The weights after a training by the Trainer, and after one that goes on from a checkpoint half-way.

    Accelerate chooses FSDP for accelerators only. What it would have set up on them is set here; what follows from it
    is all accelerate's and the Trainer's own.
    """
    result = {"weights": _trained(case, folder)}
    if case.get("resume"):
        result["resumed"] = _trained(case, folder, str(folder / f"checkpoint-{case['resume']}"))
    return result


def _trained(case: dict, folder: Path, checkpoint: str | None = None) -> dict:
    trainer = LSAMTrainer(
        model=MODELS[case["model"]](),
        args=arguments(folder, optim="sgd", learning_rate=0.05, **case["arguments"]),
        train_dataset=Examples(case["rows"]),
        lsam_config=LSAMConfig(**case["config"]),
    )
    # BERT's loss is a mean over its micro-batch, whatever number of items it is told.
    trainer.model_accepts_loss_kwargs = False
    if dist.is_initialized():
        state = trainer.accelerator.state
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["BertLayer"],
        )
        trainer.is_fsdp_enabled = True
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.accelerator.is_fsdp2 == dist.is_initialized()
    parameters = [p for candidate in trainer._lsam.candidates for p in candidate.parameters]
    assert all(isinstance(p, DTensor) == dist.is_initialized() for p in parameters)
    return {name: _whole(tensor) for name, tensor in weights(trainer.model).items()}


def main():
    # The Trainer collects garbage at the start of each training; what was imported need not be looked through.
    gc.freeze()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        torch.set_default_dtype(getattr(torch, case.get("dtype", "float64")))
        result = train_with_trainer(case, folder / name) if "arguments" in case else train(case, sharded=True)
        torch.save(result, folder / f"{name}.{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
