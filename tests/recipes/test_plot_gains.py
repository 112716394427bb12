"""Gains of several comparisons in one picture."""

import csv
import json
import re
from pathlib import Path

import pytest
import yaml

from hf_lsam_recipes.studies import gains, plot_gains
from hf_lsam_recipes.support.comparison.statistics import COSTS
from hf_lsam_recipes.support.figures.palette import style

STUDIES = Path(plot_gains.__file__).parent
TITLES = ["task", "method", "stage", "seed", "metric", "value", *COSTS]


def write_runs(path, task, rows, metric="predict_accuracy", **more):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*TITLES, *more])
        for method, stage, seed, value, flops in rows:
            writer.writerow([task, method, stage, seed, metric, value, 1.0, 1.0, flops, 1.0, *more.values()])
    return path


def draw(*paths, cost="flops"):
    return plot_gains.draw_gains(gains.by_unit(gains.read_runs(paths)), cost)


def gains_of(axes) -> list[float]:
    """The differences that are drawn, in their order."""
    return [round(float(container[0].get_xdata()[0]), 6) for container in axes.containers]


def rows_of(axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def legend_of(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def pair(gain: float) -> list[tuple]:
    """A run of the baseline, and one with so much more."""
    return [("SGD", "compared", 0, 0.5, 1.0), ("SAM", "compared", 0, 0.5 + gain, 2.0)]


def test_marks_are_paired_differences_and_the_legend_has_paired_ratios(tmp_path):
    rows = [("AdamW", "compared", seed, value, 10.0) for seed, value in ((0, 0.5), (1, 0.7))]
    rows += [("SAM", "compared", 0, 0.6, 20.0), ("SAM", "compared", 1, 0.8, 22.0), ("SAM", "tuning", 1, 0.1, 1.0)]
    rows += [("SAM", "compared", 2, 0.0, 1.0)]  # No baseline with this seed.
    one = write_runs(tmp_path / "one.csv", "T 1", rows)
    rows = [("SGD", "compared", 0, 0.5, 4.0), ("SAM", "compared", 0, 0.4, 8.0)]
    other = write_runs(tmp_path / "other.csv", "T 2", rows, metric="eval_loss")
    figure = draw(one, other)
    # In points, and a loss as it is.
    assert [gains_of(axes) for axes in figure.axes] == [[10.0], [-0.1]]
    assert [rows_of(axes) for axes in figure.axes] == [
        ["T 1\naccuracy, n = 2"],
        ["T 2\nloss (lower is better), n = 1"],
    ]
    assert legend_of(figure) == ["SAM (2.00 to 2.10)"]
    assert figure.legends[0].get_title().get_text() == "in brackets: FLOPs, baseline = 1"
    # The gain is 0.1 with both seeds.
    [ends] = figure.axes[0].containers[0][2][0].get_segments()
    assert ends[:, 0] == pytest.approx([10.0, 10.0])
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == [
        "difference to AdamW with the same seed, points, 95 % confidence interval",
        "difference to SGD with the same seed, loss, 95 % confidence interval",
    ]
    plot_gains.main([str(tmp_path / "gains.png"), str(one), str(other)])
    assert (tmp_path / "gains.png").stat().st_size > 1000


def test_intervals_are_those_of_student_s_t(tmp_path):
    rows = [("SGD", "compared", seed, 0.5, 1.0) for seed in range(3)]
    rows += [("SAM", "compared", seed, 0.5 + gain, 2.0) for seed, gain in enumerate((0.01, 0.02, 0.03))]
    [ends] = draw(write_runs(tmp_path / "runs.csv", "T", rows)).axes[0].containers[0][2][0].get_segments()
    # 4.3027 is the 97.5 % quantile with two degrees of freedom.
    assert ends[:, 0] == pytest.approx([2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5], abs=1e-4)


def test_other_files_and_doubles_are_refused(tmp_path):
    runs = write_runs(tmp_path / "runs.csv", "T", [("SGD", "compared", 0, 0.5, 4.0)])
    with pytest.raises(ValueError, match="holds runs of T, as does an earlier file"):
        gains.read_runs([runs, runs])
    (tmp_path / "else.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="is not a runs.csv of compare.py"):
        plot_gains.main([str(tmp_path / "gains.png"), str(tmp_path / "else.csv")])
    with pytest.raises(SystemExit, match="none.csv"):
        plot_gains.main([str(tmp_path / "gains.png"), str(tmp_path / "none.csv")])
    (tmp_path / "cut.csv").write_text(runs.read_text()[:-30])
    with pytest.raises(SystemExit, match="cut.csv is not a runs.csv of compare.py"):
        plot_gains.main([str(tmp_path / "gains.png"), str(tmp_path / "cut.csv")])
    tuning = write_runs(tmp_path / "tuning.csv", "T", [("SGD", "tuning", 0, 0.5, 4.0)])
    with pytest.raises(SystemExit, match="hold no compared run, only those that settings were chosen by"):
        plot_gains.main([str(tmp_path / "gains.png"), str(tuning)])
    (tmp_path / "else.json").write_text('{"runs": [{"method": "SAM"}]}')
    with pytest.raises(SystemExit, match="else.json is not a results.json of the demo"):
        plot_gains.main([str(tmp_path / "gains.png"), str(tmp_path / "else.json")])


def test_the_baseline_is_the_one_of_the_comparison(tmp_path):
    """Which need not be the first method, nor have been run yet."""
    rows = [("SAM", "compared", 0, 0.6, 2.0), ("SGD", "compared", 0, 0.5, 1.0)]
    new = draw(write_runs(tmp_path / "new.csv", "T", rows, baseline="SGD"))
    assert gains_of(new.axes[0]) == [10.0] and legend_of(new) == ["SAM (2.00)"]
    # In a file that does not say it, the first method of the file, whichever is the first of the task.
    old = write_runs(tmp_path / "old.csv", "T 0", rows[1:])
    other = write_runs(tmp_path / "other.csv", "T", rows)
    old.write_text(old.read_text() + other.read_text().partition("\n")[2])
    drawn = draw(old)
    assert gains_of(drawn.axes[0]) == [10.0] and legend_of(drawn) == ["SAM (2.00)"]
    without = write_runs(tmp_path / "without.csv", "T", [*rows[:1], ("LSAM", *rows[0][1:])], baseline="SGD")
    with pytest.raises(SystemExit, match="without.csv has no compared run of SGD on T, which is the baseline"):
        plot_gains.main([str(tmp_path / "gains.png"), str(without)])


def test_results_that_are_kept_can_all_be_drawn():
    files = [path for path in (STUDIES / "results").glob("*.csv") if "compared" in path.read_text()]
    assert len(files) > 20
    for path in files:
        assert any(map(gains_of, draw(path).axes))


def test_the_number_of_seeds_is_that_of_the_pairs(tmp_path):
    rows = [("SGD", "compared", seed, 0.5, 1.0) for seed in range(5)]
    rows += [("SAM", "compared", seed, 0.6, 2.0) for seed in (3, 4, 5)]
    assert rows_of(draw(write_runs(tmp_path / "runs.csv", "T", rows)).axes[0])[0].endswith("n = 2")
    rows += [("LSAM", "compared", seed, 0.6, 2.0) for seed in range(4)]
    assert rows_of(draw(write_runs(tmp_path / "runs.csv", "T", rows)).axes[0])[0].endswith("n = 2 to 4")


def test_times_of_resumed_runs_are_left_out(tmp_path, capsys):
    rows = [("SGD", "compared", 0, 0.5, ""), ("SGD", "compared", 1, 0.5, 1.0), ("late", "compared", 0, 0.6, 1.0)]
    rows += [("SAM", "compared", seed, 0.6, 2.0) for seed in (0, 1)]
    figure = draw(write_runs(tmp_path / "runs.csv", "T", rows))
    # A difference is known without the cost.
    assert gains_of(figure.axes[0]) == [10.0, 10.0]
    assert legend_of(figure) == ["late", "SAM (2.00)"]
    alone = [("SGD", "compared", 0, 0.5, 1.0), ("SAM", "compared", 1, 0.6, 2.0), ("LSAM", "compared", 0, 0.5, 1.0)]
    assert gains_of(draw(write_runs(tmp_path / "alone.csv", "T", alone)).axes[0]) == [0.0]
    assert capsys.readouterr().err == "T: SAM is not drawn over SGD: no seed has both.\n"
    only = write_runs(tmp_path / "only.csv", "T", alone[:2])
    with pytest.raises(
        SystemExit, match="There is no difference to draw: run methods and baseline with the same seeds"
    ):
        plot_gains.main([str(tmp_path / "gains.png"), str(only)])


def test_the_legend_has_the_cost_that_is_asked_for(tmp_path):
    figure = draw(write_runs(tmp_path / "runs.csv", "T", pair(0.1)), cost="peak_memory_mib")
    assert legend_of(figure) == ["SAM (1.00)"]
    assert figure.legends[0].get_title().get_text() == "in brackets: peak memory, baseline = 1"


def test_figures_that_are_no_numbers_are_left_out(tmp_path, capsys):
    rows = pair(0.1) + [(f"is {value}", "compared", 0, value, 2.0) for value in ("nan", "inf")]
    figure = draw(write_runs(tmp_path / "runs.csv", "T", rows))
    assert gains_of(figure.axes[0]) == [10.0] and legend_of(figure) == ["SAM (2.00)"]
    why = "is not drawn over SGD: its difference is not finite."
    assert capsys.readouterr().err.splitlines() == [f"T: is nan {why}", f"T: is inf {why}"]


def test_the_direction_is_the_one_of_the_comparison(tmp_path):
    rows = pair(0.1)
    runs = write_runs(tmp_path / "runs.csv", "T", rows, metric="predict_error", greater_is_better="False")
    assert rows_of(draw(runs).axes[0]) == ["T\nerror (lower is better), n = 1"]
    runs = write_runs(tmp_path / "runs.csv", "T", rows, metric="predict_error")
    assert rows_of(draw(runs).axes[0]) == ["T\nerror, n = 1"]


def test_all_scores_have_one_axis_and_a_loss_has_its_own(tmp_path):
    sizes = {"large": -0.2, "small": 0.002}
    files = [write_runs(tmp_path / f"{name}.csv", name, pair(size)) for name, size in sizes.items()]
    files.append(write_runs(tmp_path / "loss.csv", "loss", pair(0.1), metric="eval_loss"))
    scores, loss = draw(*files).axes
    assert gains_of(scores) == [-20.0, 0.2] and gains_of(loss) == [0.1]
    assert scores.get_xlim()[0] < -20 and scores.get_xscale() == "linear" and loss.get_xlim()[1] < 0.2


def write_picture(folder, methods, panels) -> Path:
    path = folder / "picture.yaml"
    path.write_text(yaml.safe_dump({"methods": methods, "panels": panels}, sort_keys=False))
    return path


def test_a_yaml_chooses_names_and_panels(tmp_path):
    write_runs(tmp_path / "one.csv", "T", [*pair(-0.2), ("LookSAM", "compared", 0, 0.9, 1.0)])
    write_runs(tmp_path / "two.csv", "T", [("AdamW", "compared", 0, 0.5, 1.0), ("full SAM", "compared", 0, 0.51, 3.0)])
    panels = {
        title: {f"in {title}": {"file": file, "task": "T"}} for title, file in (("A", "one.csv"), ("B", "two.csv"))
    }
    path = write_picture(tmp_path, {"SAM of all weights": ["SAM", "full SAM"]}, panels)
    figure = plot_gains.draw_gains(gains.read_panels(path), "flops")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["A", "B"]
    assert [rows_of(axes) for axes in figure.axes] == [["in A\naccuracy, n = 1"], ["in B\naccuracy, n = 1"]]
    # One axis, on which both are seen.
    assert [gains_of(axes) for axes in figure.axes] == [[-20.0], [1.0]]
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    assert figure.axes[0].get_xlim()[0] < -20 and figure.axes[0].get_xlim()[1] > 1
    assert legend_of(figure) == ["SAM of all weights (2.00 to 3.00)"]
    plot_gains.main([str(tmp_path / "gains.png"), str(path)])
    assert (tmp_path / "gains.png").stat().st_size > 1000


def test_a_method_that_is_the_baseline_of_a_task_has_no_mark_there(tmp_path):
    write_runs(tmp_path / "one.csv", "T", pair(0.1))
    write_runs(tmp_path / "two.csv", "T", [("SAM", "compared", 0, 0.5, 1.0), ("LSAM", "compared", 0, 0.51, 1.0)])
    panels = {"A": {file: {"file": file, "task": "T"} for file in ("one.csv", "two.csv")}}
    path = write_picture(tmp_path, {"full SAM": ["SAM"], "layer-wise": ["LSAM"]}, panels)
    figure = plot_gains.draw_gains(gains.read_panels(path), "flops")
    assert sorted(gains_of(figure.axes[0])) == [1.0, 10.0]
    assert "difference to SGD or SAM" in figure.axes[0].get_xlabel()


def test_a_yaml_with_a_fault_is_refused(tmp_path):
    runs = write_runs(tmp_path / "runs.csv", "T", pair(0.1))
    write_runs(tmp_path / "loss.csv", "T", pair(0.1), metric="eval_loss")
    row = {"file": "runs.csv", "task": "T"}
    faults = [
        ({"SAM": ["SAM"]}, {"A": {"a": {"file": "runs.csv", "task": "U"}}}, r"runs.csv has no task U. It has: T\."),
        ({"SAM": ["SAM"], "LSAM": ["lsam"]}, {"A": {"a": row}}, "no task has LSAM. Check the names"),
        (
            {"SAM": ["SAM"]},
            {"A": {"a": row, "b": {"file": "loss.csv", "task": "T"}}},
            "tasks of A are in different units",
        ),
        ({"SAM": ["SAM"]}, {"A": {"a": {"file": "runs.csv"}}}, r"does not describe a picture.*task"),
        ({"SAM": ["SAM"]}, {"A": {"a": {"file": "none.csv", "task": "T"}}}, "none.csv"),
    ]
    for methods, panels, message in faults:
        with pytest.raises(SystemExit, match=message):
            plot_gains.main([str(tmp_path / "gains.png"), str(write_picture(tmp_path, methods, panels))])
    with pytest.raises(SystemExit, match="A YAML names its own files: leave out the other"):
        plot_gains.main([str(tmp_path / "gains.png"), str(runs), str(tmp_path / "picture.yaml")])
    (tmp_path / "picture.yaml").write_text("a: [")
    with pytest.raises(SystemExit, match="picture.yaml does not describe a picture"):
        plot_gains.main([str(tmp_path / "gains.png"), str(tmp_path / "picture.yaml")])
    assert not (tmp_path / "gains.png").exists()


def test_the_demo_is_a_task_of_its_own():
    demo = STUDIES / "results" / "demo.json"
    task = gains.read_runs([demo])["demo"]
    values = {
        method: [run["test_accuracy"] for run in json.loads(demo.read_text())["runs"] if run["method"] == method]
        for method in task.runs
    }
    expected = sum(values["LSAM, last 2 blocks"]) / 5 - sum(values["AdamW"]) / 5
    point = gains.gains(task, "flops")["LSAM, last 2 blocks"]
    assert point.gain.mean == pytest.approx(expected) and point.ratio is None and point.seeds == 5
    # 1.20 is what the README has for the training time.
    assert f"{gains.gains(task, 'training_seconds')['LSAM, last 2 blocks'].ratio:.2f}" == "1.20"


def test_the_picture_of_the_readme_has_the_numbers_of_the_table():
    """Rows of the first table of docs/evidence.md: the mean of the plain optimizer, and three differences."""
    page = (STUDIES.parents[1] / "docs" / "evidence.md").read_text()
    panels = gains.read_panels(STUDIES / "gains.yaml")
    rows = [
        [f"{100 * gains.gains(task, 'flops')[method].gain.mean:+.1f}" for method in list(task.runs)[1:]]
        for panel in panels.values()
        for task in panel.values()
    ]
    table = page.split("| task | plain |")[1].split("\n\n")[0].splitlines()[2:]
    assert [re.findall(r"(?<=\| )\**([+-]\d+\.\d)\**", line) for line in table] == rows
    assert len(rows) == 11


def test_the_picture_of_the_loss_is_of_all_tasks_of_the_rule():
    panels = gains.read_panels(STUDIES / "loss.yaml")
    assert sorted(len(panel) for panel in panels.values()) == [2, 4]
    assert all(
        point.seeds == 5
        for panel in panels.values()
        for task in panel.values()
        for point in gains.gains(task, "flops").values()
    )
    axes = plot_gains.draw_gains(panels, "flops").axes
    assert all("AdamW with the same seed, scaled loss, 95 %" in each.get_xlabel() for each in axes)


def test_sixteen_methods_have_colours_and_markers_of_their_own():
    styles = [style(index) for index in range(16)]
    assert len({one["color"] for one in styles}) == 16
    assert len({(one["marker"], one.get("markerfacecolor")) for one in styles}) == 16
