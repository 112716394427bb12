"""The tables of figures beside the metric of a comparison."""

import json
import shutil

import pytest

from hf_lsam_recipes.studies import effects, flatness
from hf_lsam_recipes.studies.frontier import draw_frontier

METHODS = {
    "AdamW": 0.0,
    "AdamW, smoothed": -0.05,
    "SAM": -0.2,
    "half of it": -0.1,
    "nothing": 0.0,
    "most of it": -0.17,
}
COSTS = {"SAM": 2.0, "half of it": 1.1, "most of it": 1.2}


@pytest.fixture
def folder(tmp_path):
    """A comparison of six methods with three seeds, and one run for tuning; the first task has data of a shift."""
    for task, shift in (("one", True), ("two", False)):
        for method, effect in METHODS.items():
            for seed in range(3):
                write(tmp_path, task, method, seed, effect, shift)
    write(tmp_path, "one", "SAM", 100, 9.0, True, tuning=True)
    return tmp_path


def write(folder, task, method, seed, effect, shift, tuning=False, **metrics):
    loss = 1 + 0.1 * seed + effect * (1 + 0.01 * (seed - 1))
    of_classifier = {"eval_loss": 9.0, "eval_nll_scaled": loss, "predict_nll_scaled": loss, "predict_accuracy": 0.8}
    metrics = {"train_loss": 0.1} | (metrics or of_classifier)
    result = dict(
        task=task,
        method=method,
        seed=seed,
        tuning=tuning,
        chosen={} if method == "AdamW" else {"rho": 0.1},
        metrics=metrics | ({"shift_nll_scaled": 2 * loss} if shift else {}),
        training_seconds=10 * COSTS.get(method, 1.0),
        step_seconds=1.0,
        flops=50 + 50 * COSTS.get(method, 1.0),
        peak_memory_mib=1000,
        commit="abc",
        machine="m",
        versions={"torch": "2"},
    )
    path = folder / task / method / f"{seed}-{tuning}" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))


def test_holm_on_a_worked_example():
    assert effects.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert effects.holm([0.6, 0.7]) == [1, 1]


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
        "## All tasks: scaled loss on test data",
        "## The goal: scaled loss on test data",
        "## All tasks: scaled loss under shift",
        "## The goal: scaled loss under shift",
    ]


def test_language_models_have_figures_of_their_own(tmp_path, capsys):
    for method, effect in (("AdamW", 0.0), ("SAM", -0.2)):
        for seed in range(3):
            own = {"eval_loss": 1.0 + effect + 0.01 * seed, "eval_neutral_loss": 3.0 - effect}
            write(tmp_path, "text", method, seed, effect, False, eval_perplexity=2.7, **own)
    path = tmp_path / "runs.csv"
    flatness.main([str(tmp_path), "--csv", str(path)])
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("## ")] == [
        "## text: loss on test data",
        "## text: loss on other text",
        "## All tasks: loss on test data",
        "## All tasks: loss on other text",
    ]
    assert "-0.2000 [-0.2000, -0.2000]" in printed and "+0.2000 [+0.2000, +0.2000]" in printed
    columns = path.read_text().splitlines()[0].split(",")
    assert "eval_neutral_loss" in columns and not {"eval_int4_loss", "predict_nll_scaled"} & {*columns}
    # Beside a file of classifiers, neither has the figures of the other.
    write(tmp_path / "other", "words", "AdamW", 0, 0.0, False)
    rows = [*effects.read_runs(path), *effects.read_runs(tmp_path / "other")]
    assert effects.has(rows[:-1], "eval_loss") and not effects.has(rows[-1:], "eval_loss")


def test_a_row_holds_the_difference_to_the_same_seed_and_the_share_of_sam(folder):
    own = effects.by_task(effects.read_runs(folder))["one"]
    rows = {row["method"]: row for row in flatness.table(own, "predict_nll_scaled")}
    assert rows["AdamW"]["value"] == "1.1000" and rows["AdamW"]["seeds"] == "3"
    half = rows["half of it (rho=0.1)"]
    # t of two degrees of freedom: 4.303; the deviation of the differences is 0.001.
    assert half["difference (95 %)"] == "-0.1000 [-0.1025, -0.0975]"
    assert (half["share of SAM's"], half["training time"], half["FLOPs"]) == ("50 %", "1.10", "1.05")
    assert float(half["p (Holm)"]) < 0.001 and rows["nothing (rho=0.1)"]["p (Holm)"] == "1.000"


def test_a_folder_without_runs_is_told(tmp_path):
    with pytest.raises(SystemExit, match="holds no finished run"):
        flatness.main([str(tmp_path)])


def test_the_overview_has_all_tasks(folder):
    tasks = effects.by_task(effects.read_runs(folder))
    rows = {row["method"]: row for row in flatness.overview(tasks, "predict_nll_scaled")}
    costs = dict.fromkeys(("time", "FLOPs"), "1.00")
    assert rows["AdamW (value)"] == {"method": "AdamW (value)", "one": "1.100", "two": "1.100"} | costs
    half = {"method": "half of it", "one": "-0.100 (effect)", "two": "-0.100 (effect)"}
    assert rows["half of it"] == half | {"time": "1.10", "FLOPs": "1.05"}
    assert rows["nothing"]["one"] == "+0.000"
    assert "two" not in flatness.overview(tasks, "shift_nll_scaled")[1]


