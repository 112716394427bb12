"""The figures of a comparison: that they show its results, and what is said where they cannot."""

import json
import struct
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from tiny_compare import unmeasured

from hf_lsam_recipes import plot
from hf_lsam_recipes.support.comparison.series import ResultsError, block_norms, read_results
from hf_lsam_recipes.support.comparison.statistics import COSTS
from hf_lsam_recipes.support.figures import comparison as plot_figures
from hf_lsam_recipes.support.figures.palette import COLOURS, style

pytest_plugins = ["plot_fixtures"]

FIGURES = [
    "accuracy_over_cost",
    "gradient_norm",
    "layer_gradient_norms",
    "layer_landscapes",
    "learning_curves",
    "perturbations",
]
VALUES = [1, 2, 3]
SHARED = "T 1: several runs shared the machine, so times are inaccurate. --cost flops avoids them.\n"


def lines_of(axes) -> list[tuple[list, list]]:
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]


def legend_of(figure) -> list[str]:
    return [text.get_text().strip() for text in figure.legends[0].get_texts()]


def points_of(axes) -> dict[str, tuple]:
    """Centre and error bars of each method: x, y, and for each direction that has them the ends of its bars."""
    found = {}
    for container in axes.containers:
        line, _, bars = container.lines
        ends = [segment.tolist() for bar in bars for segment in bar.get_segments()]
        found[container.get_label().strip()] = (line.get_xdata().tolist(), line.get_ydata().tolist(), ends)
    return found


@pytest.fixture(scope="module")
def results(compared):
    return read_results(compared)[0]


def test_all_figures_are_files_that_can_be_opened(compared, tmp_path, capsys):
    plot.main([str(compared), str(tmp_path)])
    out, err = capsys.readouterr()
    assert err == SHARED
    folder = tmp_path / "t-1"
    assert sorted(path.name for path in folder.iterdir()) == [f"{n}.{s}" for n in FIGURES for s in ("png", "svg")]
    assert len(out.splitlines()) == 12
    for name in FIGURES:
        assert ElementTree.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")
        header = (folder / f"{name}.png").read_bytes()[:24]
        assert header.startswith(b"\x89PNG")
        assert struct.unpack(">II", header[16:])[0] == 1350
    # The same figure gives the same files.
    again = plot.save(plot_figures.perturbations(read_results(compared)[0]), tmp_path / "again" / "perturbations")
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in again)


def test_the_help_names_a_default_that_can_be_chosen(capsys):
    with pytest.raises(SystemExit):
        plot.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: training_seconds)" in text and "training_seconds" in COSTS


def test_a_method_without_runs_yet_keeps_no_figure_from_being_drawn(results):
    partial = replace(results, runs=results.runs | {"waits": []})
    figures = plot.draw(partial, "flops")
    assert sorted(figures) == FIGURES
    assert "waits" not in legend_of(figures["learning_curves"])


def test_gradient_norm_of_every_method_is_the_mean_over_seeds_with_its_range(results):
    figure = plot_figures.gradient_norm(results)
    steps = [1, 2, 3, 4, 5, 6]
    assert lines_of(figure.axes[0]) == [(steps, [100 * v + step + 0.5 for step in steps]) for v in VALUES]
    assert legend_of(figure) == ["plain", "SAM", "_top $k^"]
    for v, band in zip(VALUES, figure.axes[0].collections, strict=True):
        corners = band.get_paths()[0].vertices
        assert corners[:, 1].min() == 100 * v + 1 and corners[:, 1].max() == 100 * v + 7


def test_layers_have_a_panel_a_method_and_stand_in_their_own_order(results):
    figure = plot_figures.layer_gradient_norms(results)
    assert [axes.get_title() for axes in figure.axes] == ["plain", "SAM", "_top $k^"]
    assert legend_of(figure) == ["2", "10"]
    for v, axes in zip(VALUES, figure.axes, strict=True):
        assert lines_of(axes) == [([1, 2, 3, 4, 5, 6], [10 * v + layer + 0.5] * 6) for layer in (2, 10)]


