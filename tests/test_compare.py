"""Comparisons: which runs there are, that they go on after a kill, that nothing is mixed, and what the report says."""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import compare
import compare_runs
import pytest
import run_glue
import torch
import yaml
from adapters import AdapterArguments
from common import parse_arguments
from compare_config import read_comparison
from compare_plan import CompareError, slug
from compare_statistics import mean_interval
from tiny_glue import write_task
from transformers import BertModel, TrainingArguments

from hf_lsam import LSAMConfig

pytest_plugins = ["glue_fixtures"]

RECIPES = Path(compare.__file__).parent
TINY = RECIPES / "compare" / "tiny.yaml"
STAMP = {"commit": "abc", "versions": {"torch": "2"}, "machine": "here"}
KINDS = (run_glue.ModelArguments, AdapterArguments, run_glue.DataArguments, LSAMConfig, TrainingArguments)

# A recipe that trains nothing: its accuracy is `value` and a little for the seed. It waits while `hold` exists.
RECIPE = """
import json, pathlib, sys, time, yaml
settings = yaml.safe_load(open(sys.argv[1]))
resumed = sys.argv[2:] == ["--resume_from_checkpoint", "true"]
out, root = pathlib.Path(settings["output_dir"]), pathlib.Path(__file__).parent
value, seed = float(settings["value"]), settings["seed"]
with open(root / "calls", "a") as calls:
    print(settings["value"], seed, "resumed" if resumed else "anew", file=calls)
if value == 13:
    sys.exit("no luck")
for name in ("checkpoint-2", "checkpoint-4"):
    (out / name).mkdir(parents=True, exist_ok=True)
(out / "checkpoint-2" / "trainer_state.json").write_text("{}")
(out / "model.safetensors").touch()
while (root / "hold").exists() and seed == 1:
    time.sleep(0.02)
result = {"eval_accuracy": 1 - abs(value - 2) / 10, "train_runtime": 9.0 * value, "train_step_seconds": value,
          "train_peak_memory_mib": 500.0 + seed}
if settings.get("do_predict") != "false":
    result["predict_accuracy"] = value / 10 + seed / 100
(out / "all_results.json").write_text(json.dumps(result))
log = [{"step": 2, "loss": 0.7}, {"step": 2, "eval_accuracy": value / 10, "eval_runtime": 2.0}]
(out / "trainer_state.json").write_text(json.dumps({"log_history": log, "total_flos": 100.0 * value}))
(out / "lsam_blocks.jsonl").write_text(json.dumps({"step": 2, "steps": 2, "counts": {"a": 1}}) + chr(10))
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes the YAML of a comparison by that recipe, two methods on one task, and returns its path."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    monkeypatch.setattr(compare, "make_stamp", lambda: STAMP)

    def write(**changes) -> Path:
        content = {
            "recipe": str(tmp_path / "recipe.py"),
            "output_dir": str(tmp_path / "out"),
            "tasks": {"T": {"metric": "predict_accuracy", "tuning_metric": "eval_accuracy"}},
            "methods": {"A": {"value": 1}, "B": {"value": 3}},
            "seeds": [0, 1],
            "processes": 2,
        }
        path = tmp_path / "compare.yaml"
        path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
        return path

    return write


def calls(config_path: Path) -> list[str]:
    path = config_path.parent / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_runs_are_processes_with_a_result_each_and_without_weights(config, tmp_path, capsys):
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
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| B "))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[3:6] == ["0.3050 (0.3000 to 0.3100)", r"+0.2000 \[+0.2000, +0.2000\]", "2 / 0"]
    assert cells[6:] == ["3.57x", "3.00x", "3.00x", "1.00x", "2"]
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


def test_a_run_that_fails_stops_no_other_and_is_missing_in_the_report(config, tmp_path, capsys):
    path = config(methods={"A": {"value": 1}, "bad": {"value": 13}, "B": {"value": 3}}, seeds=[0])
    assert compare.main([str(path)]) == 1
    out, err = capsys.readouterr()
    assert re.search(r"(?s)T, bad, seed 0 failed \(exit code 1\):.*no luck.*log\.txt", err)
    assert "Runs that are missing, of 3: T, bad, seed 0." in out
    assert "| bad |  | 1 | missing |" in out and "| B |" in out
    assert compare.main([str(path), "--report_only"]) == 1
    # It is tried again.
    assert compare.main([str(path)]) == 1
    assert calls(path).count("13 0 anew") == 2 and len(calls(path)) == 4


def test_a_metric_that_the_recipe_lacks_is_named(config, capsys):
    path = config(tasks={"T": {"metric": "predict_f1"}}, seeds=[0], methods={"A": {"value": 1}})
    with pytest.raises(SystemExit, match="holds no finished run"):
        compare.main([str(path)])
    assert "has no predict_f1, but eval_accuracy, " in capsys.readouterr().err


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
    code = f"import sys, signal, compare; compare.make_stamp = lambda: {STAMP}; "
    code += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); sys.exit(compare.main())"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=RECIPES, stderr=subprocess.PIPE)
    model = tmp_path / "out" / "t" / "a" / "seed-1" / "model"
    wait_for((model / "model.safetensors").exists)
    os.kill(process.pid, number)
    process.communicate()
    assert calls(path) == ["1 0 anew", "1 1 anew"]
    if number == signal.SIGKILL:
        # The run itself has not ended, and must not be started beside itself.
        assert compare.main([str(path)]) == 1
        assert "T, A, seed 1: its process still goes on" in capsys.readouterr().err
        assert calls(path) == ["1 0 anew", "1 1 anew"]
    (tmp_path / "hold").unlink()
    wait_for(lambda: not is_locked(model.parent / "log.txt"))
    ended = (model / "all_results.json").exists()
    assert ended == (number == signal.SIGKILL)
    # Half a checkpoint is none.
    assert compare_runs.drop_half_made_checkpoints(model)
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


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_the_best_of_a_grid_is_chosen_without_the_test_data(config, tmp_path, capsys, greater_is_better):
    task = {"metric": "predict_accuracy", "tuning_metric": "eval_accuracy", "greater_is_better": greater_is_better}
    methods = {"A": {"value": 1}, "B": {"other": 5, "grid": {"value": [1, 2, 4]}}}
    path = config(methods=methods, tasks={"T": task}, tuning_seeds=[7], seeds=[0])
    assert compare.main([str(path)]) == 0
    chosen = "2" if greater_is_better else "4"
    assert sorted(calls(path)) == sorted(["1 7 anew", "2 7 anew", "4 7 anew", "1 0 anew", f"{chosen} 0 anew"])
    out = capsys.readouterr().out
    assert f"| B | value={chosen} | 3 |" in out
    assert "not tuned with equal effort. Settings tried: A 1, B 3." in out
    tuning = [json.loads(file.read_text()) for file in tmp_path.glob("out/t/b/tuning/*/seed-7/result.json")]
    assert len(tuning) == 3 and not any("predict_accuracy" in result["metrics"] for result in tuning)
    rows = list(csv.DictReader((tmp_path / "out" / "runs.csv").open()))
    assert [(row["stage"], row["seed"], row["chosen"]) for row in rows] == [
        *(("tuning", "7", f"value={value}") for value in (1, 2, 4)),
        ("compared", "0", ""),
        ("compared", "0", f"value={chosen}"),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {}}, "unknown names: method. There are recipe, "),
        ({"seeds": []}, "sets no seeds"),
        ({"seeds": ["x"]}, "seeds must be an integer of at least 0, but is 'x'"),
        ({"baseline": "C"}, "baseline=C is none of the methods: A, B"),
        ({"recipe": "run_nothing.py"}, "recipe=run_nothing.py is no file"),
        ({"tasks": {"T": {}}}, "Task T sets no metric"),
        ({"methods": {"A b": {}, "a-B": {}}}, "must differ in letters or digits: A b, a-B"),
        ({"settings": {"seed": 1}}, "seed is set for each run by compare.py"),
        ({"methods": {"A": {"grid": {"value": [1, 2]}}}}, "A has a grid: set tuning_seeds"),
        ({"methods": {"A": {"grid": {"value": 1}}}}, "The grid of A must hold"),
        (
            {"methods": {"A": {"grid": {"rho": [1, 2]}}}, "tuning_seeds": [1], "tasks": {"T": {"metric": "a"}}},
            "set a tuning_metric for task T that is not the metric that is compared",
        ),
        ({"keep_models": "maybe"}, "keep_models must be true or false"),
        ({"processes": 0}, "processes must be an integer of at least 1"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(config, changes, message):
    with pytest.raises(CompareError, match=message):
        read_comparison(config(**changes), {}, {})


def test_settings_of_the_command_line_are_for_all_runs(config):
    path = config(settings={"a": 1, "b": 1}, tasks={"T": {"metric": "eval_loss", "b": 2}})
    for run in read_comparison(path, {"seeds": ["4"]}, {"a": "7", "b": "8"}).final_runs():
        assert (run.settings["a"], run.settings["b"], run.seed) == ("7", "8", 4)
    with pytest.raises(CompareError, match="value is a setting of A, and cannot be set for all runs"):
        read_comparison(path, {}, {"value": "2"})
    assert not read_comparison(path, {}, {}).tasks[0].greater_is_better


def test_interval_of_a_mean_by_hand():
    """1, 2, 3, 6: mean 3, standard deviation sqrt(14/3), and 3.182446305 is Student's t for 3 degrees of freedom."""
    interval = mean_interval([1.0, 2.0, 3.0, 6.0])
    half = 3.182446305284263 * (14 / 3) ** 0.5 / 2
    assert interval.mean == 3.0
    assert abs(interval.low - (3 - half)) < 1e-12 and abs(interval.high - (3 + half)) < 1e-12
    assert dataclasses.astuple(mean_interval([0.5])) == (0.5, None, None)


