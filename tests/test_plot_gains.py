"""Gain over cost of several comparisons in one picture."""

import csv

import plot_gains
import pytest
from compare_statistics import COSTS

TITLES = ["task", "method", "stage", "seed", "metric", "value", *COSTS]


def write_runs(path, task, rows, metric="predict_accuracy"):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(TITLES)
        for method, stage, seed, value, flops in rows:
            writer.writerow([task, method, stage, seed, metric, value, 1.0, 1.0, flops, 1.0])
    return path


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
