"""The paper's claims on results of a comparison, against values by hand."""

import csv

import pytest
from tiny_compare import unmeasured

from hf_lsam_recipes.studies import claims
from hf_lsam_recipes.studies.claims import Consistency, consistency, late_mean, norm_ratios
from hf_lsam_recipes.support.comparison.series import read_results

pytest_plugins = ["plot_fixtures"]


def norms(*parts: list[float]) -> dict:
    """Curves of blocks from their norms in each of three parts of two steps, which lie 1 around those."""
    blocks = zip(*parts, strict=True)
    return {
        f"layer.{index}": {2 * part + step: norm + (-1) ** step for part, norm in enumerate(of) for step in (0, 1)}
        for index, of in enumerate(blocks)
    }


def test_the_same_ranking_throughout_is_full_consistency():
    assert consistency(norms([1, 5, 9], [2, 3, 4], [10, 20, 30]), k=2) == Consistency(1.0, pytest.approx(1.0), 1.0)


def test_consistency_by_hand():
    """
    Rankings 1 2 3, 1 2 3 and 3 2 1 of three layers: their sums 5, 6 and 7 lie 2 in squares around the mean 6, so that
    W = 12 * 2 / (3^2 * (3^3 - 3)) = 1/9. The first and the last ranking are opposite. Of the two largest layers, which
    were 1 and 2 at first and are 0 and 1 at last, one is kept.
    """
    found = consistency(norms([1, 2, 3], [1, 2, 3], [3, 2, 1]), k=2)
    assert found == Consistency(pytest.approx(1 / 9), pytest.approx(-1.0), 0.5)


def test_spearman_by_hand():
    """Ranks 1 2 3 4 and 2 1 4 3 differ by 1 each: 1 - 6 * 4 / (4 * (16 - 1)) = 0.6."""
    found = consistency(norms([1, 2, 3, 4], [1, 2, 3, 4], [2, 1, 4, 3]), k=1)
    assert found.spearman == pytest.approx(0.6) and found.overlap == 0


def test_more_top_layers_than_there_are_are_all_of_them():
    assert consistency(norms([1, 5, 9], [2, 3, 4], [10, 20, 30]), k=5).overlap == 1.0


def table_of(text: str) -> list[list[str]]:
    """The cells of the tables in `text`, line by line."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_norms_that_are_no_numbers_have_no_ranking_and_no_interval(changed, capsys):
    assert consistency(norms([1, 2], [float("nan"), 3], [1, 2]), k=1) is None

    def change(run):
        if (run["method"], run["seed"]) == ("SAM", 0):
            for line in run["curve"]:
                if "sharpness/gradient_norm/all" in line:
                    line["sharpness/gradient_norm/all"] = float("inf")

    claims.main([str(changed(change))])
    [row] = [row for row in table_of(capsys.readouterr().out) if row[0] == "SAM"]
    assert row[1] == "inf" and row[2].startswith("1.000")


def test_too_little_to_rank_is_nothing():
    assert consistency({}, k=2) is None
    assert consistency({"a": {1: 1.0, 2: 1.0}, "b": {1: 2.0, 2: 2.0}}, k=2) is None
    assert consistency({"a": {1: 1.0, 2: 1.0, 3: 1.0}}, k=2) is None
    assert consistency(norms([1, 2], [3, 3], [1, 2]), k=2) is None


def test_late_mean_is_over_the_last_third_of_the_steps():
    assert late_mean({10: 100.0, 20: 50.0, 30: 4.0, 40: 3.0, 60: 1.0}) == 1.0
    assert late_mean({3: 9.0, 4: 9.0, 5: 4.0, 6: 2.0}) == 3.0
    assert late_mean({}) is None


def test_norms_are_compared_with_the_baseline_seed_by_seed(compared, changed):
    """Measured: 100 v + step + s at steps 5 and 6; else v * step + s, both with the baseline's v = 1."""
    results = read_results(compared)[0]
    assert norm_ratios(results, "SAM") == pytest.approx({0: 205.5 / 105.5, 1: 206.5 / 106.5})
    results = read_results(changed(unmeasured))[0]
    assert norm_ratios(results, "SAM") == pytest.approx({0: 11 / 5.5, 1: 12 / 6.5})
    without = read_results(changed(lambda run: (run["method"], run["seed"]) != ("plain", 0)))[0]
    assert norm_ratios(without, "SAM") == pytest.approx({1: 206.5 / 106.5})


