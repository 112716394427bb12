"""Comparisons: which runs there are, that they go on after a kill, and that nothing is mixed."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_compare import STAMP

from hf_lsam_recipes import compare
from hf_lsam_recipes.support.comparison import runs as compare_runs

pytest_plugins = ["compare_fixtures"]

RECIPES = Path(compare.__file__).parent


def table_in(folder: Path) -> list[list[str]]:
    """The cells of the table in `report.md`, line by line."""
    lines = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def calls(config_path: Path) -> list[str]:
    path = config_path.parent / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_runs_are_processes_with_a_result_each_and_without_weights(config, tmp_path):
    path = config()
    assert compare.main([str(path)]) == 0
    assert sorted(calls(path)) == ["1 0 anew", "1 1 anew", "3 0 anew", "3 1 anew"]
    folder = tmp_path / "out" / "t" / "b" / "seed-1"
    result = json.loads((folder / "result.json").read_text())
    assert STAMP.items() <= result.items()
    assert (result["seed"], result["settings"]["value"], result["metrics"]["predict_accuracy"]) == (1, "3", 0.31)
    assert (result["training_seconds"], result["step_seconds"], result["flops"]) == (25.0, 3.0, 300.0)
    assert result["blocks"] == [{"step": 2, "steps": 2, "counts": {"a": 1}}]
    assert result["curve"][1]["eval_accuracy"] == 0.3
    assert not [*folder.rglob("*.safetensors"), *folder.rglob("checkpoint-*"), *folder.rglob("*.draft")]
    [cells] = [cells for cells in table_in(tmp_path / "out") if cells[0] == "B"]
    assert cells[:4] == ["B", "0.3050 (0.3000 to 0.3100)", "+0.2000 [+0.2000, +0.2000]", "2 / 0"]
    assert cells[4:] == ["3.57x", "3.00x", "3.00x", "1.00x", "2"]
    # Nothing is left to do, and the report is the same.
    report = (tmp_path / "out" / "report.html").read_bytes()
    assert compare.main([str(path)]) == compare.main([str(path), "--report_only"]) == 0
    assert len(calls(path)) == 4
    assert (tmp_path / "out" / "report.html").read_bytes() == report


def test_weights_are_kept_on_demand(config, tmp_path):
    compare.main([str(config(keep_models=True, seeds=[0]))])
    assert len([*tmp_path.rglob("model.safetensors")]) == len([*tmp_path.rglob("checkpoint-2")]) == 2


def test_changed_settings_are_not_mixed_with_old_results(config, tmp_path):
    compare.main([str(config(seeds=[0]))])
    changed = config(seeds=[0, 1], methods={"A": {"value": 1}, "B": {"value": 4}})
    with pytest.raises(SystemExit, match=r"T, B, seed 0 .*value was 3, and is 4\. .*remove .*/t/b/seed-0"):
        compare.main([str(changed)])
    with pytest.raises(SystemExit, match=r"value was 3, and is 4"):
        compare.main([str(changed), "--report_only"])
    assert len(calls(changed)) == 2
    # Other data has a folder of its own.
    assert compare.main([str(config(seeds=[0])), "--label_noise", "0.2", "--train_fraction", "0.5"]) == 0
    result = tmp_path / "out" / "label_noise-0.2_train_fraction-0.5" / "t" / "a" / "seed-0" / "result.json"
    settings = json.loads(result.read_text())["settings"]
    assert (settings["label_noise"], settings["train_fraction"]) == ("0.2", "0.5")


def test_a_damaged_result_is_named_with_the_way_out(config, tmp_path, capsys):
    path = config(seeds=[0])
    assert compare.main([str(path)]) == 0
    result = tmp_path / "out" / "t" / "b" / "seed-0" / "result.json"
    for text in (result.read_text()[:40], "{}", "[]"):
        result.write_text(text)
        for options in ([], ["--report_only"]):
            with pytest.raises(
                SystemExit, match=r"b/seed-0/result.json is damaged \(.*\): remove it to run T, B, seed 0"
            ):
                compare.main([str(path), *options])
    result.unlink()
    assert compare.main([str(path)]) == 0


def test_an_output_dir_that_is_a_file_is_refused(config, tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises(SystemExit, match=rf"output_dir=.*{place} cannot be created \(.*\): name another folder"):
            compare.main([str(config()), "--output_dir", str(tmp_path / place)])


def test_a_run_that_fails_stops_no_other_and_is_missing_in_the_report(config, tmp_path, capsys):
    path = config(methods={"A": {"value": 1}, "bad": {"value": 13}, "B": {"value": 3}}, seeds=[0])
    assert compare.main([str(path)]) == 1
    out, err = capsys.readouterr()
    assert re.search(r"(?s)T, bad, seed 0 failed \(exit code 1\):.*no luck.*log\.txt", err)
    assert "Missing runs, of 3: T, bad, seed 0." in out
    rows = table_in(tmp_path / "out")
    assert [row[:2] for row in rows if row[0] == "bad"] == [["bad", "missing"]]
    assert [row[0] for row in rows[2:]] == ["A", "bad", "B"]
    assert compare.main([str(path), "--report_only"]) == 1
    # It is tried again.
    assert compare.main([str(path)]) == 1
    assert calls(path).count("13 0 anew") == 2 and len(calls(path)) == 4
    capsys.readouterr()
    # Of many, the first few are named.
    many = config(methods={"A": {"value": 1}, "B": {"value": 3}}, seeds=list(range(5)))
    assert compare.main([str(many), "--report_only"]) == 1
    named = "T, A, seed 1; T, A, seed 2; T, A, seed 3; T, A, seed 4; and 4 more"
    assert f"Missing runs, of 10: {named}." in capsys.readouterr().out


def test_a_metric_that_the_recipe_lacks_is_named(config, capsys):
    path = config(tasks={"T": {"metric": "predict_f1"}}, seeds=[0], methods={"A": {"value": 1}})
    with pytest.raises(SystemExit, match="holds no finished run"):
        compare.main([str(path)])
    assert "has no predict_f1, but eval_accuracy, " in capsys.readouterr().err
    compare.main([str(config(seeds=[0]))])
    path = config(tasks={"T": {"metric": "predict_f1"}}, seeds=[0])
    with pytest.raises(SystemExit, match="T, A, seed 0 has an earlier result without predict_f1, but with eval_acc"):
        compare.main([str(path), "--report_only"])


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_comparison_goes_on_from_the_last_checkpoint(config, tmp_path, capsys, number):
    path = config(methods={"A": {"value": 1}}, processes=1)
    (tmp_path / "hold").touch()
    # The same as the script, but for the seconds that the stamp takes.
    code = "import sys, signal; from hf_lsam_recipes import compare; "
    code += f"compare.make_stamp = lambda: {STAMP}; "
    code += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); sys.exit(compare.main())"
    command = [sys.executable, "-c", code, str(path), "--recipe", str(tmp_path / "recipe.py")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    model = tmp_path / "out" / "t" / "a" / "seed-1" / "model"
    wait_for((model / "model.safetensors").exists)
    os.kill(process.pid, number)
    process.communicate()
    assert calls(path) == ["1 0 anew", "1 1 anew"]
    if number == signal.SIGKILL:
        # The run itself has not ended, and must not be started beside itself.
        assert compare.main([str(path)]) == 1
        assert "T, A, seed 1: its process is still running" in capsys.readouterr().err
        assert calls(path) == ["1 0 anew", "1 1 anew"]
    (tmp_path / "hold").unlink()
    wait_for(lambda: not is_locked(model.parent / "log.txt"))
    ended = (model / "all_results.json").exists()
    assert ended == (number == signal.SIGKILL)
    # Half a checkpoint is none.
    assert compare_runs.remove_incomplete_checkpoints(model)
    assert [folder.name for folder in model.glob("checkpoint-*")] == ["checkpoint-2"]
    assert compare.main([str(path)]) == 0
    assert calls(path) == ["1 0 anew", "1 1 anew", "1 1 resumed"]
    result = json.loads((model.parent / "result.json").read_text())
    assert result["resumed"] and result["training_seconds"] is None


def is_locked(path: Path) -> bool:
    with path.open("a") as file:
        try:
            compare_runs.fcntl.flock(file, compare_runs.fcntl.LOCK_EX | compare_runs.fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_half_made_run_is_gone_on_with_by_the_same_settings_only(config, tmp_path):
    """The folder of a killed run, which has a checkpoint and no result."""
    path = config(methods={"A": {"value": 1}}, seeds=[0], keep_models=True)
    result = tmp_path / "out" / "t" / "a" / "seed-0" / "result.json"
    expected = ["1 0 anew"]
    for value, how in ((1, "resumed"), (2, "anew"), (2, "resumed")):
        compare.main([str(path)])
        result.unlink()
        path = config(methods={"A": {"value": value}}, seeds=[0], keep_models=True)
        compare.main([str(path)])
        expected.append(f"{value} 0 {how}")
        assert calls(path) == expected


def test_settings_are_chosen_by_the_direction_of_the_tuning_metric(config, tmp_path, capsys):
    """A loss is better low, however much accuracy is better high."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(recipe.read_text().replace('"train_runtime":', '"eval_loss": value, "train_runtime":'))
    task = {"metric": "predict_accuracy", "tuning_metric": "eval_loss"}
    methods = {"A": {"value": 1}, "B": {"grid": {"value": [1, 2, 4]}}}
    assert compare.main([str(config(methods=methods, tasks={"T": task}, tuning_seeds=[7], seeds=[0]))]) == 0
    assert ["B", "value=1", "3"] in [row[:3] for row in table_in(tmp_path / "out")]
    assert "Settings were chosen by eval_loss, lower is better, seeds 7." in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "runs.csv").open()))
    assert {(row["stage"], row["baseline"], row["greater_is_better"]) for row in rows} == {
        ("tuning", "A", "False"),
        ("compared", "A", "True"),
    }


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_the_best_of_a_grid_is_chosen_without_the_test_data(config, tmp_path, capsys, greater_is_better):
    task = {"metric": "predict_accuracy", "tuning_metric": "eval_accuracy", "greater_is_better": greater_is_better}
    methods = {"A": {"value": 1}, "B": {"other": 5, "grid": {"value": [1, 2, 4]}}}
    path = config(methods=methods, tasks={"T": task}, tuning_seeds=[7], seeds=[0])
    assert compare.main([str(path)]) == 0
    chosen = "2" if greater_is_better else "4"
    assert sorted(calls(path)) == sorted(["1 7 anew", "2 7 anew", "4 7 anew", "1 0 anew", f"{chosen} 0 anew"])
    assert ["B", f"value={chosen}", "3"] in [row[:3] for row in table_in(tmp_path / "out")]
    assert "not tuned with equal effort. Settings tried: A 1, B 3." in capsys.readouterr().out
    tuning = [json.loads(file.read_text()) for file in tmp_path.glob("out/t/b/tuning/*/seed-7/result.json")]
    assert len(tuning) == 3 and not any("predict_accuracy" in result["metrics"] for result in tuning)
    rows = list(csv.DictReader((tmp_path / "out" / "runs.csv").open()))
    assert [(row["stage"], row["seed"], row["chosen"]) for row in rows] == [
        *(("tuning", "7", f"value={value}") for value in (1, 2, 4)),
        ("compared", "0", ""),
        ("compared", "0", f"value={chosen}"),
    ]
