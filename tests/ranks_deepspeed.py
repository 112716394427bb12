"""Trains tiny models under DeepSpeed in each process of a launch; `test_deepspeed.py` starts it."""

import json
import sys
from pathlib import Path

import ranks
import torch
import torch.distributed as dist
from tiny import Examples, arguments, bert, weights

from hf_lsam import LSAMConfig, LSAMTrainer


def trained(folder: Path, options: dict, config: dict, **run) -> dict:
    """The weights after a training of BERT, and whether it left the engine as it was."""
    trainer = LSAMTrainer(
        model=bert(),
        args=arguments(folder, optim="sgd", learning_rate=0.05, **options),
        train_dataset=Examples(16),
        lsam_config=LSAMConfig(**config),
    )
    trainer.train(**run)
    assert "step" not in vars(trainer.model_wrapped)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    return weights(trainer.model)


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    results = {}
    cases = json.loads((folder / "cases.json").read_text())
    for name, case in cases["equal"].items():
        results[name] = ranks.train(case, folder / "out")["weights"]
    for name, (options, config) in cases["resumed"].items():
        out = folder / name
        options = options | dict(save_strategy="steps", save_steps=2)
        results[name] = trained(out, options, config)
        results[f"{name}-again"] = trained(out, options, config, resume_from_checkpoint=str(out / "checkpoint-2"))
    for name, (options, config) in cases["trained"].items():
        results[name] = trained(folder / "out", options, config)
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
