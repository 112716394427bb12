"""The model gets other weights or blocks in the middle of a run, or more steps: each step is the literal one."""

import pytest
import torch
from situations import LAST, Block, Net, follow
from test_changing_training import CONFIGS, Six, assert_goes_on, sgd
from tiny import Examples, arguments, bert
from transformers import Trainer, TrainerCallback

from hf_lsam import LSAM, LSAMConfig, LSAMTrainer


class Replace(TrainerCallback):
    """Gives the model another weight, and the optimizer, too."""

    def __init__(self, module):
        self.module = module

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 2:
            module, group = model.get_submodule(self.module), optimizer.param_groups[0]
            old, module.weight = module.weight, torch.nn.Parameter(module.weight.detach().clone())
            group["params"] = [module.weight if weight is old else weight for weight in group["params"]]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("module", ["embedding", "blocks.1.up", "blocks.5.down", "head"])
def test_a_weight_is_replaced(module, config, tmp_path):
    run = follow(Six, tmp_path, CONFIGS[config], callbacks=[Replace(module)], max_steps=5)
    assert_goes_on(run, may_skip=range(5) if config == "budget" else ())


class Grow(TrainerCallback):
    """Adds a block, and gives its weights to the optimizer."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 2:
            model.blocks.append(Block(8).double())
            optimizer.param_groups[0]["params"] += model.blocks[-1].parameters()


def test_a_block_is_added(tmp_path):
    """The last two blocks are then others."""
    run = follow(Six, tmp_path, LAST, callbacks=[Grow()], max_steps=4)
    names = [sorted(name for name, times in run.rows[step]["counts"].items() if times) for step in range(4)]
    assert names == [["blocks.4", "blocks.5"]] * 2 + [["blocks.5", "blocks.6"]] * 2
    assert all(line["lsam/active"] == 1 for line in run.lines)


def test_a_weight_is_replaced_in_a_loop():
    """Its gradient is not added to that of the step before, and it is perturbed."""
    model, batch = Net(), Six.collate([Six.data[row] for row in range(4)])
    optimizer = sgd(model)
    lsam = LSAM(model, optimizer, LSAMConfig(**LAST), max_steps=4)
    for step in range(4):
        if step == 2:
            old, module = model.blocks[3].up.weight, model.blocks[3].up
            module.weight = torch.nn.Parameter(old.detach() / 2)
            group = optimizer.param_groups[0]
            group["params"] = [module.weight if weight is old else weight for weight in group["params"]]
        lsam.backward(lambda: model(**batch).loss)
        want = Net()
        want.load_state_dict(model.state_dict())
        chosen = [weight for block in want.blocks[2:] for weight in block.parameters()]
        want(**batch).loss.backward()
        length = torch.stack([weight.grad.norm() for weight in chosen]).norm()
        with torch.no_grad():
            for weight in chosen:
                weight += LAST["rho"] * weight.grad / length
        plain = {name: weight.grad for name, weight in want.named_parameters()}
        want.zero_grad()
        want(**batch).loss.backward()
        moved = {id(weight) for weight in chosen}
        for (name, weight), other in zip(model.named_parameters(), want.parameters(), strict=True):
            right = other.grad if id(other) in moved else plain[name]
            torch.testing.assert_close(weight.grad, right, rtol=0, atol=1e-12)
        optimizer.step()
        optimizer.zero_grad()
    assert lsam.log()["lsam/active"] == 1


class Extend(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        state.max_steps = 8


def test_a_callback_trains_longer(tmp_path):
    run = follow(Six, tmp_path, LAST, callbacks=[Extend()], max_steps=4)
    assert [line["lsam/active"] for line in run.lines] == [1] * 8


class Insert(TrainerCallback):
    """Adds a module with statistics, whose weights the optimizer does not get."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 4:
            model.classifier = torch.nn.Sequential(model.classifier, torch.nn.BatchNorm1d(3).double())


@pytest.mark.parametrize("selection", ["all", "last", "top_k"])
def test_a_module_is_added_that_is_not_trained(selection, tmp_path):
    """Between steps 4 and 8, at which everything is copied: its statistics and its gradient are those of pass 1."""
    states = []
    for kind, own in ((Trainer, {}), (LSAMTrainer, {"lsam_config": LSAMConfig(rho=1e-30, block_selection=selection)})):
        model = bert().double()
        args = arguments(tmp_path, max_steps=7)
        kind(model, args, train_dataset=Examples(32), callbacks=[Insert()], **own).train()
        states.append(model.state_dict())
    assert "classifier.1.running_mean" in states[0]
    for name, value in states[0].items():
        assert torch.allclose(states[1][name], value, rtol=0, atol=1e-12), name
