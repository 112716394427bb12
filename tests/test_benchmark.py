"""The benchmark on a tiny model: every method takes its turns, and the bound is that of the cost model."""

import json

import benchmark
import pytest

TINY = ["--num_hidden_layers", "4", "--hidden_size", "64", "--batch_size", "2", "--sequence_length", "8"]
TINY += ["--rounds", "1", "--steps", "1"]


def test_every_method(tmp_path, capsys):
    path = tmp_path / "cost.json"
    # One of 4 blocks costs more than a budget of 0.2.
    names = [name for name in benchmark.METHODS if name not in ("budget-0.1", "budget-0.2")]
    figures = benchmark.main([*TINY, "--methods", ",".join(names), "--output_file", str(path)])
    assert list(figures) == names
    assert figures["plain"]["ratio"] == 1
    assert all(row["seconds"] > 0 for row in figures.values())
    bounds = {name: row["bound"] for name, row in figures.items()}
    assert bounds["plain"] == bounds["off"] == bounds["one-pass-2"] == 1
    assert bounds["sam"] == pytest.approx(2)
    assert bounds["looksam-5"] == pytest.approx(1.2)
    assert 1 < bounds["last-1"] < bounds["last-2"] < bounds["last-4"] < 2
    assert bounds["budget-0.5"] <= 1.5
    assert figures["last-2"]["first_block"] == 2
    saved = json.loads(path.read_text())
    assert saved["figures"].keys() == figures.keys()
    assert {"seeds", "commit", "versions", "machine"} <= saved["stamp"].keys()
    assert capsys.readouterr().out.count("\n| ") >= len(figures)


@pytest.mark.parametrize("methods", ["plain,none-such", "sam"])
def test_unknown_methods_are_refused(methods):
    with pytest.raises(ValueError, match="it must hold plain and others of"):
        benchmark.main([*TINY, "--methods", methods])
