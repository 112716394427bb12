"""The GLUE recipe under `accelerate launch`, with each of `accelerate_configs` that a machine without GPUs can run."""

import contextlib
import json
import math
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env
from cards import tables_in
from safetensors.torch import load_file
from tiny import bert, llama
from tiny_glue import save_bert, write_task
from tiny_passes import distance, length, share_of_rounding
from transformers import BertForSequenceClassification

from hf_lsam_recipes import run_glue

ROOT = Path(run_glue.__file__).parents[1]
CONFIGS = {path.stem: path for path in sorted((ROOT / "accelerate_configs").glob("*.yaml"))}

# A launch of each config; `multi_node` is launched twice, as on two machines. All of them take the same rows a step.
WITH_ONE_PROCESS = ["--per_device_train_batch_size", "8"]
WITH_TWO = ["--per_device_train_batch_size", "4"]
LAUNCHES = {"cpu": WITH_ONE_PROCESS, "bf16": WITH_ONE_PROCESS, "multi_cpu": WITH_TWO, "multi_node": WITH_TWO}
WORLD_SIZES = {"cpu": 1, "bf16": 1, "multi_cpu": 2, "multi_node": 2}


def free_port() -> str:
    """One that no other connection is given by chance, before the launch listens at it: they begin at 32768."""
    for port in random.sample(range(15000, 30000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return str(port)
    raise OSError("no port is free")


def environment(home: Path) -> dict[str, str]:
    """The environment of a launch: one thread a process, and no configuration of the user's own."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HOME": str(home), "CUDA_VISIBLE_DEVICES": ""}


def launch(name: str, *options: str) -> list[str]:
    """The beginning of a command line that launches with config `name`."""
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS[name]), *options]


def wait_for(processes: list[subprocess.Popen], seconds: float) -> None:
    """Until all have ended, one of them has failed (another may wait for it), or the time is up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return
        time.sleep(0.2)


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    """What the recipe left under each config: two steps of training, evaluation and prediction. All run at once."""
    folder = tmp_path_factory.mktemp("launched")
    model = save_bert(
        folder / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3
    )
    recipe = [str(ROOT / "recipes" / "run_glue.py"), str(ROOT / "recipes" / "glue" / "rte.yaml"), "--do_predict"]
    recipe += ["--model_name_or_path", model, "--data_dir", write_task(folder, "rte"), "--disable_tqdm", "true"]
    recipe += ["--max_steps", "2", "--logging_steps", "1", "--perturb_start", "0", "--rho", "0.1"]
    recipe += ["--block_selection", "last", "--perturb_interval", "1"]
    recipe += ["--save_strategy", "steps", "--save_steps", "1"]
    # Adam would blow up the rounding in gradients that are zero.
    recipe += ["--optim", "sgd", "--learning_rate", "0.5", "--train_sampling_strategy", "sequential"]
    commands = []
    port = free_port()
    for name, options in LAUNCHES.items():
        two_machines = [["--main_process_ip", "127.0.0.1", "--machine_rank", rank] for rank in "01"]
        for machine in two_machines if name == "multi_node" else [[]]:
            own = ["--main_process_port", port if name == "multi_node" else free_port()]
            output = ["--output_dir", str(folder / name)]
            commands.append([*launch(name, *own, *machine), *recipe, *output, *options])
    with (folder / "log").open("w+") as log:
        processes = [
            subprocess.Popen(command, stdout=log, stderr=log, env=environment(folder / "home")) for command in commands
        ]
        try:
            wait_for(processes, 300)
        finally:
            for process in processes:
                process.terminate()
        log.seek(0)
        assert [process.returncode for process in processes] == [0] * len(commands), log.read()[-8000:]
    return folder


def card(folder: Path) -> dict:
    """The training settings in a model card."""
    return tables_in(folder)[0]


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_leaves_weights_metrics_figures_and_card(name, launched):
    folder = launched / name
    assert {"config.json", "model.safetensors", "tokenizer.json", "trainer_state.json"} <= set(os.listdir(folder))
    results = json.loads((folder / "all_results.json").read_text())
    assert math.isfinite(results["train_loss"]) and math.isfinite(results["eval_loss"])
    assert (results["train_samples"], results["eval_samples"]) == (16, 16)
    lines = [line for line in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["lsam/active"] == 1 and line["lsam/perturbation_norm"] > 0 for line in lines)
    rows = [json.loads(row) for row in (folder / "lsam_blocks.jsonl").read_text().splitlines()]
    assert [(row["step"], sum(row["counts"].values())) for row in rows] == [(1, 2), (2, 2)]
    header, *predictions = (folder / "RTE.tsv").read_text().splitlines()
    assert header == "index\tprediction" and [row.split("\t")[0] for row in predictions] == [*map(str, range(8))]
    assert card(folder)["world_size"] == WORLD_SIZES[name]
    assert card(folder)["mixed_precision"] == ("bf16" if name == "bf16" else "no")


def after_a_step(folder: Path, name: str) -> tuple[dict, float]:
    """The weights after the first step, and how far a run without launch would be from them at most by rounding."""
    one, before = (load_file(folder / path / "model.safetensors") for path in (f"{name}/checkpoint-1", "bert"))
    model = BertForSequenceClassification.from_pretrained(folder / "bert")
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    # Of both passes, and of the weights that are moved by so little.
    rounding = 2 * share_of_rounding(model, dtype) * distance(one, before)
    return one, rounding + torch.finfo(torch.float32).eps * length(before)


@pytest.mark.parametrize("name", ["multi_cpu", "multi_node"])
def test_two_processes_step_as_one_on_batches_twice_as_large(name, launched):
    one, rounding = after_a_step(launched, "cpu")
    two, _ = after_a_step(launched, name)
    assert distance(one, load_file(launched / "bert" / "model.safetensors")) > 1000 * rounding
    assert distance(one, two) <= rounding


@pytest.mark.parametrize("name", ["multi_cpu", "multi_node"])
def test_two_processes_evaluate_and_predict_as_one(name, launched, tmp_path):
    """The same weights, that is: those that the launch left."""
    argv = [str(ROOT / "recipes" / "glue" / "rte.yaml"), "--model_name_or_path", str(launched / name)]
    argv += ["--data_dir", str(launched), "--output_dir", str(tmp_path), "--use_cpu", "--disable_tqdm", "true"]
    alone = run_glue.main([*argv, "--do_train", "false", "--do_predict"])
    metrics = json.loads((launched / name / "eval_results.json").read_text())
    rounding = share_of_rounding(BertForSequenceClassification.from_pretrained(launched / name), torch.float32)
    assert metrics["eval_loss"] == pytest.approx(alone["eval_loss"], rel=rounding)
    assert metrics["eval_accuracy"] == alone["eval_accuracy"]
    assert (launched / name / "RTE.tsv").read_text() == (tmp_path / "RTE.tsv").read_text()


def test_bf16_config_rounds(launched):
    (one, exact), (rounded, rounding) = (after_a_step(launched, name) for name in ("cpu", "bf16"))
    assert all(tensor.dtype == torch.float32 for tensor in rounded.values())
    assert 100 * exact < distance(one, rounded) <= rounding


def parse(name: str, *options: str):
    """The arguments that `accelerate launch` makes of a config."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS[name]), *options, "script.py"])
    return _validate_launch_command(args)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_launch_knows_every_setting_of_a_config(name):
    """Launch itself refuses an unknown setting, but not one below the first level."""
    args = parse(name)
    content = yaml.safe_load(CONFIGS[name].read_text())
    assert (args.num_processes, args.mixed_precision) == (content["num_processes"], content["mixed_precision"])
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for settings in content.values():
        for key, value in settings.items() if isinstance(settings, dict) else ():
            assert key in known and getattr(args, key) == value


def test_multi_node_config_needs_two_values_of_the_user():
    args = parse("multi_node", "--machine_rank", "1", "--main_process_ip", "10.0.0.7")
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank, args.rdzv_endpoint) == ("2", "1", 1, "10.0.0.7:29500")


@pytest.mark.parametrize("build, block", [(bert, "BertLayer"), (llama, "LlamaDecoderLayer")])
def test_fsdp2_config_shards_the_blocks_of_any_model_and_saves_whole_checkpoints(build, block):
    with patch_environment(**prepare_multi_gpu_env(parse("fsdp2"))):
        plugin = FullyShardedDataParallelPlugin()
        plugin.set_auto_wrap_policy(build())
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert block in {kind.__name__ for kind in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}
