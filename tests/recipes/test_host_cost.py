"""The benchmark of the host's work on a tiny model: all methods go on side by side, and every call has its place."""

import json
import re

import pytest
import torch

from hf_lsam_recipes.studies import host_cost
from hf_lsam_recipes.support.cost.peers import IN_TRAINER

TINY = ["--num_hidden_layers", "3", "--rounds", "2", "--steps", "2", "--warm_up", "3"]


def test_every_method_has_its_figures(tmp_path, capsys):
    path = tmp_path / "host.json"
    figures = host_cost.main([*TINY, "--output_file", str(path)])
    assert list(figures) == ["plain", "off", "one-pass-2", "last-1", "last-2", "top-2", "sam", *IN_TRAINER]
    assert figures["plain"]["ratio"] == figures["plain"]["calls_ratio"] == 1
    for row in figures.values():
        assert row["lowest"] <= row["ratio"] <= row["highest"] and row["milliseconds"] > 0
        assert sum(row["calls_by_part"].values()) == pytest.approx(row["calls"])
        assert sum(row["calls_by_file"].values()) == pytest.approx(row["calls"])
    parts = {name: row["calls_by_part"] for name, row in figures.items()}
    assert "snapshots" in parts["last-1"] and "snapshots" not in parts["plain"] and "snapshots" not in parts["off"]
    # A pass more, of one block, of two, and of all of them.
    for part, blocks in (("plain", 3), ("last-1", 4), ("last-2", 5), ("sam", 6), ("sam-by-hand", 6)):
        assert parts[part]["blocks"] == pytest.approx(parts["plain"]["blocks"] * blocks / 3)
    assert not any(place.startswith("hf_lsam") for place in figures["plain"]["calls_by_file"])
    saved = json.loads(path.read_text())
    assert saved["figures"] == figures and saved["arguments"]["num_hidden_layers"] == 3
    assert {"seeds", "commit", "versions", "machine"} <= saved["stamp"].keys()
    out = capsys.readouterr().out
    assert all(
        len(re.findall(rf"^\| {name} +\|", out, re.MULTILINE)) == 1 for name in (*figures, "snapshots", "torch")
    )


def test_calls_are_the_same_at_every_run():
    one, other = ([*map(calls, host_cost.main([*TINY, "--methods", "plain,last-1"]).values())] for _ in range(2))
    assert one == other


def calls(row):
    return row["calls"], row["calls_by_part"]


def test_steps_that_look_at_everything_do_not_count(monkeypatch):
    """Steps 4 and 8 do, and no method counts them."""
    counted = []
    inner = host_cost.Contender.go

    def noted(self, steps, counts=False):
        inner(self, steps, counts)
        counted.append(len(self.seconds))

    monkeypatch.setattr(host_cost.Contender, "go", noted)
    host_cost.main(
        ["--num_hidden_layers", "2", "--methods", "plain", "--rounds", "2", "--steps", "3", "--warm_up", "3"]
    )
    # Steps 1 to 3, 4 to 6, 7 to 9, and those whose calls are counted, 10 to 12.
    assert counted == [1, 2, 2, 3]


def test_an_error_in_a_training_is_raised(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no step")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(RuntimeError, match="no step"):
        host_cost.main([*TINY, "--methods", "plain"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "sam"], "it must include plain, and only names among"),
        (["--methods", "plain,pasted-sam"], "it must include plain, and only names among"),
        (["--rounds", "0"], "rounds must be at least 1, but is 0"),
        (["--output_file", "/none/host.json"], "/none is not a folder that can be written to"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        host_cost.main([*TINY, *options])
