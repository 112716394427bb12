"""Gain over cost of several comparisons in one picture."""

import csv
from pathlib import Path

import pytest

from hf_lsam_recipes.studies import plot_gains
from hf_lsam_recipes.support.comparison.statistics import COSTS
from hf_lsam_recipes.support.figures.palette import style

TITLES = ["task", "method", "stage", "seed", "metric", "value", *COSTS]


def write_runs(path, task, rows, metric="predict_accuracy", **more):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*TITLES, *more])
        for method, stage, seed, value, flops in rows:
            writer.writerow([task, method, stage, seed, metric, value, 1.0, 1.0, flops, 1.0, *more.values()])
    return path


def draw(*paths, cost="flops"):
    return plot_gains.draw_gains(plot_gains.read_runs(paths), cost)


def points_of(axes) -> list:
    return [container[0].get_xydata().round(6).tolist() for container in axes.containers]


def pair(gain: float) -> list[tuple]:
    """A run of the baseline, and one with so much more."""
    return [("SGD", "compared", 0, 0.5, 1.0), ("SAM", "compared", 0, 0.5 + gain, 2.0)]


def test_points_are_paired_differences_over_paired_ratios(tmp_path):
    rows = [("AdamW", "compared", seed, value, 10.0) for seed, value in ((0, 0.5), (1, 0.7))]
    rows += [("SAM", "compared", 0, 0.6, 20.0), ("SAM", "compared", 1, 0.8, 22.0), ("SAM", "tuning", 1, 0.1, 1.0)]
    rows += [("SAM", "compared", 2, 0.0, 1.0)]  # No baseline with this seed.
    one = write_runs(tmp_path / "one.csv", "T 1", rows)
    rows = [("SGD", "compared", 0, 0.5, 4.0), ("SAM", "compared", 0, 0.4, 8.0)]
    other = write_runs(tmp_path / "other.csv", "T 2", rows, metric="eval_loss")
    figure = plot_gains.draw_gains(plot_gains.read_runs([one, other]), "flops")
    points = [axes.containers[0][0].get_xydata().round(6).tolist() for axes in figure.axes]
    assert points == [[[2.1, 0.1]], [[2.0, -0.1]]]
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["T 1\naccuracy, n = 2", "T 2\nloss (lower is better), n = 1"]
    # The gain is 0.1 with both seeds.
    [ends] = figure.axes[0].containers[0][2][0].get_segments()
    assert ends[:, 1] == pytest.approx([0.1, 0.1])
    plot_gains.main([str(tmp_path / "gains.png"), str(one), str(other)])
    assert (tmp_path / "gains.png").stat().st_size > 1000


def test_other_files_and_doubles_are_refused(tmp_path):
    runs = write_runs(tmp_path / "runs.csv", "T", [("SGD", "compared", 0, 0.5, 4.0)])
    with pytest.raises(ValueError, match="holds runs of T, as does a file before it"):
        plot_gains.read_runs([runs, runs])
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


def test_the_baseline_is_the_one_of_the_comparison(tmp_path):
    """Which need not be the first method, nor have been run yet."""
    rows = [("SAM", "compared", 0, 0.6, 2.0), ("SGD", "compared", 0, 0.5, 1.0)]
    assert points_of(draw(write_runs(tmp_path / "new.csv", "T", rows, baseline="SGD")).axes[0]) == [[[2.0, 0.1]]]
    # In a file that does not say it, the first method of the file, whichever is the first of the task.
    old = write_runs(tmp_path / "old.csv", "T 0", rows[1:])
    other = write_runs(tmp_path / "other.csv", "T", rows)
    old.write_text(old.read_text() + other.read_text().partition("\n")[2])
    assert points_of(draw(old).axes[1]) == [[[2.0, 0.1]]]
    without = write_runs(tmp_path / "without.csv", "T", [*rows[:1], ("LSAM", *rows[0][1:])], baseline="SGD")
    with pytest.raises(SystemExit, match="without.csv has no compared run of SGD on T, which is the baseline"):
        plot_gains.main([str(tmp_path / "gains.png"), str(without)])


