"""What is left of the ascent in the gradient of the step before: measured without a change to the training."""

import json
import math

import pytest
import run_glue
import staleness
from safetensors.torch import load_file
from tiny_glue import rte

pytest_plugins = ["glue_fixtures"]


def test_it_measures_three_directions_and_changes_nothing_of_the_training(bert, glue, tmp_path):
    options = ["--do_train", "--max_steps", "4", "--learning_rate", "0.01"]
    path = tmp_path / "staleness.json"
    lines = staleness.main([*rte(bert, glue, tmp_path / "measured"), *options, "--output_file", str(path)])
    results = json.loads(path.read_text())
    assert results["summary"] == lines
    assert {(line["selection"], line["direction"], line["steps"]) for line in lines} == {
        (selection, direction, 3) for selection in ("last 2", "top 2", "all") for direction in staleness.DIRECTIONS
    }
    for line in lines:
        figures = [value for name, value in line.items() if name == "cosine" or name.startswith("rise")]
        if line["direction"] == "own":
            assert figures == pytest.approx([1.0] * 4)
        else:
            assert all(map(math.isfinite, figures)) and abs(figures[0]) < 0.999
    own = [row for row in results["rows"] if row["direction"] == "own"]
    assert all(row["rise at 0.05"] > 0 for row in own)

    plain = run_glue.prepare([*rte(bert, glue, tmp_path / "plain"), *options, "--block_selection", "none"])
    plain.trainer.train()
    measured = run_glue.prepare([*rte(bert, glue, tmp_path / "again"), *options, "--block_selection", "none"])
    probe = measured.trainer.training_step = staleness.Probe(measured.trainer)
    ascents_of, modes = probe._ascents_of, []
    probe._ascents_of = lambda model, batch: modes.append(model.training) or ascents_of(model, batch)
    measured.trainer.train()
    # With dropout, as the gradients of the steps have it.
    assert modes == [True] * 3
    for run, name in ((plain, "plain"), (measured, "again")):
        run.trainer.save_model(str(tmp_path / name))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "again"))
    assert all(one[name].equal(other[name]) for name in one)


def test_settings_that_it_cannot_measure_are_refused(bert, glue, tmp_path, capsys):
    options = [*rte(bert, glue, tmp_path), "--do_train", "--gradient_accumulation_steps", "2"]
    with pytest.raises(ValueError, match="gradient_accumulation_steps to 1"):
        staleness.main(options)
    with pytest.raises(SystemExit):
        staleness.main(["--output_file"])
    assert "--output_file: expected one argument" in capsys.readouterr().err
