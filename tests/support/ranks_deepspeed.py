"""Trains tiny models under DeepSpeed in each process of a launch; `test_deepspeed.py` starts it."""

import json
import os
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
    """The weights after a training of BERT, which left the engine as it was; `noted`, also those of the passes."""
    model, dtypes = bert(), set()
    model.classifier.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    trainer = Noted(
        model=model,
        args=arguments(folder, **dict(optim="sgd", learning_rate=0.05) | options),
        train_dataset=Examples(48),
        lsam_config=LSAMConfig(**config),
    )
    trainer.train(**run)
    assert "step" not in vars(trainer.model_wrapped) and "forward" not in vars(trainer.model)
    assert "backward" not in vars(trainer.accelerator.deepspeed_engine_wrapped)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    # In every pass.
    assert dtypes == {torch.bfloat16 if {"bf16", "torch_autocast"} & {*options["deepspeed"]} else torch.float32}
    second = trainer._lsam.second_pass
    assert trainer._lsam.log.skipped == 0 and second.narrow and second.drops
    assert second.replays == (config.get("block_selection") != "all")
    # What a pass changes in the engine is not put back.
    assert id(trainer.model_wrapped) not in second.state._known
    result = weights(trainer.model) | {"overhead": torch.tensor(trainer._lsam.overhead)}
    for number, step in enumerate(trainer.steps.noted if noted else ()):
        moved, _ = step.passes[-1]
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
        outcome = ranks.train(case, folder / "out", int(os.environ["RANK"]), [states])
        results[name] = {f"{step}.{key}": value for step, w in enumerate(states.noted) for key, value in w.items()}
        results[name]["skipped"] = torch.tensor(outcome["skipped"])
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
