"""What the recipes share: settings, the output directory, and the step timer."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import yaml
from tiny_glue import files_in, rte
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lsam_recipes import run_clm, run_glue
from hf_lsam_recipes.support import step_timer
from hf_lsam_recipes.support.output import check_output_dir
from hf_lsam_recipes.support.settings import parse_arguments

pytest_plugins = ["glue_fixtures"]


def parse(*argv: str):
    return parse_arguments(run_glue.SETTINGS, list(argv), "")


@pytest.mark.parametrize("recipe, folder", [(run_glue, "glue"), (run_clm, "clm")])
def test_yamls_hold_only_what_differs_from_the_defaults(recipe, folder):
    paths = list(Path(recipe.__file__).parent.glob(f"{folder}/*.yaml"))
    assert paths
    for path in paths:
        parsed = parse_arguments(recipe.SETTINGS, [str(path)], "")
        for name in yaml.safe_load(path.read_text()):
            [settings] = [settings for settings in parsed if hasattr(settings, name)]
            default = next(item.default for item in dataclasses.fields(settings) if item.name == name)
            assert getattr(settings, name) != default, (path.name, name)


def test_command_line_overrides_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model_name_or_path: m\ntask_name: rte\nrho: 2e-1\nalpha: 0.5\nnum_perturbed_blocks: null\ndo_train: true\n"
        "do_eval: yes\neval_strategy: no\nlabel_names: [labels]\nreport_to: [tensorboard, wandb]\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nlearning_rate: 1e-3\nadaptive: true\n"
    )
    model, _, data, *_, lsam, args = parse(str(path), "--alpha", "0.25", "--learning_rate=1e-4", "--adaptive", "false")
    assert (model.model_name_or_path, model.trust_remote_code, data.task_name) == ("m", False, "rte")
    assert (lsam.rho, lsam.alpha, lsam.num_perturbed_blocks, lsam.adaptive) == (0.2, 0.25, None, False)
    assert (args.learning_rate, args.do_train, args.do_eval, args.eval_strategy) == (1e-4, True, True, "no")
    assert (args.label_names, args.report_to) == (["labels"], ["tensorboard", "wandb"])
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert parse(str(path), "--num_perturbed_blocks", "3")[-2].num_perturbed_blocks == 3


def test_lists_of_numbers_in_a_yaml(tmp_path):
    """They are numbers, as on the command line, and `null` or an empty list is none."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "model_name_or_path: m\ntask_name: rte\n"
        "quantised_bits: [8, 4]\nweight_noise:\n  - 0.1\nshift_files: [a=b.tsv]\n"
    )
    parsed = {type(settings).__name__: settings for settings in parse(str(path), "--shift_files", "null")}
    robustness = parsed["RobustnessArguments"]
    assert (robustness.quantised_bits, robustness.weight_noise) == ([8, 4], [0.1])
    assert parsed["DataArguments"].shift_files is None
    path.write_text("model_name_or_path: m\ntask_name: rte\nshift_files: []\nquantised_bits: [2]\n")
    with pytest.raises(ValueError, match="quantised_bits must be 8, 4 or both, but one is 2"):
        parse(str(path))


def test_null_on_the_command_line():
    argv = ["--model_name_or_path", "m", "--task_name", "rte"]
    assert parse(*argv)[-2].num_perturbed_blocks == 2
    assert parse(*argv, "--num_perturbed_blocks", "null")[-2].num_perturbed_blocks is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("rho: 1\nrhoo: 1\n", r"run.yaml has unknown settings: rhoo"),
        ("- rho\n", r"run.yaml must have one `setting: value` per line"),
        ("", r"run.yaml must have one"),
        ("rho: [1\n", r"run.yaml is not valid YAML"),
        ("rho: 1\nalpha: 1\nrho: 2\n", r"run.yaml is not valid YAML: line 3 sets rho a second time. Remove one"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}\n", r"line 1 sets a a second time"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(str(path))


def test_bad_command_line(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"none.yaml is not a file"):
        parse(str(tmp_path / "none.yaml"))
    for unknown in ("--max_step", "--rh"):
        with pytest.raises(ValueError, match=f"Unknown setting '{unknown}'"):
            parse("--model_name_or_path", "m", "--task_name", "rte", unknown, "1")
    with pytest.raises(SystemExit):
        parse("--model_name_or_path", "m", "--task_name", "rte", "--rho", "big")
    _usage, error = capsys.readouterr().err.strip().splitlines()
    assert "invalid float value: 'big'" in error and "--rho" in error


