"""The demo without its training: runs by a stand-in for `run_glue.py`, and what is made of their figures."""

import ast
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lsam_recipes import demo
from hf_lsam_recipes.support.figures.demo import draw

STAND_IN = """
import json, pathlib, sys, yaml
settings = yaml.safe_load(open(sys.argv[1]))
assert sys.argv[2] == "--output_dir" and "--do_train" in sys.argv
with open(settings["model_name_or_path"] + ".calls", "a") as calls:
    print(settings["block_selection"], settings["seed"], file=calls)
out = pathlib.Path(sys.argv[3])
out.mkdir()
print({"loss": "0.7", "epoch": "0.5"})
print({"loss": "0.6", "epoch": "1"})
if settings["seed"] == 13:
    sys.exit("no luck")
(out / "model.safetensors").touch()
result = {"train_runtime": 9.0, "train_step_seconds": 0.1, "train_peak_memory_mib": 500.0}
(out / "train_results.json").write_text(json.dumps(result))
log = [{"step": 5, "loss": 0.7}, {"step": 5, "eval_accuracy": 0.5, "eval_loss": 0.7, "eval_runtime": 2.0}]
(out / "trainer_state.json").write_text(json.dumps({"log_history": log}))
"""


def stand_in_for_test(arguments: list[str]):
    """What the recipe leaves of an evaluation."""
    given = dict(zip(arguments[1::2], arguments[2::2], strict=False))
    assert (Path(given["--model_name_or_path"]) / "model.safetensors").exists()
    output = Path(given["--output_dir"])
    output.mkdir()
    (output / "eval_results.json").write_text(json.dumps({"eval_accuracy": 0.7, "eval_loss": 0.6}))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Runs of two methods by a script that trains nothing; returns a planner of runs, and what was called so far."""
    (tmp_path / "run_glue.py").write_text(STAND_IN)
    monkeypatch.setattr(demo, "RECIPES", tmp_path)
    monkeypatch.setattr(demo, "METHODS", {"AdamW": {"block_selection": "none"}, "SAM": {"block_selection": "all"}})
    settings = {"model_name_or_path": str(tmp_path / "base")}

    def plan(seeds=(0, 1), version="1", **more):
        return demo.plan(seeds, settings | more, tmp_path / "runs", version)

    calls = tmp_path / "base.calls"
    return plan, lambda: calls.read_text().splitlines() if calls.exists() else []


def test_runs_are_interleaved_and_kept_and_redone_when_something_changed(tmp_path, stand_in):
    plan, calls = stand_in
    runs = plan()
    assert [(run.method, run.seed) for run in runs] == [("AdamW", 0), ("SAM", 0), ("AdamW", 1), ("SAM", 1)]
    assert not any(run.trained or run.tested for run in runs)
    epochs = []
    demo.train(runs[1], epochs.append)
    assert calls() == ["all 0"]
    assert epochs == [0.5, 1.0]
    assert [run.trained for run in plan()] == [False, True, False, False]
    assert not any(run.trained for run in (*plan(version="2"), *plan(learning_rate=0.1)))


def test_a_change_of_any_code_that_a_run_imports_makes_it_another_run():
    reached, waiting = set(), ["hf_lsam_recipes.run_glue"]
    while waiting:
        package, _, name = waiting.pop().partition(".")
        path = demo.RECIPES.joinpath(*name.split(".")).with_suffix(".py")
        # The card is written after all else, and has no part in a figure.
        if package == "hf_lsam_recipes" and path.stem != "model_card" and path not in reached:
            reached.add(path)
            nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
            waiting += [str(node.module) for node in nodes]
    assert {path for path in demo.CODE if path.is_relative_to(demo.RECIPES)} == reached
    assert demo.RECIPES.parent / "hf_lsam" / "step.py" in demo.CODE


def test_weights_are_kept_until_the_run_is_tested(tmp_path, stand_in):
    run = stand_in[0]()[0]
    demo.train(run, lambda epoch: None)
    assert run.trained
    assert not run.tested

    def stop(arguments):
        stand_in_for_test(arguments)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.test(run, tmp_path / "test.tsv", stop)
    assert not run.tested
    demo.test(run, tmp_path / "test.tsv", stand_in_for_test)
    assert run.tested
    assert not list(run.folder.rglob("model.safetensors"))
    figures = demo.read_run(run)
    assert figures["test_accuracy"] == 0.7
    assert figures["training_seconds"] == 7.0
    assert figures["curve"] == [{"step": 5, "accuracy": 0.5, "loss": 0.7}]


def test_run_that_was_killed_is_redone(tmp_path, stand_in):
    plan, calls = stand_in
    run = plan()[0]

    def stop(epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.train(run, stop)
    assert not run.trained
    demo.train(run, lambda epoch: None)
    assert run.trained
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.folder.name]
    assert calls()[-1] == "none 0"


def test_failed_run_shows_its_output(stand_in):
    run = stand_in[0]([13])[0]
    with pytest.raises(demo.RunError, match=r"(?s)AdamW, seed 13 failed:.*no luck.*train.log"):
        demo.train(run, lambda epoch: None)
    assert not run.trained


def synthetic(methods=("AdamW", "SAM"), seeds=(0, 1)) -> list[dict]:
    """Runs with a slow machine under seed 1: only ratios within a seed mean something."""
    runs = []
    for seed in seeds:
        for cost, method in enumerate(methods, start=1):
            counts = {"all": 4} if method == "SAM" else {"layer.0": 0, "layer.1": 4}
            runs.append(
                {
                    "method": method,
                    "seed": seed,
                    "test_accuracy": 0.6 + cost / 10 + seed / 100,
                    "test_loss": 0.5,
                    "training_seconds": 10 + 10 * cost,
                    "step_seconds": 0.1 * cost * (1 + 3 * seed),
                    "peak_memory_mib": 500.0,
                    "curve": [{"step": step, "accuracy": 0.5 + step / 100, "loss": 0.6} for step in (4, 8)],
                    "blocks": [{"step": step, "steps": 4, "counts": counts} for step in (4, 8)] * (cost > 1),
                }
            )
    return runs


def test_table():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in demo.table(synthetic()).splitlines()]
    assert len({len(row) for row in rows}) == 1
    assert rows[2][0] == "AdamW"
    assert rows[2][2] == "70.5 (70.0 to 71.0)"
    assert rows[2][4:6] == ["1.00x (1.00x to 1.00x)"] * 2
    assert rows[3][4:6] == ["1.50x (1.50x to 1.50x)", "2.00x (2.00x to 2.00x)"]
    one_seed = demo.table(synthetic(seeds=[1])).splitlines()[3]
    assert "| 81.0 | 0.500 | 1.50x | 2.00x | 500 |" in one_seed


def test_the_table_on_a_console_is_in_line_and_narrow():
    methods = list(demo.METHODS)
    text = demo.on_console(demo.table(synthetic(methods)))
    titles, *rows = text.splitlines()
    assert [re.split("  +", row)[0] for row in rows] == methods
    names = ["method", "test accuracy, %", "training time", "median step"]
    assert re.split("  +", titles) == names
    for start in [titles.index(name) for name in names[1:]]:
        assert all(row[start - 2 : start] == "  " and row[start] != " " for row in rows)
    assert max(map(len, (titles, *rows))) <= 100
    assert "|" not in text


def test_how_long_it_takes_is_said_for_what_is_missing(tmp_path):
    assert {*demo.SECONDS} == {*demo.METHODS}
    runs = demo.plan([0, 1], {}, tmp_path, "1")
    methods = "AdamW; SAM at every 4th step; LSAM, last 2 blocks; SAM; LSAM, the paper's rule"
    assert demo.announcement(runs).splitlines() == [
        f"10 runs of 250 steps. Methods: {methods}.",
        "This takes about 16 minutes on two CPU cores.",
        "A first comparison, with one seed, is printed after about 3 minutes.",
    ]
    for run in runs[:2]:
        run.folder.mkdir()
    assert demo.announcement(runs).splitlines()[1:] == [
        "2 of 10 runs are already finished.",
        "This takes about 13 minutes on two CPU cores.",
    ]
    for run in runs[2:]:
        run.folder.mkdir()
    assert demo.announcement(runs).splitlines()[1:] == ["10 of 10 runs are already finished."]
    assert demo.minutes(runs[:1]) == "2 minutes"


def test_the_first_comparison_is_of_adamw_and_what_is_recommended():
    recommended = dict(block_selection="all", perturb_interval=4, rho=0.1, perturb_start=0.1)
    assert [*demo.METHODS.values()][: demo.FIRST] == [{"block_selection": "none"}, recommended]


class InThisProcess:
    """In the place of `multiprocessing`, whose processes would not have the stand-ins."""

    exitcode = 0

    def __init__(self, target, args):
        self.start = lambda: target(*args)

    @staticmethod
    def get_context(method):
        assert method == "spawn"
        return type("Context", (), {"Process": InThisProcess})

    def join(self):
        pass


@pytest.fixture
def small_demo(tmp_path, stand_in, monkeypatch, capfd):
    """The whole demo with two methods and two seeds; returns what it prints."""
    files = {name: tmp_path / f"{name}.tsv" for name in ("train", "validation", "test")}
    for path in files.values():
        path.touch()
    model = tmp_path / "base"
    model.mkdir()
    monkeypatch.setattr(demo, "model_folder", lambda *_: model)
    monkeypatch.setattr(demo, "rated_sentences", lambda *_: [])
    monkeypatch.setattr(demo, "write_splits", lambda *_: files)
    monkeypatch.setattr(demo, "multiprocessing", InThisProcess)
    monkeypatch.setattr("hf_lsam_recipes.run_glue.main", stand_in_for_test)

    def run() -> str:
        demo.demo(tmp_path / "out", [0, 1], None, None)
        return capfd.readouterr().out

    return run


def test_the_first_comparison_comes_before_the_second_seed_and_only_once(small_demo, stand_in, tmp_path, monkeypatch):
    calls_then = []
    monkeypatch.setattr(demo, "on_console", lambda text: calls_then.append(stand_in[1]()) or text)
    printed = small_demo()
    assert calls_then == [["none 0", "all 0"], ["none 0", "all 0", "none 1", "all 1"]]
    announced, _, rest = printed.partition("A first comparison, with one seed. The other runs follow.\n")
    assert announced.startswith(
        "4 runs of 250 steps. Methods: AdamW; SAM.\nThis takes about 7 minutes on two CPU cores"
    )
    first, _, last = rest.partition("Mean and range over the seeds 0, 1")
    assert len(re.findall(r"\| AdamW \|.* 70\.0 \|", first)) == 1 and last
    assert "70.0 (70.0 to 70.0)" in (tmp_path / "out" / "table.md").read_text()
    again = small_demo()
    assert "4 of 4 runs are already finished." in again and "first comparison" not in again
    assert len(stand_in[1]()) == 4


def test_an_evaluation_that_fails_ends_the_demo(tmp_path, stand_in):
    """It has a process of its own, with the real recipe, which finds no model here."""
    [run] = stand_in[0]([0])[:1]
    demo.train(run, lambda epoch: None)
    with pytest.raises(demo.RunError, match=r"The evaluation failed. Its output is above and in .*/runs/\*/test.log"):
        demo.finish([run], tmp_path / "test.tsv")
    assert not run.tested


@pytest.mark.parametrize("methods", [("AdamW",), ("AdamW", "SAM", "LSAM, last block")])
def test_picture(tmp_path, methods):
    path = tmp_path / "results.png"
    draw({"runs": synthetic(methods)}, path)
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", header[16:])
    assert width == 1800
    assert height > 1000


def test_every_method_is_a_valid_setting():
    from hf_lsam import LSAMConfig

    for settings in demo.METHODS.values():
        LSAMConfig(**settings)
    assert next(iter(demo.METHODS)) == "AdamW"
    assert not LSAMConfig(**demo.METHODS["AdamW"]).enabled


def test_demo_needs_no_torch_itself():
    """The peak memory of a process counts that of the one that started it, up to the start."""
    code = "import json, sys, hf_lsam_recipes.demo; "
    code += "print(json.dumps([m in sys.modules for m in ('torch', 'matplotlib', 'transformers')]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(result.stdout) == [False, False, False], result.stderr
