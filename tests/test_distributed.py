"""Two processes under DistributedDataParallel equal one process on the union of their batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from tiny import largest_difference

METHODS = {
    "top-2": dict(rho=0.1, alpha=0.7),
    "sam": dict(rho=0.1, block_selection="all"),
    "looksam": dict(rho=0.1, block_selection="all", perturb_interval=3, reuse_correction=0.7),
    "one-pass": dict(rho=0.1, ascent_gradient="previous"),
}


def cases() -> dict[str, dict]:
    """By name what two processes train; `single` are the arguments of the one process that is to equal them."""
    made = {}
    for model in ("bert", "llama"):
        for name, config in METHODS.items():
            two = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3)
            one = dict(per_device_train_batch_size=4, gradient_accumulation_steps=3)
            made[f"{model}-{name}"] = dict(model=model, config=config, rows=48, arguments=two, single=one)
    base = dict(model="bert", config=METHODS["top-2"], rows=16)
    two, one = dict(per_device_train_batch_size=2), dict(per_device_train_batch_size=4)
    made["no-accumulation"] = base | dict(arguments=two, single=one)
    for flag in (True, False):
        unused = two | dict(ddp_find_unused_parameters=flag)
        made[f"find-unused-{flag}"] = base | dict(arguments=unused, single=one)
    checkpointing = dict(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False})
    made["checkpointing"] = base | dict(arguments=two | checkpointing, single=one)
    # The union of the micro-batches of a step, each perturbed by its own gradient and on blocks that all agree on.
    own = dict(rho=0.1, sharpness_scope="micro_batch", block_selection="last")
    one = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    made["micro-batch"] = dict(model="bert", config=own, rows=16, arguments=two, single=one)
    two = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    one = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    made["micro-batch-accumulated"] = dict(model="bert", config=own, rows=32, arguments=two, single=one)
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What two processes saved of each case, all of them trained in one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "cases.json").write_text(json.dumps(cases()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, ranks.__file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", list(cases()))
def test_two_processes_equal_one(name, trained, tmp_path):
    case = cases()[name]
    first, second = (torch.load(trained / f"{name}.{rank}.pt")["weights"] for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    single = ranks.train(case | {"arguments": case["single"]}, tmp_path)
    assert largest_difference(first, single) < 1e-12


def test_pass_2_costs_one_all_reduce_of_the_selected_gradients(trained):
    """Beside what DistributedDataParallel sends itself, which goes past `dist.all_reduce`."""
    block = sum(p.numel() for p in ranks.MODELS["bert"]().bert.encoder.layer[0].parameters())
    assert torch.load(trained / "bert-top-2.0.pt")["all_reduced"] == [2 * block] * 4
    assert torch.load(trained / "bert-one-pass.0.pt")["all_reduced"] == []
