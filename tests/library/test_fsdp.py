"""Two processes that shard the model with FSDP2 equal one process on the union of their batches."""

import json
from collections import Counter
from pathlib import Path

import pytest
import ranks_fsdp
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from launching import launch
from tiny import Examples, arguments, assert_equal, bert, largest_difference

from hf_lsam import LSAMConfig, LSAMTrainer

METHODS = {
    "top-2": dict(rho=0.1),
    "top-2-mixed": dict(rho=0.1, alpha=0.7),
    "sam": dict(rho=0.1, block_selection="all"),
    "budget": dict(rho=0.1, block_selection="budget", max_overhead=0.7, num_perturbed_blocks=None),
    "last": dict(rho=0.1, alpha=0.7, block_selection="last"),
    "looksam": dict(rho=0.1, block_selection="all", perturb_interval=2, reuse_correction=0.7),
    "looksam-of-3": dict(rho=0.1, block_selection="all", perturb_interval=3, reuse_correction=0.7),
    "one-pass": dict(rho=0.1, ascent_gradient="previous"),
    "adaptive": dict(rho=1.0, adaptive=True),
    "adaptive-sam": dict(rho=1.0, adaptive=True, block_selection="all"),
}


def cases() -> dict[str, dict]:
    """By name what is trained."""
    bert = dict(model="bert", optimizer="sgd", mesh=[2], accumulation=1, steps=3)
    llama = bert | dict(model="llama", optimizer="adamw")
    made = {}
    for name in ("top-2-mixed", "looksam", "one-pass", "adaptive"):
        made[f"bert-{name}"] = bert | dict(config=METHODS[name], counted=True)
    made["bert-last"] = bert | dict(config=METHODS["last"], counted=True)
    for name in ("top-2", "one-pass"):
        made[f"llama-{name}"] = llama | dict(config=METHODS[name], accumulation=3)
    made["llama-budget"] = llama | dict(config=METHODS["budget"])
    made["llama-checkpointing"] = llama | dict(config=METHODS["top-2-mixed"], checkpointing="non-reentrant")
    made["bert-checkpointing"] = bert | dict(config=METHODS["top-2-mixed"], checkpointing="reentrant")
    # No dimension of a weight is even, and the head has one row, so that a process holds nothing of it.
    odd = dict(hidden_size=15, num_attention_heads=3, intermediate_size=31, vocab_size=65, num_labels=1)
    made["uneven"] = bert | dict(config=METHODS["adaptive-sam"], options=odd, optimizer="adamw")
    made["gathered-after-forward"] = bert | dict(config=METHODS["top-2-mixed"], reshard=False)
    made["evaluated"] = bert | dict(config=METHODS["sam"], evaluated=True)
    made["replicated"] = bert | dict(config=METHODS["looksam"], mesh=[2, 1])
    return made


def replayed() -> dict[str, dict]:
    """By name what one process cannot equal, since each draws its own dropout or rounds to 16 bits."""
    base = dict(model="bert", optimizer="sgd", mesh=[2], accumulation=1, steps=3, config=METHODS["last"])
    policy = dict(param_dtype="bfloat16", reduce_dtype="float32")
    return {
        "dropout": base | dict(options=dict(dropout=0.2)),
        "bf16": base | dict(policy=policy, dtype="float32"),
    }


def trainings() -> dict[str, dict]:
    """By name what is trained through the Trainer."""
    two = dict(per_device_train_batch_size=2, max_steps=4, save_strategy="steps", save_steps=2)
    base = dict(model="bert", rows=16, arguments=two)
    made = {}
    for name in ("looksam-of-3", "one-pass"):
        made[f"trainer-{name}"] = base | dict(config=METHODS[name], resume=2)
    accumulated = two | dict(gradient_accumulation_steps=3, save_strategy="no")
    made["trainer-top-2"] = base | dict(config=METHODS["top-2-mixed"], rows=48, arguments=accumulated)
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What two processes saved of each case, all of them trained in one launch."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 of torch 2.6 needs a GPU")
    folder = tmp_path_factory.mktemp("ranks")
    in_full = {f"{name}-in-full": case | dict(replay=False) for name, case in replayed().items()}
    (folder / "cases.json").write_text(json.dumps(cases() | replayed() | in_full | trainings()))
    launch(ranks_fsdp.__file__, folder)
    return folder


