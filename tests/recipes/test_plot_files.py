"""The pictures of the benchmark over one of its arguments, and files that hold something else."""

import json
from pathlib import Path

import pytest

from hf_lsam_recipes.studies import plot_cost, plot_demo
from hf_lsam_recipes.support.figures.demo import RUN

OTHERS = {
    "nonsense.json": "nonsense",
    "list.json": "[]",
    "empty.json": '{"runs": []}',
    "texts.json": '{"runs": ["a"]}',
    "other.json": '{"runs": [{"of": "before"}]}',
}


@pytest.mark.parametrize("name", ["none.json", *OTHERS])
@pytest.mark.parametrize("script", [plot_cost, plot_demo])
def test_files_of_something_else_are_refused_by_name(tmp_path, script, name):
    path = tmp_path / name
    if name in OTHERS:
        path.write_text(OTHERS[name])
    with pytest.raises(SystemExit, match=rf"{Path(script.__file__).name}: .*{name}"):
        script.main([str(path), str(tmp_path / "picture.png")])
    assert not (tmp_path / "picture.png").exists()


def test_results_of_a_comparison_are_not_those_of_the_demo(tmp_path):
    run = dict.fromkeys(RUN, 1) | {"curve": [{"step": 1, "eval_accuracy": 0.5}], "blocks": []}
    (tmp_path / "results.json").write_text(json.dumps({"runs": [run]}))
    with pytest.raises(SystemExit, match="results.json is not a results.json of the demo"):
        plot_demo.main([str(tmp_path / "results.json"), str(tmp_path / "picture.png")])


def grown(blocks: int, accumulation: int, ratio: float) -> dict:
    """A run of the benchmark in which two blocks cost 0.1 more than their bound where `ratio` is 1.3."""
    row = {"ratio": ratio, "lowest": ratio - 0.1, "highest": ratio + 0.2, "bound": 1.2}
    arguments = {"num_hidden_layers": blocks, "gradient_accumulation_steps": accumulation, "rounds": 3}
    return {
        "arguments": arguments,
        "figures": {"plain": row | {"bound": 1.0}, "last-2": row, "pasted-sam": row | {"bound": None}},
    }


def test_growth_is_drawn_over_runs_that_differ_in_one_argument(tmp_path):
    runs = [grown(6, 1, 1.3), grown(24, 1, 1.4), grown(12, 1, 1.2), grown(6, 8, 1.25)]
    figure = plot_cost.growth(runs, ["num_hidden_layers", "gradient_accumulation_steps"])
    drawn = [axes.containers[0][0].get_xydata().round(6).tolist() for axes in figure.axes]
    assert drawn == [[[6, 0.1], [12, 0.0], [24, 0.2]], [[1, 0.1], [8, 0.05]]]
    assert [axes.get_xlabel() for axes in figure.axes] == ["num_hidden_layers", "gradient_accumulation_steps"]
    assert [len(axes.containers) for axes in figure.axes] == [1, 1]
    with pytest.raises(ValueError, match="--over blocks: the benchmark has num_hidden_layers"):
        plot_cost.growth(runs, ["blocks"])
    del runs[1]["figures"]["last-2"]
    with pytest.raises(ValueError, match="Not every run over num_hidden_layers holds times of last-2"):
        plot_cost.growth(runs, ["num_hidden_layers"])
