"""The trained parameters and the settings change during a run: training continues, and logs what it does."""

import random

import pytest
import torch
from literal_step import assert_literal
from situations import ALL, BUDGET, LAST, TOP, Net, Run, Situation, follow, told
from tiny import bert
from transformers import TrainerCallback

from hf_lsam import LSAMConfig

# True reasons for a plain step, and one that is not.
REASON, UNTRUE = r"train|frozen|froze|optimi[sz]er|max_overhead|budget", "zero or not finite"

LAST_ONE = dict(block_selection="last", num_perturbed_blocks=1, rho=0.5)
SMALL = dict(block_selection="budget", num_perturbed_blocks=None, max_overhead=0.4, rho=0.5)
EACH = dict(block_selection="top_k", num_perturbed_blocks=None, rho=0.5)
ONE_PASS = dict(block_selection="last", num_perturbed_blocks=2, rho=0.5, ascent_gradient="previous")
CONFIGS = {"last": LAST, "last one": LAST_ONE, "top_k": TOP, "each": EACH, "budget": SMALL, "all": ALL}


class At(TrainerCallback):
    """Calls `change(trainer, model, step)` as each step begins."""

    def __init__(self, change):
        self.change = change

    def on_step_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self.change(model, state.global_step, optimizer, lr_scheduler)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def sgd_of_the_trained(model):
    return torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)


class Six(Situation):
    """Six blocks; the optimizer holds all weights, whether or not they are trained yet."""

    new, optimizer_of = staticmethod(lambda: Net(6)), staticmethod(sgd)


def assert_goes_on(run: Run, must_skip=(), may_skip=()) -> None:
    """Each step is the literal one of what is trained then; plain ones are counted, and told with a true reason."""
    assert run.trainer.state.global_step == run.trainer.state.max_steps
    assert not told(run.messages, UNTRUE)
    assert_literal(run, may_skip=REASON)
    plain = {step for step, line in enumerate(run.lines) if line["lsam/skipped"]}
    assert set(must_skip) <= plain <= {*must_skip, *may_skip}
    assert all(line["lsam/active"] + line["lsam/skipped"] == 1 for line in run.lines)


def freeze(modules) -> None:
    for module in modules:
        module.requires_grad_(False)


def a_block_more_each_step(model, step, *rest):
    freeze(model.blocks[:step])


def all_but_the_head_at_a_step(model, step, *rest):
    if step == 2:
        freeze([model.embedding, *model.blocks])


def the_first_five_at_a_step(model, step, *rest):
    if step == 2:
        freeze([model.embedding, *model.blocks[:5]])