def test_landscapes_have_a_panel_a_layer(results):
    figure = plot_figures.layer_landscapes(results)
    assert [axes.get_title() for axes in figure.axes] == ["layer 2", "layer 10", "whole model"]
    for axes in figure.axes:
        assert lines_of(axes) == [([-1.0, 0.0, 1.0], [v, 0.5, v]) for v in VALUES]


def test_learning_curves_are_training_loss_and_validation_metric(results):
    loss, accuracy = plot_figures.learning_curves(results).axes
    assert np.array([line[1] for line in lines_of(loss)]) == pytest.approx(
        np.array([[v / step + 0.5 for step in range(1, 7)] for v in VALUES])
    )
    assert accuracy.get_title() == "eval_accuracy"
    assert np.array([line[1] for line in lines_of(accuracy)]) == pytest.approx(
        np.array([[v / 10 + 0.005] * 2 for v in VALUES])
    )


def test_perturbations_count_all_layers_for_sam_and_none_for_plain_training(results):
    figure = plot_figures.perturbations(results)
    points = points_of(figure.axes[0])
    assert {method: y for method, (_, y, _) in points.items()} == {"plain": [0, 0], "SAM": [6, 6], "_top $k^": [6, 2]}
    # Side by side, each nearest to its own layer.
    places = np.array([x for x, _, _ in points.values()])
    assert np.abs(places - [0, 1]).max() < 0.5 and len(set(places[:, 0])) == 3
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["2", "10"]


def test_accuracy_over_cost_has_the_intervals_of_students_t(results):
    """Times are 1, 2, 3 with seed 0 and twice that with seed 1: only ratios within a seed mean something."""
    points = points_of(plot_figures.accuracy_over_cost(results).axes[0])
    # Two seeds, 0.01 apart: the half width is t(1) * sd / sqrt(2) with t(1) = 12.7062047 and sd = 0.01 / sqrt(2).
    half = 12.706204736432095 * 0.01 / 2
    for v, (x, y, bars) in zip(VALUES, points.values(), strict=True):
        mean = v / 10 + 0.005
        assert (x, y) == ([v], [pytest.approx(mean)])
        assert np.array(bars) == pytest.approx(np.array([[[v, mean]] * 2, [[v, mean - half], [v, mean + half]]]))


def test_results_without_measurements_are_drawn_from_what_the_methods_log(changed, capsys):
    results = read_results(changed(unmeasured))[0]
    assert sorted(plot.draw(results, "flops")) == [name for name in FIGURES if name != "layer_landscapes"]
    assert capsys.readouterr().err.splitlines() == [
        "T 1: layer_landscapes is not drawn: not every run has landscapes. Set landscape_points in the comparison's "
        "settings."
    ]
    figure = plot_figures.gradient_norm(results)
    assert lines_of(figure.axes[0])[1][1] == [2 * step + 0.5 for step in range(1, 7)]
    assert "that the optimizer gets" in figure.axes[0].get_ylabel()
    figure = plot_figures.layer_gradient_norms(results)
    assert [axes.get_title() for axes in figure.axes] == ["_top $k^"]
    # Only from the first perturbed step on.
    assert lines_of(figure.axes[0]) == [([3, 4, 5, 6], [3 * step + 0.5 for step in (3, 4, 5, 6)])] * 2


def test_measured_norms_are_shown_only_if_every_run_has_them(changed):
    """Else two kinds of norms would stand in one figure."""
    folder = changed(lambda run: unmeasured(run) if (run["method"], run["seed"]) == ("SAM", 1) else None)
    results = read_results(folder)[0]
    assert not results.measured()
    assert "that the optimizer gets" in plot_figures.gradient_norm(results).axes[0].get_ylabel()


