"""Trains tiny models under DeepSpeed in each process of a launch; `test_deepspeed.py` starts it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import ranks
import torch
import torch.distributed as dist
from tiny import Examples, arguments, bert, weights
from tiny_passes import Noting
from transformers import TrainerCallback

from hf_lsam import LSAMConfig, LSAMTrainer


class States(TrainerCallback):
    """Notes the weights after each step; where some are `given`, each step begins with those."""

    def __init__(self, given: Sequence[dict] = ()):
        self.given, self.noted = given, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.given:
            model.load_state_dict(self.given[state.global_step])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.noted.append(weights(model))


class Noted(Noting, LSAMTrainer):
    pass


def trained(folder: Path, options: dict, config: dict, noted: bool = False, **run) -> dict:
    """The weights after a training of BERT, which left the engine as it was; `noted`, also those of each pass."""
    trainer = Noted(
        model=bert(),
        args=arguments(folder, optim="sgd", learning_rate=0.05, **options),
        train_dataset=Examples(16),
        lsam_config=LSAMConfig(**config),
    )
    trainer.train(**run)
    assert "step" not in vars(trainer.model_wrapped)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    result = weights(trainer.model)
    for number, step in enumerate(trainer.steps.noted if noted else ()):
        ((moved, _),) = step.passes
        for name, value in step.start.items():
            result |= {f"{number}.start.{name}": value, f"{number}.pass.{name}": moved[name]}
    return result


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    results = {}
    cases = json.loads((folder / "cases.json").read_text())
    for name, case in cases["equal"].items():
        states = States()
        ranks.train(case, folder / "out", callbacks=[states])
        results[name] = {f"{step}.{key}": value for step, w in enumerate(states.noted) for key, value in w.items()}
    for name, (options, config) in cases["resumed"].items():
        out = folder / name
        options = options | dict(save_strategy="steps", save_steps=2)
        results[name] = trained(out, options, config)
        results[f"{name}-again"] = trained(out, options, config, resume_from_checkpoint=str(out / "checkpoint-2"))
    for name, (options, config) in cases["trained"].items():
        results[name] = trained(folder / "out", options, config, noted=True)
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
