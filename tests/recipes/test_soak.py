"""A run may be as long as it likes: nothing that it keeps grows, and its weights stay those of the reference."""

import json
import random

import pytest
import torch

from hf_lsam.step_log import Perturbed, StepLog
from hf_lsam_recipes.studies import soak, soak_twin
from hf_lsam_recipes.studies.soak_stretch import Rows, Stretch, build


def test_a_short_soak_agrees_with_the_reference(tmp_path):
    """With faults of each kind among its steps."""
    path = tmp_path / "soak.json"
    soak.main(["--steps", "60", "--longest", "24", "--seed", "8", "--output_file", str(path)])
    results = json.loads(path.read_text())
    assert results["steps"] == 60 and results["stamp"]["seeds"] == [8]
    assert results["largest_difference"] == max(row["largest_difference"] for row in results["stretches"]) < 1e-12
    assert results["faults"] == sum(row["faults"] for row in results["stretches"]) > 0
    assert set(results["growth"]) == {"rss_mib", "objects", "tensors"}
    assert len({row["tensors"] for row in results["stretches"]}) == 1


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_second_pass_that_raises_leaves_the_plain_gradient(alpha, scope, accumulation):
    """With alpha = 1, too, where the gradient of pass 1 is computed again."""
    config = {"block_selection": "top_k", "rho": 0.1, "alpha": alpha, "sharpness_scope": scope}
    rest = {"dropout": 0.1, "checkpointing": False, "clipping": 1.0, "adamw": True, "frozen": 0, "logging": 0}
    stretch = Stretch(8, config, accumulation, **rest, evaluation=0, fault="error", fault_rate=0.6)
    figures = soak.run(build(0), build(0), Rows(0), stretch, random.Random(0))
    assert figures["faults"] > 0 and figures["largest_difference"] < 1e-12


def test_a_soak_that_drifts_ends_with_an_error(monkeypatch):
    gradient = soak_twin.reference.gradient
    wrong = lambda *args: {p: g * (1 + 1e-6) for p, g in gradient(*args).items()}  # noqa: E731
    monkeypatch.setattr(soak_twin.reference, "gradient", wrong)
    with pytest.raises(SystemExit, match="Weights drifted from the reference: by up to"):
        soak.main(["--steps", "8", "--longest", "12"])


def test_a_line_through_what_grows():
    rows = [{"end": end, "objects": 100 + 3 * end / 1000} for end in range(0, 8000, 1000)]
    grown = soak.growth(rows, "objects")
    assert grown["per_1000_steps"] == pytest.approx(3) and grown["standard_error"] == pytest.approx(0, abs=1e-9)
    assert (grown["first"], grown["last"]) == (112, 121)


def test_a_run_that_logs_nothing_does_not_keep_every_step():
    log = StepLog(["a", "b"], ["a", "b"])
    for step in range(1000):
        log.add(Perturbed(torch.tensor(step % 10 != 0), [step % 2], torch.tensor([1.0, 3.0]), [1, 1], 0.1, 0, 0.5))
        assert len(log.pending) <= 256
    row = log.row(1000, 1.0)
    assert (row["perturbed"], row["skipped"], row["counts"]) == (900, 100, {"a": 400, "b": 500})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "soak.py: error: steps must be at least 1, but is 0"),
        (["--longest", "3"], "soak.py: error: longest must be at least 12, but is 3"),
        (["--output_file", "none/soak.json"], "soak.py: error: output_file=none/soak.json: none is not a folder"),
    ],
)
def test_a_soak_of_nothing_is_refused(options, message):
    with pytest.raises(SystemExit, match=message):
        soak.main(options)
