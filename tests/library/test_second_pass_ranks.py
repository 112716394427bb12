"""Two processes: pass 2 calls the model as pass 1 does, wrapper included, and both stay in step."""

import contextlib

import pytest
import ranks_second_pass as ranks
import torch
from launching import launch
from tiny import largest_difference

NAMES = {situation.__name__: situation for situation in ranks.SITUATIONS}
FAILING = {"Fails", "AlwaysFails"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the two processes saved each run, all of them in one launch; those before an end that is not good."""
    folder = tmp_path_factory.mktemp("ranks")
    with contextlib.suppress(AssertionError):
        launch(ranks.__file__, folder)
    return folder


def of_both(folder, name, accumulation, rho) -> list[dict]:
    """Of a run, what both processes saved; they hold the same weights."""
    files = [folder / f"{name}, {accumulation}, {rho}, {rank}.pt" for rank in range(2)]
    both = [torch.load(file, weights_only=False) if file.exists() else {"error": "it never ended"} for file in files]
    assert not any("error" in each for each in both), both
    assert largest_difference(*(each["weights"] for each in both)) == 0
    return both


@pytest.mark.parametrize("accumulation", ranks.ACCUMULATIONS)
@pytest.mark.parametrize("name", sorted(NAMES.keys() - FAILING))
def test_with_next_to_no_rho_it_is_the_plain_trainer(name, accumulation, folder):
    plain, ours = of_both(folder, name, accumulation, None), of_both(folder, name, accumulation, 1e-9)
    for one, other in zip(plain, ours, strict=True):
        assert largest_difference(one["left"], other["left"]) < 1e-7
        assert other["seen"] == one["seen"] == {"DistributedDataParallel"}


@pytest.mark.parametrize("accumulation", ranks.ACCUMULATIONS)
@pytest.mark.parametrize("name", sorted(NAMES.keys() - FAILING - {"Averages"}))
def test_two_processes_are_one(name, accumulation, folder, tmp_path):
    """One process takes the rows of both."""
    one = ranks.train(NAMES[name], tmp_path, accumulation, 0.5, rows=4)
    assert one["skipped"] == [0, 0, 0, 0]
    for each in of_both(folder, name, accumulation, 0.5):
        assert largest_difference(each["weights"], one["weights"]) < 1e-9
        assert each["seen"] == {"DistributedDataParallel"} and each["skipped"] == one["skipped"]


@pytest.mark.parametrize("accumulation", ranks.ACCUMULATIONS)
@pytest.mark.parametrize("name", sorted(FAILING))
def test_what_one_process_raises_in_pass_2_leaves_both_in_step(name, accumulation, folder):
    both = of_both(folder, name, accumulation, 0.5)
    assert both[0]["skipped"] == both[1]["skipped"] and both[1]["told"]
    assert both[0]["skipped"] in ([0, 1, 0, 0], *([[0, 0, 0, 0]] if name == "Fails" else []))
    if sum(both[0]["skipped"]) == 0:
        usual = of_both(folder, "Situation", accumulation, 0.5)[0]
        assert largest_difference(both[0]["weights"], usual["weights"]) < 1e-9
