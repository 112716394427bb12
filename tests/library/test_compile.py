"""Under `torch.compile` a step is that of eager, bit for bit, and no selection of blocks compiles anything anew."""

from functools import partial

import pytest
import torch
from packaging import version
from tiny import (
    VOCABULARY,
    Examples,
    arguments,
    assert_equal,
    block_rows,
    largest_difference,
    out_of_reach,
    training_lines,
    weights,
)
from torch import nn
from torch._dynamo import utils
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_lsam import LSAMConfig, LSAMTrainer

BLOCKS, STEPS = 6, 24


class Block(GradientCheckpointingLayer):
    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.norm, self.linear, self.dropout = norm(16), nn.Linear(16, 16), nn.Dropout(0.1)

    def forward(self, x, gate):
        return x + gate * self.dropout(torch.tanh(self.linear(self.norm(x))))


class Net(nn.Module):
    """The first token of an example says how much each block matters, so the selected sets differ between steps."""

    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        set_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.blocks = nn.ModuleList(Block(norm) for _ in range(BLOCKS))
        self.head = nn.Linear(16, 3)
        self.register_buffer("gates", 0.1 + 0.9 * torch.randint(0, 2, (VOCABULARY, BLOCKS, 1)))

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.embedding(input_ids).mean(1)
        gates = self.gates[input_ids[:, 0]]
        for index, block in enumerate(self.blocks):
            x = block(x, gates[:, index])
        return {"loss": nn.functional.cross_entropy(self.head(x), labels)}


