"""`LSAM` in loops of several processes, and with Accelerate."""

import json
import os

import pytest
import ranks_loop
import torch
from accelerate.state import AcceleratorState, GradientState
from launching import launch
from tiny import Examples, assert_equal, bert, largest_difference, weights
from tiny_loop import loop

from hf_lsam import LSAM, LSAMConfig

CASES = {
    "top 2": {"config": dict(rho=0.1, alpha=0.8)},
    "micro-batch": {"config": dict(rho=0.1, sharpness_scope="micro_batch", block_selection="last")},
    "one pass": {"config": dict(rho=0.1, ascent_gradient="previous")},
    "looksam": {"config": dict(rho=0.1, block_selection="all", perturb_interval=2, reuse_correction=0.7)},
    "fault": {"config": dict(rho=0.1), "fails_in": 1},
    "views": {"config": dict(rho=0.1), "ddp": {"gradient_as_bucket_view": True}},
    # The last ones: an Accelerator stays.
    "accelerate": {"config": dict(rho=0.1, alpha=0.8), "accelerate": True},
    "accelerate, one pass": {"config": dict(rho=0.1, ascent_gradient="previous"), "accelerate": True},
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What two processes leave of each case."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "cases.json").write_text(json.dumps(CASES))
    launch(ranks_loop.__file__, folder)
    return folder


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_with_all_of_the_batch(name, launched):
    one, two = (torch.load(launched / f"{name}.{rank}.pt", weights_only=True) for rank in range(2))
    assert_equal(one["weights"], two["weights"])
    assert one["step"] == 4 and one["log"]["lsam/active"] >= 0.5 and one["log"]["lsam/skipped"] == 0
    # Buffers are sent before the first pass of a step, as ever.
    assert two["calls_left"] == 0 and one["buffers_sent"] == [False] * (1 if name == "micro-batch" else 4)
    # Until the last micro-batch each has gradients of its own.
    unsynced = [(left, right) for left, right in zip(one["unsynced"], two["unsynced"], strict=True) if left]
    assert len(unsynced) == 8 and all(left != right for left, right in unsynced)
    if name != "micro-batch":
        case = {"config": CASES[name]["config"]}
        assert largest_difference(one["weights"], ranks_loop.train(case)["weights"]) < 1e-12


@pytest.mark.usefixtures("float64")
def test_micro_batches_of_two_processes_are_those_of_one(launched):
    """Six micro-batches of two rows in one process are three in each of two."""
    config = LSAMConfig(**CASES["micro-batch"]["config"])
    examples, model = Examples(48), bert().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    lsam = LSAM(model, optimizer, config, max_steps=4)
    loop(model, optimizer, lsam, examples, 4, size=2, accumulation=6)
    two = torch.load(launched / "micro-batch.0.pt", weights_only=True)
    assert largest_difference(weights(model), two["weights"]) < 1e-12


def test_processes_that_would_train_alone_and_static_graphs_are_refused(launched):
    told = json.loads((launched / "refusals.1.json").read_text())
    assert told["alone"].startswith("2 processes run, but each would train alone. Give LSAM the model that")
    assert told["static"].startswith(
        "static_graph=True requires that DistributedDataParallel averages gradients in every step or in none"
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("config", [dict(rho=0.1), dict(rho=0.1, ascent_gradient="previous"), dict(rho=0)])
def test_accelerate_changes_nothing(config, monkeypatch):
    # What Trainers of other tests have left in this process: precision, compilation.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    ours, plain = ranks_loop.train({"config": config, "accelerate": True}), ranks_loop.train({"config": config})
    assert_equal(ours["weights"], plain["weights"])
    assert ours["log"] == plain["log"] and ours["step"] == plain["step"] == 4
