"""What is left of the ascent in the gradient of the step before: measured without a change to the training."""

import json
import math

import pytest
from safetensors.torch import load_file
from tiny_glue import rte

from hf_lsam_recipes import run_glue
from hf_lsam_recipes.studies import rounding, staleness

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


def test_a_single_step_has_none_before_it(bert, glue, tmp_path):
    with pytest.raises(ValueError, match="Nothing was measured, .*: train for 2 steps or more"):
        staleness.main([*rte(bert, glue, tmp_path), "--do_train", "--max_steps", "1"])
    with pytest.raises(ValueError, match="output_file=.* is not a folder that can be written to"):
        staleness.main([*rte(bert, glue, tmp_path), "--do_train", "--output_file", str(tmp_path / "none" / "a.json")])


def test_rounding_names_a_model_or_a_text_that_is_not_there(bert, tmp_path):
    """Before it measures on those that are."""
    text = tmp_path / "dev.tsv"
    options = ["--text_file", str(text)]
    with pytest.raises(ValueError, match=r"text_file=.*dev.tsv cannot be read: "):
        rounding.main([*options, "--models", bert])
    for content in ("a\tb\n1\t2\n", "sentence\tlabel\n", "sentence\tlabel\ngood\tyes\n"):
        text.write_text(content)
        with pytest.raises(ValueError, match="must be a TSV with the columns sentence and label"):
            rounding.main([*options, "--models", bert])
    text.write_text("sentence\tlabel\ngood\t1\n")
    with pytest.raises(ValueError, match=r"models: .*none cannot be loaded \("):
        rounding.main([*options, "--models", f"{bert},{tmp_path / 'none'}"])
    for more in (["--rows", "0"], ["--output_file", str(tmp_path / "none" / "a.json")]):
        with pytest.raises(ValueError, match="rows must be at least 1|is not a folder that can be written to"):
            rounding.main([*options, "--models", bert, *more])
    output = tmp_path / "rounding.json"
    rounding.main([*options, "--models", bert, "--output_file", str(output)])
    assert json.loads(output.read_text())["figures"]
