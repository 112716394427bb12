"""What a comparison finds out before its first run: settings that the recipe refuses, and metrics that it lacks."""

import dataclasses
import json
from pathlib import Path

import pytest
from tiny_clm import questions_argv, save_model, write_questions
from tiny_images import QUICK, SMALL, write_folder

from hf_lsam_recipes import compare, run_clm, run_glue, run_image_classification
from hf_lsam_recipes.support.comparison.check import find_problems, is_reported, reported
from hf_lsam_recipes.support.comparison.config import read_comparison
from hf_lsam_recipes.support.metric_names import find_score
from hf_lsam_recipes.support.shipped import RECIPES

pytest_plugins = ["glue_fixtures"]

TINY = RECIPES / "compare" / "tiny.yaml"
SETTINGS = {"task_name": "rte", "model_name_or_path": "a", "do_eval": "true", "do_predict": "true", "seed": 0}


def problems(metric: str = "eval_accuracy", **changes) -> list[str]:
    return find_problems("run_glue", [{"name": "T, A", "settings": SETTINGS | changes, "metric": metric}])


def test_what_a_run_would_do_has_no_problem():
    assert problems() == problems(rho=0.1, report_to="none") == problems("train_loss") == []
    assert problems("predict_accuracy", validation_fraction=0.1) == []
    assert problems("eval_mm_accuracy", task_name="mnli") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rhoo": 0.1}, "- run_glue.py has no setting rhoo. Did you mean rho? (T, A)"),
        ({"rho": "far"}, "- argument --rho: invalid"),
        ({"rho": -1}, "- rho is the length of the perturbation"),
        ({"task_name": "rtee"}, "- task_name must be one of cola, "),
        ({"lora_alpha": 16}, "- lora_alpha is a setting of LoRA, which is off: set lora_r"),
    ],
)
def test_settings_that_the_recipe_refuses_are_named(changes, message):
    [problem] = problems(**changes)
    assert problem.startswith(message) and problem.endswith("(T, A)") and "\n" not in problem


@pytest.mark.parametrize(
    ("metric", "changes", "message"),
    [
        (
            "eval_acuracy",
            {},
            "report eval_acuracy with these settings, but eval_accuracy, eval_brier, eval_ece, eval_loss, eval_nll.",
        ),
        ("eval_acuracy", {}, "Did you mean eval_accuracy?"),
        ("eval_f1", {}, "does not report eval_f1 with these settings"),
        ("eval_accuracy", {"do_eval": "false"}, "but no scores. Set the metric to one that is reported, or"),
        # The labels of GLUE's test data are hidden.
        ("predict_accuracy", {}, "does not report predict_accuracy"),
        ("predict_accuracy", {"validation_fraction": 0.1, "do_predict": "false"}, "does not report predict_accuracy"),
        ("eval_mm_f1", {"task_name": "mnli"}, "does not report eval_mm_f1"),
        ("evalaccuracy", {}, "does not report evalaccuracy"),
    ],
)
def test_metrics_that_the_recipe_does_not_report_are_named(metric, changes, message):
    [problem] = problems(metric, **changes)
    assert message in problem


def test_a_script_that_takes_no_settings_is_no_recipe():
    [problem] = find_problems("plot", [{"name": "T, A", "settings": SETTINGS, "metric": "eval_loss"}])
    assert problem.startswith("- recipe=plot.py takes no YAML of settings: set it to a script that trains")


def test_a_problem_of_many_runs_is_told_once():
    runs = [{"name": f"T, {name}", "settings": SETTINGS | {"rhoo": 1}, "metric": "eval_loss"} for name in "ABBCD"]
    assert find_problems("run_glue", runs) == [
        "- run_glue.py has no setting rhoo. Did you mean rho? (T, A; T, B; and 2 more)"
    ]


