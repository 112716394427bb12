"""Trains tiny models in each of two processes; the test starts it, and compares what rank 0 saves with one process."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_split import Ragged
from tiny import MODELS, Examples, arguments, weights

from hf_lsam import LSAMConfig, LSAMTrainer


def train(case: dict, folder: Path) -> dict[str, torch.Tensor]:
    """The weights after the training that `case` describes."""
    model = MODELS[case["model"]]()
    count = case["rows"]
    trainer = LSAMTrainer(
        model=model,
        args=arguments(folder, max_steps=4, optim="sgd", learning_rate=0.05, **case["arguments"]),
        train_dataset=Ragged(count, language_model=True) if case["model"] == "llama" else Examples(count),
        lsam_config=LSAMConfig(**case["config"]),
    )
    # BERT's loss is a mean over its micro-batch, whatever number of items it is told.
    if case["model"] == "bert":
        trainer.model_accepts_loss_kwargs = False
    trainer.train()
    return weights(model)


def main():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    folder = Path(sys.argv[1])
    calls: list[int] = []
    plain_all_reduce = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return plain_all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        calls.clear()
        result = train(case, folder / "out")
        torch.save({"weights": result, "all_reduced": list(calls)}, folder / f"{name}.{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