class Graphs(LSAMTrainer):
    """Notes how many graphs there are after each step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.graphs = {}

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.graphs[self.state.global_step] = utils.counters["stats"]["unique_graphs"]
        return loss


@pytest.fixture(autouse=True)
def compiled_anew():
    torch._dynamo.reset()
    utils.counters.clear()
    yield
    torch._dynamo.reset()


def trainer_for(folder, how, config=None, model=None, steps=STEPS, **options):
    """A trainer that compiles the model as a whole, block by block, or not at all."""
    if how != "eager":
        options["torch_compile_backend"] = "aot_eager"
    options = {"optim": "sgd", "learning_rate": 0.05, "logging_steps": 1, "per_device_train_batch_size": 2} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", str(how == "regional"))
        return Graphs(
            model=model or Net(),
            args=arguments(folder, max_steps=steps, **options),
            train_dataset=Examples(steps * options["per_device_train_batch_size"]),
            lsam_config=config or LSAMConfig(rho=0.3, alpha=0.7),
        )


def train(*args, **kwargs):
    trainer = trainer_for(*args, **kwargs)
    trainer.train()
    return trainer


@pytest.mark.parametrize("how, added", [("whole", 0), ("regional", 5)])
def test_equals_eager_and_compiles_nothing_anew_for_another_selection(how, added, tmp_path):
    """
    Pass 2 adds no graph to those of a model that is compiled as a whole, and at most five to those of regions: the
    blocks with an input that takes no gradient, blocks, embedding and head with weights that take none, and, for the
    full pass that it is compared with, blocks with neither.
    """
    compiled = train(tmp_path / how, how)
    eager = train(tmp_path / "eager", "eager")
    assert_equal(weights(compiled.model), weights(eager.model))
    assert compiled.graphs[4] == compiled.graphs[STEPS - 1]
    for left, right in zip(block_rows(tmp_path / how), block_rows(tmp_path / "eager"), strict=True):
        assert left == right
    assert len({tuple(row["counts"].values()) for row in block_rows(tmp_path / how)}) > 8
    overheads = [line["lsam/overhead"] for line in training_lines(compiled)]
    if how == "whole":
        assert set(overheads) == {1.0}
    else:
        assert overheads == [line["lsam/overhead"] for line in training_lines(eager)]
    torch._dynamo.reset()
    utils.counters.clear()
    plain = train(tmp_path / "plain", how, LSAMConfig(block_selection="none"), steps=3)
    more = compiled.graphs[STEPS - 1] - plain.graphs[2]
    # Older torch needs fewer.
    assert more == added if version.parse(torch.__version__) >= version.parse("2.13") else 0 <= more <= added


def test_compiled_blocks_are_replayed(tmp_path):
    """
    Of three steps, blocks before the selected last two run in pass 1 only, and all of them in the two full passes that
    the first pass 2 is compared with.
    """
    notes = out_of_reach(calls=[])

    class Count(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            for index, block in enumerate(trainer.model_wrapped.blocks):

                def counted(*args, index=index, forward=block.forward):
                    notes.calls.append(index)
                    return forward(*args)

                block.forward = counted

    trainer = trainer_for(tmp_path, "regional", LSAMConfig(rho=0.3, block_selection="last"), steps=3)
    trainer.add_callback(Count())
    trainer.train()
    assert [notes.calls.count(index) for index in range(BLOCKS)] == [3 + 2] * (BLOCKS - 2) + [6 + 2] * 2


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("how", ["whole", "regional"])
def test_batch_norm_compiles_one_graph_more_and_is_counted_once(how, tmp_path):
    config = LSAMConfig(rho=0.3)
    compiled = train(tmp_path / how, how, config, Net(norm=nn.BatchNorm1d), per_device_train_batch_size=4, steps=12)
    assert compiled.graphs[4] == compiled.graphs[11]
    eager = train(
        tmp_path / "eager", "eager", config, Net(norm=nn.BatchNorm1d), per_device_train_batch_size=4, steps=12
    )
    assert largest_difference(weights(compiled.model), weights(eager.model)) < 1e-12
    assert int(compiled.model.blocks[0].norm.num_batches_tracked) == 12


def test_parts_of_compiled_blocks_take_their_gradients_with_the_block(tmp_path):
    """As candidates they select any part of a block, which compiles nothing anew; the cost is that of the block."""
    config = LSAMConfig(rho=0.3, block_pattern=r"blocks\.\d\.(norm|linear)", num_perturbed_blocks=1)
    compiled = train(tmp_path / "regional", "regional", config)
    eager = train(tmp_path / "eager", "eager", config)
    assert_equal(weights(compiled.model), weights(eager.model))
    assert compiled.graphs[6] == compiled.graphs[STEPS - 1]
    block, head = 16 * 16 + 3 * 16, 16 * 3 + 3
    line = training_lines(compiled)[0]
    left = BLOCKS - line["lsam/first_block"]
    expected = (2 * (left * block + head) + block) / (3 * (BLOCKS * block + head))
    assert line["lsam/overhead"] == pytest.approx(expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", ["whole", "regional"])
def test_activation_checkpointing(how, reentrant, tmp_path):
    results = []
    for way in (how, "eager"):
        model = Net()
        for block in model.blocks if way == how else []:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
        results.append(weights(train(tmp_path / way, way, model=model, steps=6).model))
    assert largest_difference(*results) < 1e-12


@pytest.mark.parametrize("how", ["whole", "regional"])
def test_a_compiled_run_is_resumed_without_compiling(how, tmp_path):
    """What one pass keeps goes by the names of the model itself, as do the rows of the blocks file."""
    config = LSAMConfig(rho=0.3, ascent_gradient="previous")
    options = dict(save_strategy="steps", save_steps=3, steps=6)
    eager = train(tmp_path / "eager", "eager", config, **options)
    train(tmp_path / how, how, config, **options)
    assert list(block_rows(tmp_path / how)[0]["counts"]) == [f"blocks.{index}" for index in range(BLOCKS)]
    resumed = trainer_for(tmp_path / how, "eager", config, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / how / "checkpoint-3"))
    assert_equal(weights(resumed.model), weights(eager.model))
    assert block_rows(tmp_path / how) == block_rows(tmp_path / "eager")


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_that_its_user_compiled(whole, tmp_path):
    """With `Module.compile`, which changes the module itself."""
    model = Net()
    for module in [model] if whole else model.blocks:
        module.compile(backend="aot_eager")
    compiled = train(tmp_path / "compiled", "eager", model=model)
    assert_equal(weights(compiled.model), weights(train(tmp_path / "eager", "eager").model))
    assert compiled._lsam.second_pass.replays is not whole
    assert compiled.graphs[4] == compiled.graphs[STEPS - 1] > 0
    assert all("forward" not in vars(block) for block in model.blocks)


def test_a_budget_below_a_whole_step_needs_regional_compilation(tmp_path):
    config = LSAMConfig(rho=0.3, block_selection="budget", max_overhead=0.6)
    with pytest.raises(ValueError, match="max_overhead=0.6 cannot be met. Compile the blocks one by one"):
        train(tmp_path, "whole", config)
    model = Net()
    model.compile(backend="aot_eager")
    with pytest.raises(ValueError, match="costs 1.000 of a plain step"):
        train(tmp_path, "eager", config, model)
    trainer = train(tmp_path, "regional", config, steps=4)
    assert all(line["lsam/overhead"] <= 0.6 for line in training_lines(trainer))


def test_micro_batches_of_several_processes_need_regional_compilation(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path, "whole", LSAMConfig(sharpness_scope="micro_batch"))
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(NotImplementedError, match="sharpness_scope='batch'"):
        trainer.train()


class Ran(Net):
    """Its blocks are run by a method."""

    def run(self, x, gates):
        for index, block in enumerate(self.blocks):
            x = block(x, gates[:, index])
        return x

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.run(self.embedding(input_ids).mean(1), self.gates[input_ids[:, 0]])
        return {"loss": nn.functional.cross_entropy(self.head(x), labels)}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("config", [dict(block_selection="last"), dict(alpha=0.7), dict(block_selection="all")])
@pytest.mark.parametrize("method", ["forward", "run"])
def test_a_compiled_method_that_runs_the_blocks(method, config, tmp_path):
    """`model.forward = torch.compile(model.forward)`: pass 2 is a plain one, and compiles nothing anew later on."""
    config = LSAMConfig(rho=0.3, **config)
    model = Ran()
    setattr(model, method, torch.compile(getattr(model, method), backend="aot_eager"))
    compiled = train(tmp_path / "compiled", "eager", config, model)
    eager = train(tmp_path / "eager", "eager", config, Ran())
    assert largest_difference(weights(compiled.model), weights(eager.model)) < 1e-12
    assert compiled.graphs[4] == compiled.graphs[STEPS - 1]
    assert {line["lsam/overhead"] for line in training_lines(compiled)} == {1.0}