def test_results_that_are_kept_can_all_be_drawn():
    folder = Path(plot_gains.__file__).with_name("results")
    files = [path for path in folder.glob("*.csv") if "compared" in path.read_text()]
    assert len(files) > 20
    for path in files:
        assert any(map(points_of, draw(path).axes))


def test_the_number_of_seeds_is_that_of_the_pairs(tmp_path):
    rows = [("SGD", "compared", seed, 0.5, 1.0) for seed in range(5)]
    rows += [("SAM", "compared", seed, 0.6, 2.0) for seed in (3, 4, 5)]
    assert draw(write_runs(tmp_path / "runs.csv", "T", rows)).axes[0].get_title().endswith("n = 2")
    rows += [("LSAM", "compared", seed, 0.6, 2.0) for seed in range(4)]
    assert draw(write_runs(tmp_path / "runs.csv", "T", rows)).axes[0].get_title().endswith("n = 2 to 4")


def test_times_of_resumed_runs_are_left_out(tmp_path, capsys):
    rows = [("SGD", "compared", 0, 0.5, ""), ("SGD", "compared", 1, 0.5, 1.0), ("late", "compared", 0, 0.5, 1.0)]
    rows += [("SAM", "compared", seed, 0.6, 2.0) for seed in (0, 1)]
    runs = write_runs(tmp_path / "runs.csv", "T", rows)
    assert points_of(draw(runs).axes[0]) == [[[2.0, 0.1]]]
    assert capsys.readouterr().err == "T: late is not drawn over SGD: no seed has flops of both.\n"
    only = write_runs(tmp_path / "only.csv", "T", [rows[0], rows[3]])
    with pytest.raises(SystemExit, match="No seed has flops of some method and of its baseline: draw over another"):
        plot_gains.main([str(tmp_path / "gains.png"), str(only)])


def test_figures_that_are_no_numbers_are_left_out(tmp_path, capsys):
    rows = pair(0.1) + [(f"is {value}", "compared", 0, value, 2.0) for value in ("nan", "inf")]
    assert points_of(draw(write_runs(tmp_path / "runs.csv", "T", rows)).axes[0]) == [[[2.0, 0.1]]]
    why = "is not drawn over SGD: its difference is no finite number."
    assert capsys.readouterr().err.splitlines() == [f"T: is nan {why}", f"T: is inf {why}"]


def test_the_direction_is_the_one_of_the_comparison(tmp_path):
    rows = pair(0.1)
    runs = write_runs(tmp_path / "runs.csv", "T", rows, metric="predict_error", greater_is_better="False")
    assert draw(runs).axes[0].get_title() == "T\nerror (lower is better), n = 1"
    runs = write_runs(tmp_path / "runs.csv", "T", rows, metric="predict_error")
    assert draw(runs).axes[0].get_title() == "T\nerror, n = 1"


def test_small_differences_and_losses_have_axes_of_their_own(tmp_path):
    gains = {"large": -0.2, "seen": 0.02, "small": 0.002}
    files = [write_runs(tmp_path / f"{name}.csv", name, pair(gain)) for name, gain in gains.items()]
    files.append(write_runs(tmp_path / "loss.csv", "loss", pair(0.1), metric="eval_loss"))
    large, seen, small, loss = draw(*files).axes
    assert large.get_ylim() == seen.get_ylim() and large.get_yscale() == seen.get_yscale() == "symlog"
    assert small.get_ylim()[1] < 0.005 and small.get_yscale() == loss.get_yscale() == "linear"
    assert large.get_ylim() != loss.get_ylim() and loss.get_ylim()[1] > 0.1
    assert [axes.get_ylabel() for axes in (large, seen, small, loss)] == ["", "", *["axis of its own"] * 2]
    # Beside a panel with another axis, the numbers are there again.
    shown = [axes.yaxis.get_tick_params()["labelleft"] for axes in (large, seen, small, loss)]
    assert shown == [True, False, True, True]


def test_sixteen_methods_have_colours_and_markers_of_their_own():
    styles = [style(index) for index in range(16)]
    assert len({one["color"] for one in styles}) == 16
    assert len({(one["marker"], one.get("markerfacecolor")) for one in styles}) == 16