class Page(HTMLParser):
    """Every tag and what it refers to."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.references, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("href", "xlink:href", "src")]

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_takes_names_for_text(config, tmp_path):
    name = "<script>alert(1)</script> $x^ | & _y_"
    assert compare.main([str(config(methods={"A": {"value": 1}, name: {"value": 2}}))]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 1 and page.tags.count("table") == 1
    assert not {"script", "link", "img", "iframe", "image"} & set(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    assert not re.search(r"url\((?!#)|@import|<!ENTITY", text)
    assert name in page.text
    row = next(line for line in (tmp_path / "out" / "report.md").read_text().splitlines() if "script" in line)
    assert (
        row.startswith(r"| \<script>alert(1)\</script> $x^ \| & \_y\_ |") and len(re.findall(r"(?<!\\)\|", row)) == 12
    )


# With the GLUE recipe


@pytest.fixture(scope="module")
def rte_data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("rte")
    return write_task(folder, "rte", 40)


@pytest.fixture(scope="module")
def headless(bert, tmp_path_factory) -> str:
    """A model whose classifier is fresh in each run."""
    folder = tmp_path_factory.mktemp("headless")
    shutil.copytree(bert, folder, dirs_exist_ok=True)
    BertModel.from_pretrained(bert).save_pretrained(folder)
    return str(folder)


def test_every_yaml_is_one_that_the_recipe_accepts():
    files = sorted((RECIPES / "compare").glob("*.yaml"))
    assert len(files) >= 2
    for path in files:
        comparison = read_comparison(path, {}, {})
        for run in [*comparison.tuning_runs(), *comparison.final_runs()]:
            options = [f"--{name}={value}" for name, value in run.settings.items() if name != "recipe"]
            parse_arguments(KINDS, [*options, "--output_dir", "out"], "")
        assert comparison.tuning_runs() or comparison.final_runs()


def test_runs_of_a_seed_begin_with_the_same_weights_and_see_the_same_data_in_the_same_order(
    headless, rte_data, tmp_path
):
    settings = {"model_name_or_path": headless, "data_dir": rte_data, "label_noise": "0.25", "train_fraction": "0.5"}
    seen = {}
    for run in read_comparison(TINY, {"seeds": ["0", "1"]}, settings).final_runs():
        path = tmp_path / f"{slug(run.name)}.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in run.settings.items() if name != "recipe"}))
        trainer = run_glue.prepare([str(path), "--output_dir", str(tmp_path / path.stem)]).trainer
        torch.manual_seed(run.seed)
        data = [[*batch["input_ids"].tolist(), batch["labels"].tolist()] for batch in trainer.get_train_dataloader()]
        weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
        seen[run.seed, run.method] = weights, data, sorted(trainer.train_dataset["label"])
    for seed in (0, 1):
        (weights, data, _), (others, other_data, _) = (seen[seed, method] for method in ("AdamW", "LSAM, top 2"))
        assert len(data) == 4 and data == other_data
        assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    first, second = seen[0, "AdamW"], seen[1, "AdamW"]
    assert not torch.equal(first[0]["classifier.weight"], second[0]["classifier.weight"])
    assert first[1] != second[1] and first[2] == second[2]


def test_comparison_of_real_runs(headless, rte_data, tmp_path):
    """Up to the first perturbed step, methods are the same, bit for bit: initial head, data, dropout and all."""
    command = [sys.executable, str(RECIPES / "compare.py"), str(TINY), "--output_dir", str(tmp_path / "out")]
    command += ["--set", f"model_name_or_path={headless}", f"data_dir={rte_data}"]
    environment = os.environ | {"PYTHONPATH": str(RECIPES.parent), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert "| LSAM, top 2 |" in ended.stdout
    plain, lsam = (
        json.loads((tmp_path / "out" / "rte" / name / "seed-0" / "result.json").read_text())
        for name in ("adamw", "lsam-top-2")
    )
    losses = [[line["loss"] for line in result["curve"] if "loss" in line] for result in (plain, lsam)]
    assert len(losses[0]) == 4
    # Steps 3 and 4 are perturbed: the loss of step 3 is that of the weights before it.
    assert losses[0][:3] == losses[1][:3] and losses[0][3] != losses[1][3]
    assert [row["perturbed"] for row in lsam["blocks"]] == [0, 0, 1, 1] and plain["blocks"] == []
    for result in (plain, lsam):
        assert {"predict_accuracy", "eval_accuracy"} <= result["metrics"].keys()
        assert result["versions"]["torch"] == torch.__version__ and result["commit"] and "CPU" in result["machine"]
        assert result["peak_memory_mib"] > 100 and result["step_seconds"] > 0
    assert lsam["flops"] > plain["flops"] > 0
    assert not [*(tmp_path / "out").rglob("*.safetensors")]


def test_comparing_needs_no_torch_itself():
    """The peak memory of a process counts that of the one that started it, up to the start."""
    code = "import sys, compare; print([m for m in ('torch', 'matplotlib', 'scipy') if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=RECIPES)
    assert ended.stdout.strip() == "[]", ended.stderr