def goals(folder, figure="predict_nll_scaled"):
    tasks = effects.by_task(effects.read_runs(folder))
    return {row["method"]: row for row in flatness.goal_table(tasks, figure)}


def test_the_goal_needs_most_of_the_effect_in_little_time(folder):
    rows = goals(folder)
    assert rows["most of it"] == {
        "method": "most of it",
        "one": "85 % (reached)",
        "two": "85 % (reached)",
        "reached": "2",
    }
    assert rows["half of it"]["one"] == "50 % (share)" and rows["half of it"]["reached"] == "0"
    assert rows["SAM"]["two"] == "100 % (time)" and rows["nothing"]["one"] == "0 % (share)"
    assert goals(folder, "shift_nll_scaled")["most of it"]["one"] == "85 % (reached)"


@pytest.mark.parametrize(
    ("method", "changed", "lacks"),
    [
        ("SAM", {"predict_nll_scaled": 1.1}, "SAM has no effect"),
        ("SAM", {"predict_nll_scaled": 9.0}, "SAM has no effect"),
        ("AdamW, smoothed", {"predict_nll_scaled": 0.9}, "a free remedy is better"),
        ("most of it", {"predict_accuracy": 0.794}, "accuracy"),
        ("most of it", {"predict_accuracy": 0.796}, None),
    ],
)
def test_what_a_method_lacks(folder, method, changed, lacks):
    own = effects.by_task(effects.read_runs(folder))["two"]
    for run in own:
        if run["method"] == method:
            run |= changed
    assert effects.shortfall("most of it", own, "predict_nll_scaled") == lacks


def test_correlations_bound_where_a_task_has_them(folder):
    own = effects.by_task(effects.read_runs(folder))["two"]
    for run in own:
        run["predict_matthews_correlation"] = 0.2 if run["method"] == "most of it" else 0.3
    assert effects.shortfall("most of it", own, "predict_nll_scaled") == "accuracy"


def test_a_method_that_was_not_run_on_a_task_is_named_so(folder):
    runs = [run for run in effects.read_runs(folder) if (run["task"], run["method"]) != ("two", "half of it")]
    rows = {row["method"]: row for row in flatness.goal_table(effects.by_task(runs), "predict_nll_scaled")}
    assert rows["half of it"]["two"] == "not run" and rows["most of it"]["reached"] == "2"


def test_the_picture_shows_each_primary_figure_of_each_task(folder, tmp_path):
    figure = draw_frontier(effects.by_task(effects.read_runs(folder)))
    titles = [axes.get_title().splitlines()[:2] for axes in figure.axes]
    assert [title[0] for title in titles] == ["one", "two", "one"]
    assert "under shift" in titles[2][1]
    marks = {bars.lines[0].get_xdata()[0]: bars.lines[0].get_ydata()[0] for bars in figure.axes[0].containers}
    assert marks[1.1] == pytest.approx(-100 * 0.1 / 1.1)
    assert marks[2.0] == -15 and [text.get_text() for text in figure.axes[0].texts] == ["-18 %", "-15 %"]
    flatness.main([str(folder), "--picture", str(tmp_path / "frontier.png")])
    assert (tmp_path / "frontier.png").stat().st_size > 1000


def test_a_file_of_something_else_is_told(tmp_path):
    (tmp_path / "else.csv").write_text("task,method\none,SAM\n")
    with pytest.raises(SystemExit, match="lacks chosen, stage"):
        flatness.main([str(tmp_path / "else.csv")])


def test_one_run_that_was_paused_does_not_decide_the_time(folder):
    own = effects.by_task(effects.read_runs(folder))["two"]
    next(run for run in own if run["method"] == "most of it")["training_seconds"] = 1000.0
    assert effects.effects(own, "predict_nll_scaled")["most of it"].time == pytest.approx(1.2)


def test_there_is_no_share_of_an_effect_that_sam_does_not_have(folder):
    own = effects.by_task(effects.read_runs(folder))["one"]
    for run in own:
        run["predict_accuracy"] = 0.8 + 0.001 * (int(run["seed"]) - 1.1) * (run["method"] == "SAM")
    assert effects.effects(own, "predict_accuracy")["half of it"].share is None


def test_runs_for_tuning_are_not_compared(folder):
    own = effects.by_task(effects.read_runs(folder))["one"]
    assert len(own) == 3 * len(METHODS) and {run["stage"] for run in own} == {"compared"}


def test_a_comparison_without_sam_has_no_goal(folder, tmp_path, capsys):
    for path in folder.rglob("SAM"):
        shutil.rmtree(path)
    flatness.main([str(folder), "--picture", str(tmp_path / "picture.png")])
    printed = capsys.readouterr().out
    assert "All tasks" in printed and "half of it" in printed and "The goal" not in printed
