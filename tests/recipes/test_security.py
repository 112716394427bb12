"""What a checkpoint, a model, a YAML or a name may and may not do to the machine of who trains on it."""

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import transformers.dynamic_module_utils
from tiny import Examples, arguments, bert
from tiny_clm import write_text
from tiny_glue import rte, save_bert, save_decoder, save_tokenizer, write_task
from tiny_images import SMALL, write_folder

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam_recipes import compare, run_clm, run_glue, run_image_classification

pytest_plugins = ["compare_fixtures"]

ROOT = Path(__file__).parents[2]
CODE = sorted([*(ROOT / "hf_lsam").glob("*.py"), *(ROOT / "recipes").rglob("*.py")])
QUICK = ["--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--max_steps", "1"]


# What runs code, or reads what can: by the name that is called or imported.
UNPICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
RUNS_CODE = {
    *("__import__", "compile", "eval", "exec", "execfile", "import_module", "runpy.run_path", "runpy.run_module"),
    *("os.popen", "os.system", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("torch.load", "torch.hub.load", "numpy.load", "np.load", "pandas.read_pickle"),
    *("yaml.full_load", "yaml.unsafe_load", "yaml.load_all"),
}


def findings(source: str) -> list[str]:
    """What in `source` unpickles, runs text as code, starts a shell, or trusts what it was not told to."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in UNPICKLES]
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in UNPICKLES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            is_safe_yaml = options.get("Loader") in ("yaml.BaseLoader", "yaml.SafeLoader")
            if name in RUNS_CODE or (name == "yaml.load" and not is_safe_yaml):
                found.append(name)
            wrong = {"trust_remote_code": "True", "shell": "True", "weights_only": "False", "allow_pickle": "True"}
            found += [option for option, value in wrong.items() if options.get(option) == value]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "safe(path, weights_only=False)",
        "eval(text)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_what_runs_code_is_found(source):
    assert findings(source)


def test_our_code_unpickles_nothing_and_runs_no_text_as_code():
    assert len(CODE) > 50
    assert not findings("model.eval(); re.compile(p); block.compile(); yaml.load(t, Loader=yaml.BaseLoader)")
    assert {path.name: found for path in CODE if (found := findings(path.read_text()))} == {}


class Bomb:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


OURS = ("lsam_state.safetensors", "lsam_blocks.jsonl", "trainer_state.json")
TRAINERS = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A run that stopped after its first step. Read-only."""
    folder = tmp_path_factory.mktemp("checkpoint")
    one_pass(folder, max_steps=1).train()
    return folder / "checkpoint-1"


def one_pass(folder, max_steps: int) -> LSAMTrainer:
    """A trainer whose checkpoints hold a state of ours."""
    args = arguments(folder, max_steps=max_steps, save_strategy="steps", save_steps=1, logging_steps=1)
    config = LSAMConfig(ascent_gradient="previous", rho=0.1)
    return LSAMTrainer(model=bert(), args=args, train_dataset=Examples(16), lsam_config=config)


@pytest.mark.parametrize("name", OURS + TRAINERS)
def test_a_pickle_in_a_checkpoint_is_not_unpickled(checkpoint, tmp_path, name):
    """Our files are safetensors and JSON; the Trainer's own are read by it with `weights_only=True`."""
    trace, folder = tmp_path / "trace", tmp_path / "checkpoint-1"
    folder.mkdir()
    for file in checkpoint.iterdir():
        os.link(file, folder / file.name)
    # The others share the file that this is a link to.
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(pickle.dumps(Bomb(trace)))
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    # Some of these are never read, and the others refused.
    try:
        one_pass(tmp_path / "out", max_steps=2).train(resume_from_checkpoint=str(folder))
    except (ValueError, pickle.UnpicklingError) as error:
        assert name != "lsam_state.safetensors" or "is damaged" in str(error)
    else:
        assert name in ("lsam_blocks.jsonl", "training_args.bin")
    assert not trace.exists()
    # It would have gone off.
    pickle.loads((folder / name).read_bytes()).close()
    assert trace.exists()


@pytest.fixture
def foreign(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A model whose configuration is code of its own; returns its folder and the trace that the code leaves."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, trace = tmp_path / "foreign", tmp_path / "trace"
    save_tokenizer(folder)
    (folder / "theirs.py").write_text(
        "from transformers import BertConfig\n"
        f"open({str(trace)!r}, 'w')\n"
        "class Config(BertConfig):\n    model_type = 'foreign'\n"
    )
    content = {"model_type": "foreign", "auto_map": {"AutoConfig": "theirs.Config"}}
    (folder / "config.json").write_text(json.dumps(content))
    return folder, trace


def commands(name: str, folder: Path) -> dict:
    """Each recipe with the model of this name."""
    own = ["--model_name_or_path", name, "--output_dir", str(folder / "out"), "--do_train", *QUICK]
    return {
        run_glue: [*rte(name, write_task(folder / "glue", "rte"), folder / "out"), "--do_train"],
        run_clm: [*own, "--train_file", write_text(folder / "text.txt")],
        run_image_classification: [*own, "--train_images", write_folder(folder / "images")],
    }


@pytest.mark.parametrize("recipe", [run_glue, run_clm, run_image_classification])
def test_code_of_a_model_runs_only_where_the_user_says_so(foreign, tmp_path, recipe):
    folder, trace = foreign
    argv = commands(str(folder), tmp_path)[recipe]
    with pytest.raises(ValueError, match="trust_remote_code"):
        recipe.main(argv)
    assert not trace.exists()
    # The code runs now; what it configures is no model that loads.
    with pytest.raises((ValueError, KeyError, OSError)):
        recipe.main([*argv, "--trust_remote_code", "true"])
    assert trace.exists()


@pytest.mark.parametrize("recipe", [run_glue, run_clm])
def test_code_of_the_base_of_an_adapter_runs_only_where_the_user_says_so(foreign, tmp_path, recipe):
    folder, trace = foreign
    adapter = tmp_path / "adapter"
    save_tokenizer(adapter)
    settings = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": str(folder)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    argv = [item if item != "--do_train" else "--do_eval" for item in commands(str(adapter), tmp_path)[recipe]]
    with pytest.raises(ValueError, match="trust_remote_code"):
        recipe.main(argv)
    assert not trace.exists()


def test_names_and_paths_of_a_comparison_are_not_run(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = "$(touch trace) `touch trace`; touch trace | touch trace & --help"
    path = config(
        output_dir=f"out {hostile}",
        tasks={hostile: {"metric": "predict_accuracy", "data_dir": hostile}},
        methods={"A": {"value": 1}, hostile: {"value": 3, "block_pattern": hostile}},
        seeds=[0],
    )
    assert compare.main([str(path)]) == 0
    assert not list(tmp_path.rglob("trace*"))
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


@pytest.mark.parametrize("form", ["{folder}/else.py", "../{name}/else.py", "./else.py", "nothing.py"])
def test_a_yaml_cannot_name_a_script_outside_of_the_recipes(config, tmp_path, form):
    trace = tmp_path / "trace"
    elsewhere = tmp_path / "elsewhere" / "else.py"
    elsewhere.parent.mkdir()
    elsewhere.write_text(f"open({str(trace)!r}, 'w')")
    path = config(recipe=form.format(folder=elsewhere.parent, name="elsewhere"))
    with pytest.raises(SystemExit, match="is not the name of a script in .* by --recipe"):
        compare.main([str(path)])
    assert not trace.exists()


def test_a_script_elsewhere_runs_where_the_command_line_asks_for_it(config, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "else.py"
    elsewhere.parent.mkdir()
    (tmp_path / "recipe.py").rename(elsewhere)
    assert compare.main([str(config(seeds=[0])), "--recipe", str(elsewhere)]) == 0
    assert (elsewhere.parent / "calls").exists()


# Runs recipes with every way to the network cut, and tells who tried to use one.
CUT_OFF = """
import json, socket, sys
from hf_lsam_recipes import run_clm, run_glue, run_image_classification
class Tried(BaseException):
    "Nothing catches it and tries again."
def refuse(*args, **kwargs):
    raise Tried
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
recipes = {"glue": run_glue, "clm": run_clm, "images": run_image_classification}
report = []
for name, argv in json.loads(sys.argv[1]):
    try:
        recipes[name].main(argv)
        report.append("did without")
    except Tried:
        report.append("tried")
print("#", json.dumps(report))
"""


def test_no_recipe_touches_the_network_unless_a_name_asks_for_one(tmp_path):
    """Without HF_HUB_OFFLINE, which would hide an attempt. The last run names a model of the Hub: that is seen."""
    (tmp_path / "empty").mkdir()
    encoder, decoder = save_bert(tmp_path / "bert"), save_decoder(tmp_path / "llama", max_position_embeddings=64)
    data = write_task(tmp_path / "glue", "rte")
    text, images = write_text(tmp_path / "text.txt"), write_folder(tmp_path / "images")

    def common(name: str, model: str) -> list[str]:
        return ["--model_name_or_path", model, "--output_dir", str(tmp_path / name), "--do_train", "--do_eval", *QUICK]

    runs = [
        ("glue", [*rte(encoder, data, tmp_path / "whole"), "--do_train", "--do_eval", "--do_predict"]),
        ("glue", [*rte(decoder, data, tmp_path / "adapter"), "--do_train", "--lora_r", "2"]),
        ("glue", [*rte(str(tmp_path / "adapter"), data, tmp_path / "again"), "--do_eval"]),
        ("clm", [*common("clm", decoder), "--train_file", text]),
        (
            "images",
            [*common("resnet", "null"), *SMALL, "--train_images", images, "--validation_fraction", "0.5"],
        ),
        ("clm", [*common("hub", "somebody/something"), "--train_file", text]),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    # A cache of its own, where nothing of the Hub is found.
    environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "empty")}
    command = [sys.executable, "-c", CUT_OFF, json.dumps(runs)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout.splitlines()[-1].removeprefix("# "))
    assert report == ["did without"] * 5 + ["tried"], ended.stderr
