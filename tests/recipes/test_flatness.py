"""The tables of figures beside the metric of a comparison."""

import json

import pytest

from hf_lsam_recipes.studies import flatness

METHODS = {"AdamW": 0.0, "SAM": -0.2, "half of it": -0.1, "nothing": 0.0}


@pytest.fixture
def folder(tmp_path):
    """A comparison of four methods with three seeds, and one run for tuning; the first task has data of a shift."""
    for task, shift in (("one", True), ("two", False)):
        for method, effect in METHODS.items():
            for seed in range(3):
                write(tmp_path, task, method, seed, effect, shift)
    write(tmp_path, "one", "SAM", 100, 9.0, True, tuning=True)
    return tmp_path


def write(folder, task, method, seed, effect, shift, tuning=False):
    loss = 1 + 0.1 * seed + effect * (1 + 0.01 * (seed - 1))
    metrics = {"eval_nll_scaled": loss, "predict_nll_scaled": loss, "predict_accuracy": 0.8, "train_loss": 0.1}
    result = dict(
        task=task,
        method=method,
        seed=seed,
        tuning=tuning,
        chosen={} if method == "AdamW" else {"rho": 0.1},
        metrics=metrics | ({"shift_nll_scaled": 2 * loss} if shift else {}),
        training_seconds=10 * (1 - effect),
        step_seconds=1.0,
        flops=100 * (1 - effect),
        peak_memory_mib=1000,
        commit="abc",
        machine="m",
        versions={"torch": "2"},
    )
    path = folder / task / method / f"{seed}-{tuning}" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))


def test_holm_on_a_worked_example():
    assert flatness.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert flatness.holm([0.6, 0.7]) == [1, 1]


def test_tables_are_those_of_the_file_and_of_the_folder(folder, tmp_path, capsys):
    flatness.main([str(folder), "--csv", str(tmp_path / "runs.csv")])
    printed = capsys.readouterr().out
    flatness.main([str(tmp_path / "runs.csv")])
    assert capsys.readouterr().out == printed
    titles = [line for line in printed.splitlines() if line.startswith("## ")]
    assert titles == [
        "## one: scaled loss on test data",
        "## one: scaled loss under shift",
        "## one: accuracy on test data",
        "## two: scaled loss on test data",
        "## two: accuracy on test data",
    ]


def test_a_row_holds_the_difference_to_the_same_seed_and_the_share_of_sam(folder):
    runs = flatness.collect(folder)
    own = [run for run in runs if run["task"] == "one" and run["stage"] == "compared"]
    rows = {row["method"]: row for row in flatness.table(own, "predict_nll_scaled")}
    assert rows["AdamW"]["value"] == "1.1000" and rows["AdamW"]["seeds"] == "3"
    half = rows["half of it (rho=0.1)"]
    # t of two degrees of freedom: 4.303; the deviation of the differences is 0.001.
    assert half["difference (95 %)"] == "-0.1000 [-0.1025, -0.0975]"
    assert half["share of SAM's"] == "50%" and half["training time"] == half["FLOPs"] == "1.10"
    assert float(half["p (Holm)"]) < 0.001 and rows["nothing (rho=0.1)"]["p (Holm)"] == "1.000"


def test_a_folder_without_runs_is_told(tmp_path):
    with pytest.raises(SystemExit, match="holds no finished run"):
        flatness.main([str(tmp_path)])