def test_the_table_has_intervals_and_says_what_was_measured(compared, changed, tmp_path, capsys):
    claims.main([str(compared)])
    out = capsys.readouterr().out
    assert "measured on the same rows." in out and "not measured" not in out
    rows = table_of(out)
    assert rows[2] == ["plain", "", *["1.000 [1.000, 1.000]"] * 3, "2"]
    # Half the distance of the two ratios, times Student's t for one degree of freedom.
    ratios = [205.5 / 105.5, 206.5 / 106.5]
    mean, half = sum(ratios) / 2, 12.706204736432095 * abs(ratios[0] - ratios[1]) / 2
    assert rows[3][:2] == ["SAM", f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"]
    claims.main([str(changed(unmeasured))])
    out = capsys.readouterr().out
    assert "as logged, not measured on the same rows" in out
    assert ["plain", "", "", "", "", "2"] in table_of(out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="claims.py: .* holds no report of compare.py"):
        claims.main([str(tmp_path / "empty")])
    with pytest.raises(SystemExit):
        claims.main([str(compared), "--top_k", "0"])
    with pytest.raises(SystemExit):
        claims.main([str(compared), "--csv", str(tmp_path / "none" / "claims.csv")])
    assert "there is no folder" in capsys.readouterr().err


def test_each_figure_of_the_table_has_its_column(changed, capsys):
    """Layers that change places in the last third: the parts correlate by 1, -1 and -1; W is (1 - 2 / 3) / 3."""

    def change(run):
        for line in run["curve"]:
            if run["method"] == "SAM" and line["step"] > 4 and "sharpness/gradient_norm/all" in line:
                names = [f"sharpness/gradient_norm/layer.{n}" for n in (2, 10)]
                line.update(zip(names, [line[name] for name in reversed(names)], strict=True))

    claims.main([str(changed(change)), "--top_k", "1"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| SAM")]
    assert [cell.split()[0] for cell in row.split("|")[3:6]] == ["0.111", "-1.000", "0.000"]


def test_each_run_is_a_row_of_the_csv(compared, changed, tmp_path):
    """Without the baseline's first seed the other's ratio is empty, and so are rankings that there are none of."""
    path = tmp_path / "claims.csv"
    claims.main([str(compared), "--csv", str(path)])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows[:4]] == [
        ("plain", "0"),
        ("plain", "1"),
        ("SAM", "0"),
        ("SAM", "1"),
    ]
    assert [row["norm_ratio"] for row in rows[:2]] == ["", ""]
    assert [float(row["norm_ratio"]) for row in rows[2:4]] == pytest.approx([205.5 / 105.5, 206.5 / 106.5])
    assert {(row["kendall_w"], row["overlap"], row["top_k"], row["measured"]) for row in rows[:4]} == {
        ("1.0", "1.0", "2", "True")
    }
    assert {row["task"] for row in rows} == {"T 1"} and all(row["versions"] and row["commit"] for row in rows)

    folder = changed(lambda run: unmeasured(run) if run["method"] != "plain" or run["seed"] else False)
    claims.main([str(folder), "--csv", str(path)])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["norm_ratio"]) for row in rows[:2]] == [
        ("plain", "1", ""),
        ("SAM", "0", ""),
    ]
    assert (rows[0]["kendall_w"], rows[0]["measured"]) == ("", "False")