def test_nothing_is_written_over(bert, glue, trained, monkeypatch):
    before = files_in(trained)
    monkeypatch.setattr(run_glue, "find_model", None)
    with pytest.raises(ValueError, match=r"already holds .*checkpoint-2.*resume_from_checkpoint=true.*output_dir"):
        run_glue.main([*rte(bert, glue, trained), "--do_train"])
    with pytest.raises(ValueError, match=r"already holds eval_results.json"):
        run_glue.main([*rte(bert, glue, trained), "--do_eval"])
    other = ["--resume_from_checkpoint", str(trained / "checkpoint-1"), "--output_dir", str(trained / "checkpoint-2")]
    with pytest.raises(ValueError, match=r"already holds config.json"):
        run_glue.main([*rte(bert, glue, trained), "--do_train", *other])
    assert files_in(trained) == before


@pytest.mark.parametrize("name", ["checkpoint-5/optimizer.pt", "all_results.json", "model.safetensors", "RTE.tsv"])
def test_output_of_any_kind_is_kept(tmp_path, bert, glue, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"already holds {name.partition('/')[0]}, which this run would overwrite"):
        run_glue.main([*rte(bert, glue, tmp_path), "--do_train", "--do_predict"])


def test_other_files_are_no_obstacle(tmp_path):
    (tmp_path / "log.txt").touch()
    assert check_output_dir(TrainingArguments(str(tmp_path), do_train=True), ["RTE.tsv"]) is None


@pytest.mark.parametrize("latest", [True, False])
def test_resumed_run_ends_as_the_uninterrupted_one(bert, glue, tmp_path, trained, latest):
    shutil.copytree(trained / "checkpoint-1", tmp_path / "checkpoint-1")
    resume = "true" if latest else str(tmp_path / "checkpoint-1")
    argv = [*rte(bert, glue, tmp_path), "--do_train", "--save_steps", "1", "--resume_from_checkpoint", resume]
    run = run_glue.prepare(argv)
    run_glue.execute(run)
    assert len(run.timer.seconds) == 1
    for name in ("model.safetensors", "checkpoint-2/model.safetensors"):
        assert files_in(tmp_path)[name] == files_in(trained)[name]
    assert files_in(tmp_path)["model.safetensors"] != files_in(tmp_path)["checkpoint-1/model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_that_is_cut_off_is_refused_before_training(bert, glue, tmp_path, trained, name, monkeypatch):
    shutil.copytree(trained / "checkpoint-1", tmp_path / "checkpoint-1")
    path = tmp_path / "checkpoint-1" / name
    path.write_bytes(path.read_bytes()[:-30])
    monkeypatch.setattr(run_glue, "find_model", None)
    argv = [*rte(bert, glue, tmp_path), "--do_train", "--resume_from_checkpoint", "true"]
    message = rf"=true: .*checkpoint-1 is damaged \({name}: .*\)\. Remove it, or name another checkpoint"
    with pytest.raises(ValueError, match=message):
        run_glue.main(argv)


@pytest.mark.parametrize("resume", ["true", "elsewhere"])
def test_resume_without_a_checkpoint(bert, glue, tmp_path, resume):
    with pytest.raises(ValueError, match=rf"resume_from_checkpoint={resume}: .* holds no checkpoint"):
        run_glue.main([*rte(bert, glue, tmp_path), "--do_train", "--resume_from_checkpoint", resume])


def test_step_time_leaves_out_what_lies_between_steps(monkeypatch):
    clock = iter([0.0, 1.0, 11.0, 13.0, 100.0, 103.0])
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: next(clock))
    timer, state, control = step_timer.StepTimer(), TrainerState(), TrainerControl()
    timer.on_train_begin(TrainingArguments("unused", use_cpu=True), state, control)
    for _ in range(3):
        timer.on_step_begin(None, state, control)
        timer.on_step_end(None, state, control)
    assert timer.seconds == [1.0, 2.0, 3.0]
    assert timer.metrics()["train_step_seconds"] == 2.0