def test_every_yaml_passes_the_check():
    for path in sorted([*RECIPES.glob("compare/*.yaml"), *RECIPES.glob("studies/evidence/*.yaml")]):
        comparison = read_comparison(path, {}, {})
        metrics = {task.name: {False: task.metric, True: task.tuning_metric} for task in comparison.tasks}
        runs = [
            {"name": run.name, "settings": run.settings, "metric": metrics[run.task][run.tuning]}
            for run in comparison.possible_runs()
        ]
        assert find_problems(comparison.recipe.stem, runs) == [], path
        names = {(run.task, run.method, str(run.chosen)) for run in comparison.possible_runs()}
        assert names == {
            (task.name, method.name, str(chosen))
            for task in comparison.tasks
            for method in comparison.methods
            for chosen in method.candidates
        }


def test_nothing_is_run_where_one_run_would_fail(tmp_path, capsys):
    """A setting of the last method, the tuning metric of the last task, and a value of a grid."""
    path = tmp_path / "own.yaml"
    path.write_text(
        f"base: {TINY}\noutput_dir: {tmp_path / 'out'}\ntuning_seeds: 7\n"
        "tasks: {RTE: {task_name: rte, metric: predict_accuracy, tuning_metric: eval_accurcy}}\n"
        "methods: {A: {}, B: {grid: {rho: [0.1, -0.2]}}, C: {block_selecton: all}}\n"
    )
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(path)])
    text = str(stopped.value)
    assert text.startswith("compare.py: nothing was run, since the runs would fail:\n- ")
    assert "has no setting block_selecton. Did you mean block_selection? (RTE, C, seed 0)" in text
    assert "does not report eval_accurcy with these settings" in text and "Did you mean eval_accuracy?" in text
    assert "rho is the length" in text and "RTE, B, rho=-0.2, tuning seed 7" in text
    assert len(text.splitlines()) == 4 and "Checking the settings of 6 runs" in capsys.readouterr().err
    assert not [*(tmp_path / "out").iterdir()]


def check_names(module, run, folder: Path) -> None:
    """What the run has reported is what `reported` says."""
    settings = {
        name: value
        for item in dataclasses.fields(run)
        if item.name.endswith("args")
        for name, value in vars(getattr(run, item.name)).items()
    }
    known = reported(module.__name__.rpartition(".")[2], settings)
    names = json.loads((folder / "all_results.json").read_text()).keys()
    assert [name for name in names if not is_reported(name, known)] == []
    assert {name for name in known - names if find_score(name)} == set()


@pytest.mark.parametrize("task", ["mnli", "stsb", "mrpc"])
def test_names_of_metrics_are_those_of_runs_of_the_glue_recipe(task, bert, glue, tmp_path):
    argv = ["--model_name_or_path", bert, "--task_name", task, "--data_dir", glue, "--output_dir", str(tmp_path / "o")]
    options = ["--do_train", "--do_eval", "--do_predict", "--validation_fraction", "0.3", *QUICK, "--max_steps", "1"]
    run = run_glue.prepare([*argv, *options])
    run_glue.execute(run)
    check_names(run_glue, run, tmp_path / "o")


def test_names_of_metrics_are_those_of_runs_of_the_language_recipe(tmp_path):
    model, questions = save_model(tmp_path / "m"), write_questions(tmp_path / "q.jsonl")
    more = ["--max_generation_samples", "2", "--max_new_tokens", "3", "--max_steps", "1"]
    run = run_clm.prepare(questions_argv(model, tmp_path / "o", questions, *more))
    run_clm.execute(run)
    check_names(run_clm, run, tmp_path / "o")


def test_names_of_metrics_are_those_of_runs_of_the_recipe_for_images(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    images = write_folder(tmp_path / "images")
    argv = [*SMALL, *QUICK, "--train_images", images, "--validation_images", images, "--test_images", images]
    argv += ["--do_train", "--do_eval", "--do_predict", "--max_steps", "1", "--output_dir", str(tmp_path / "o")]
    run = run_image_classification.prepare(argv)
    run_image_classification.execute(run)
    check_names(run_image_classification, run, tmp_path / "o")