def results(trained: Path, name: str) -> list[dict]:
    return [torch.load(trained / f"{name}.{rank}.pt") for rank in range(2)]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", list(cases()))
def test_two_processes_equal_one(name, trained):
    first, second = results(trained, name)
    single = ranks_fsdp.train(cases()[name], sharded=False)
    assert first["chosen"] == second["chosen"] == single["chosen"]
    assert first["runs"] == second["runs"] == single["runs"]
    assert first["replayed"] == second["replayed"] == single["replayed"]
    assert largest_difference(first["weights"], single["weights"]) < 1e-12


def test_pass_2_sends_only_what_it_needs(trained):
    """Beside the gathering of weights: gradients of the selected blocks, an all-reduce for all norms, and flags."""
    selected = results(trained, "bert-last")[0]
    # A plain step gathers 4 blocks and the rest forward, 4 blocks backward. Pass 2 gathers the 2 replayed blocks as
    # well, as their hooks run, and backward the one before the first perturbed block, which FSDP2 prefetches.
    plain = {"allgather_base": 9, "reduce_scatter_base": 5}
    second = {"allgather_base": 5 + 3, "reduce_scatter_base": 2, "all_reduce": 2, "allreduce": 1}
    assert selected["collectives"][1] == dict(Counter(plain) + Counter(second))
    # One pass: the norms of the gradient that the next step climbs.
    assert results(trained, "bert-one-pass")[0]["collectives"][1] == plain | {"all_reduce": 1}
    # LookSAM: to reuse the correction, the norm of the gradient; to find it, a product and two more norms.
    looksam = results(trained, "bert-looksam")[0]["collectives"]
    assert [counts["all_reduce"] for counts in looksam][1:] == [1, 5]


@pytest.mark.parametrize("name", list(replayed()))
def test_replay_is_used_and_equals_a_full_pass_2(name, trained):
    for replay, full in zip(results(trained, name), results(trained, f"{name}-in-full"), strict=True):
        assert replay["replayed"] and not full["replayed"]
        # At the first step a full pass 2 is compared with pass 1, and a replayed one with a full one.
        assert full["runs"] == [8 + 4, 8, 8]
        assert replay["runs"] == [4 + 4 + 4 + 2, 4 + 2, 4 + 2]
        assert_equal(replay["weights"], full["weights"])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", list(trainings()))
def test_two_processes_of_the_trainer_equal_one(name, trained, tmp_path):
    case = trainings()[name]
    first, second = results(trained, name)
    assert_equal(first["weights"], second["weights"])
    one = case["arguments"] | dict(per_device_train_batch_size=4, save_strategy="no")
    single = ranks_fsdp.train_with_trainer(case | dict(arguments=one, resume=None), tmp_path)
    assert largest_difference(first["weights"], single["weights"]) < 1e-12


@pytest.mark.parametrize("name", [name for name, case in trainings().items() if "resume" in case])
def test_a_resumed_training_equals_the_uninterrupted_one(name, trained):
    """The state of the step is gathered for the checkpoint, and sharded again."""
    for result in results(trained, name):
        assert_equal(result["weights"], result["resumed"])


UNSUPPORTED = {
    "FSDP1": (1, LSAMConfig(), "fsdp_version: 2"),
    "micro_batch": (2, LSAMConfig(sharpness_scope="micro_batch"), "sharpness_scope='batch'"),
}


@pytest.mark.parametrize("reason", list(UNSUPPORTED))
def test_what_is_not_shown_is_refused_before_training(reason, tmp_path, monkeypatch):
    version, config, way_out = UNSUPPORTED[reason]
    trainer = LSAMTrainer(bert(), arguments(tmp_path), train_dataset=Examples(16), lsam_config=config)
    state = trainer.accelerator.state
    monkeypatch.setattr(state, "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr(state, "fsdp_plugin", FullyShardedDataParallelPlugin(fsdp_version=version), raising=False)
    with pytest.raises(NotImplementedError, match=reason) as raised:
        trainer.train()
    assert way_out in str(raised.value) and "block_selection='none'" in str(raised.value)


def test_a_model_that_transformers_sharded_when_loading_it_is_refused(tmp_path):
    trainer = LSAMTrainer(bert(), arguments(tmp_path), train_dataset=Examples(16), lsam_config=LSAMConfig())
    trainer.is_distributed_loading_by_transformers = True
    with pytest.raises(NotImplementedError, match="distributed_config.*block_selection='none'"):
        trainer.train()