def test_one_seed_is_drawn_without_spread_and_that_is_said(changed, capsys):
    results = read_results(changed(lambda run: run["seed"] == 1))[0]
    figures = plot.draw(results, "flops")
    assert sorted(figures) == FIGURES
    assert capsys.readouterr().err == "T 1: there is only one seed, so the figures show no variation between seeds.\n"
    assert points_of(figures["accuracy_over_cost"].axes[0])["SAM"] == ([2.0], [pytest.approx(0.21)], [])
    assert figures["gradient_norm"]._suptitle.get_text().endswith("T 1, seed 1")


def test_times_of_a_resumed_run_are_left_out_and_another_cost_can_be_taken(changed, capsys):
    def resume(run):
        if run["method"] == "plain":
            run["training_seconds"] = None

    results = read_results(changed(resume))[0]
    assert "accuracy_over_cost" not in plot.draw(results, "training_seconds")
    reason = "no seed has predict_accuracy of some method and training_seconds of it and of plain"
    assert capsys.readouterr().err == f"{SHARED}T 1: accuracy_over_cost is not drawn: {reason}.\n"
    axes = plot.draw(results, "flops")["accuracy_over_cost"].axes[0]
    assert capsys.readouterr().err == ""
    assert [x for x, _, _ in points_of(axes).values()] == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize("told", [True, False, None])
def test_the_direction_of_the_metric_is_the_one_of_the_comparison(changed, told):
    folder = changed(lambda run: None)
    content = json.loads((folder / "results.json").read_text())
    assert content["greater_is_better"] == {"T 1": True}
    # Reports of old do not say it.
    content |= {"greater_is_better": {"T 1": told}} if told is not None else {}
    (folder / "results.json").write_text(
        json.dumps({k: v for k, v in content.items() if told is not None or k[0] != "g"})
    )
    axes = plot_figures.accuracy_over_cost(read_results(folder)[0]).axes[0]
    assert axes.get_ylabel() == "predict_accuracy" + " (lower is better)" * (told is False)


def test_a_metric_that_is_no_number_is_left_out_and_that_is_said(changed, capsys):
    def change(run):
        if (run["method"], run["seed"]) == ("SAM", 0):
            run["metrics"]["predict_accuracy"] = float("nan")

    axes = plot.draw(read_results(changed(change))[0], "flops")["accuracy_over_cost"].axes[0]
    assert list(points_of(axes)) == ["plain", "_top $k^"]
    said = "T 1: predict_accuracy of SAM is not finite, so it is not drawn against cost.\n"
    assert capsys.readouterr().err == said


def test_a_method_without_a_run_keeps_the_styles_of_the_others(changed):
    results = read_results(changed(lambda run: run["method"] != "SAM"))[0]
    complete = plot_figures.gradient_norm(read_results(changed(lambda run: None))[0])
    figure = plot_figures.gradient_norm(results)
    assert legend_of(figure) == ["plain", "_top $k^"]
    assert legend_of(complete) == ["plain", "SAM", "_top $k^"]


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (None, "holds no report of compare.py .*results.json is missing.*--report_only"),
        ("{}", "were not written by compare.py: KeyError"),
        ("[]", "were not written by compare.py: TypeError"),
        ("nonsense", "were not written by compare.py: JSONDecodeError"),
        (json.dumps({"baseline": "A", "runs": []}), "holds no compared run yet"),
    ],
)
def test_what_is_no_result_of_a_comparison_is_refused(tmp_path, report, message):
    if report is not None:
        (tmp_path / "results.json").write_text(report)
        (tmp_path / "runs.csv").write_text("task,stage,metric\n")
    with pytest.raises(ResultsError, match=message):
        read_results(tmp_path)
    with pytest.raises(SystemExit, match="plot.py: "):
        plot.main([str(tmp_path), str(tmp_path / "figures")])
    assert not (tmp_path / "figures").exists()


def test_a_run_that_logged_nothing_has_no_norms():
    assert block_norms({"curve": [], "blocks": []}, measured=False) == {}


def test_styles_differ_past_the_last_colour():
    styles = [tuple(style(index).items()) for index in range(3 * len(COLOURS))]
    assert len(set(styles)) == len(styles)
    assert len({dict(one)["color"] for one in styles[:16]}) == 16