def all_but_one_by_one_lot(model, step, *rest):
    """LISA: one random layer is trained, another one each two steps."""
    chosen = random.Random(step // 2).randrange(6)
    for index, block in enumerate(model.blocks):
        block.requires_grad_(index == chosen)


def two_by_lot(model, step, *rest):
    chosen = random.Random(step).sample(range(6), 2)
    for index, block in enumerate(model.blocks):
        block.requires_grad_(index in chosen)


def everything_is_frozen_for_a_step(model, step, *rest):
    for block in model.blocks:
        block.requires_grad_(step != 1)


def the_last_first(model, step, *rest):
    """From the head down, a block more is trained each step."""
    for index, block in enumerate(model.blocks):
        block.requires_grad_(index >= 4 - step)


def half_a_block(model, step, *rest):
    for block in model.blocks[step:]:
        block.up.requires_grad_(step % 2 == 0)


# At which steps nothing is left to perturb among the blocks, and at which a budget may have nothing that fits.
CHANGES = {
    a_block_more_each_step: ((), (3, 4, 5)),
    all_but_the_head_at_a_step: ((2, 3, 4, 5), ()),
    the_first_five_at_a_step: ((), (2, 3, 4, 5)),
    all_but_one_by_one_lot: ((), (0, 1, 2, 3, 4, 5)),
    two_by_lot: ((), (0, 1, 2, 3, 4, 5)),
    everything_is_frozen_for_a_step: ((1,), ()),
    the_last_first: ((), ()),
    half_a_block: ((), ()),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_blocks_frozen_and_trained_by_a_callback(change, config, accumulation, tmp_path):
    run = follow(Six, tmp_path, CONFIGS[config], accumulation, callbacks=[At(change)], max_steps=6)
    nothing, too_dear = CHANGES[change]
    assert_goes_on(run, () if config == "all" else nothing, too_dear if config == "budget" else ())


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("config", [None, ONE_PASS, {**LAST, "sharpness_scope": "micro_batch"}], ids=["0", "1", "own"])
def test_so_do_the_plain_trainer_and_the_other_rules(config, change, tmp_path):
    run = follow(Six, tmp_path, config, 2, callbacks=[At(change)], max_steps=6)
    assert run.trainer.state.global_step == 6 and not told(run.messages, UNTRUE)
    if config is None:
        assert_literal(run)


def progressive(model, step, *rest):
    """To the last block, to the head, and to almost nothing."""
    freeze([*model.blocks, model.head][: 2 * step])


@pytest.mark.parametrize("config", CONFIGS)
def test_progressive_freezing_to_nothing(config, tmp_path):
    """The embedding alone is trained at last."""
    run = follow(Six, tmp_path, CONFIGS[config], callbacks=[At(progressive)], max_steps=6)
    assert_goes_on(run, () if config == "all" else (3, 4, 5))


def gradual(adds):
    """Each step unfreezes a block more, from the last one down; the optimizer gets it, or not."""

    def change(model, step, optimizer, scheduler):
        index = 3 - step
        model.blocks[index].requires_grad_(True)
        if adds:
            optimizer.add_param_group({"params": list(model.blocks[index].parameters()), "lr": 0.1})
            scheduler.base_lrs.append(0.1)
            scheduler.lr_lambdas.append(scheduler.lr_lambdas[0])

    return change


def only_the_last_two_are_trained():
    net = Net(6)
    freeze([net.embedding, *net.blocks[:4]])
    return net


class Gradual(Six):
    new, optimizer_of = staticmethod(only_the_last_two_are_trained), staticmethod(sgd_of_the_trained)


@pytest.mark.parametrize("adds", [True, False], ids=["in the optimizer", "not in the optimizer"])
@pytest.mark.parametrize("config", [LAST, TOP, EACH, BUDGET, ALL], ids=["last", "top_k", "each", "budget", "all"])
def test_gradual_unfreezing(config, adds, tmp_path):
    """What takes gradients and is in no group of the optimizer is not trained, and so not selected."""
    run = follow(Gradual, tmp_path, config, callbacks=[At(gradual(adds))], max_steps=4)
    assert_goes_on(run, may_skip=range(4) if config is BUDGET else ())
    if not adds and config is not ALL:
        assert perturbed(run) <= {"blocks.4", "blocks.5"}


def perturbed(run) -> set[str]:
    """The modules that were perturbed at any step."""
    return {name for row in run.rows.values() for name, times in row["counts"].items() if times}


class OnlyTheHead(Six):
    """The optimizer holds the head and a part of two blocks; all weights take gradients."""

    @staticmethod
    def optimizer_of(model):
        some = [*model.head.parameters(), *model.blocks[1].up.parameters(), *model.blocks[3].down.parameters()]
        return torch.optim.SGD(some, lr=0.1)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("config", CONFIGS)
def test_blocks_that_the_optimizer_does_not_hold(config, accumulation, tmp_path):
    run = follow(OnlyTheHead, tmp_path, CONFIGS[config], accumulation)
    assert_goes_on(run, may_skip=range(4) if config == "budget" else ())
    assert perturbed(run) <= {"blocks.1", "blocks.3", "all"}


class Switched(Net):
    """Two adapters in each block, one for each task."""

    def __init__(self):
        super().__init__()
        self.adapters = torch.nn.ModuleDict()
        for block in self.blocks:
            block.tasks = torch.nn.ModuleList([torch.nn.Linear(8, 8, dtype=torch.float64) for _ in range(2)])
            block.register_forward_hook(lambda block, inputs, y: y + block.tasks[self.task](inputs[0]))
        freeze([self.embedding, *(block.up for block in self.blocks), *(block.down for block in self.blocks)])
        self.task = 0
        del self.adapters

    def set_adapter(self, task):
        self.task = task
        for block in self.blocks:
            for index, adapter in enumerate(block.tasks):
                adapter.requires_grad_(index == task)


class Tasks(Situation):
    """The adapter that is trained is switched for each batch, by the loss."""

    new, optimizer_of = Switched, staticmethod(sgd)

    def loss(self, model, batch, items):
        model.set_adapter(int(batch["input_ids"][0, 0]) % 2)
        return model(**batch).loss


def adapted():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(bert().double(), lora, adapter_name="a", autocast_adapter_dtype=False)
    model.add_adapter("b", lora)
    model.set_adapter("a")
    return model.double()


class LoraTasks(Tasks):
    new = staticmethod(adapted)

    @staticmethod
    def optimizer_of(model):
        return torch.optim.SGD([weight for name, weight in model.named_parameters() if "lora_" in name], lr=0.1)

    def loss(self, model, batch, items):
        model.set_adapter("ab"[int(batch["input_ids"][0, 0]) % 2])
        return model(**batch).loss


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("config", [None, LAST, TOP, ALL], ids=["plain", "last", "top_k", "all"])
@pytest.mark.parametrize("situation", [Tasks, LoraTasks], ids=["own", "peft"])
def test_adapters_switched_for_each_batch(situation, config, accumulation, tmp_path):
    run = follow(situation, tmp_path, config, accumulation)
    assert not told(run.messages, UNTRUE)
    assert_literal(run, may_skip=f"{REASON}|adapter")


def test_the_reason_is_given_once(tmp_path):
    """Not at each of the steps."""
    run = follow(Six, tmp_path, LAST, callbacks=[At(all_but_the_head_at_a_step)], max_steps=8)
    assert sum(line["lsam/skipped"] for line in run.lines) == 6
    assert 1 <= len(told(run.messages, REASON)) <= 2
    assert run.trainer.lsam_config == LSAMConfig(**LAST)
