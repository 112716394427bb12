"""What a comparison takes for its settings, and what its report says."""

import json
import re
from html.parser import HTMLParser

import pytest

from hf_lsam_recipes import compare
from hf_lsam_recipes.support.comparison.config import read_comparison
from hf_lsam_recipes.support.comparison.console import show
from hf_lsam_recipes.support.comparison.plan import CompareError
from hf_lsam_recipes.support.comparison.statistics import Interval, mean_interval

pytest_plugins = ["compare_fixtures"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {}}, "unknown names: method. Known names are recipe, "),
        ({"method": {}}, "Did you mean methods\\?"),
        ({"seeds": []}, "sets no seeds"),
        ({"methods": None}, "sets no methods"),
        ({"seeds": ["x"]}, "seeds must be an integer of at least 0, but is 'x'"),
        ({"baseline": "C"}, "baseline=C is not one of the methods: A, B"),
        ({"recipe": "run_nothing.py"}, "recipe=run_nothing.py is not the name of a script in"),
        ({"tasks": {"T": {}}}, "Task T sets no metric"),
        ({"methods": {"A b": {}, "a-B": {}}}, "must differ in letters or digits: A b, a-B"),
        ({"settings": {"seed": 1}}, "seed is set for each run by compare.py"),
        ({"methods": {"A": {"grid": {"value": [1, 2]}}}}, "A has a grid: set tuning_seeds"),
        ({"methods": {"A": {"grid": {"value": 1}}}}, "The grid of A must hold"),
        (
            {"methods": {"A": {"grid": {"rho": [1, 2]}}}, "tuning_seeds": [1], "tasks": {"T": {"metric": "a"}}},
            "set a tuning_metric for task T that is not the compared metric",
        ),
        ({"keep_models": "maybe"}, "keep_models must be true or false"),
        ({"processes": 0}, "processes must be an integer of at least 1"),
        ({"methods": {"A": "rho=0.5"}}, "Method A must have one `name: value` per line, but holds 'rho=0.5'"),
        ({"tasks": {"T": "predict_f1"}}, "Task T must have one `name: value` per line, but holds 'predict_f1'"),
        ({"recipe": ["t"]}, r"recipe must be a single text, but is \['t'\]"),
        ({"output_dir": ["t"]}, "output_dir must be a single text"),
        ({"tasks": {"T": {"metric": ["x"]}}}, "The metric of T must be a single text"),
        ({"tasks": {"T": {"metric": "x", "tuning_metric": ["y"]}}}, "The tuning_metric of T must be a single text"),
        ({"seeds": {"a": 1}}, r"seeds must be an integer of at least 0, but is \{'a': '1'\}"),
        ({"processes": [1]}, r"processes must be an integer of at least 1, but is \['1'\]"),
        (
            {"methods": {"A": {"grid": {"rho": [1, -1]}}}, "tuning_seeds": [1]},
            r"grid of A holds \{'rho': '1'\} and \{'rho': '-1'\}, whose runs would share the folder rho-1",
        ),
        (
            {
                "methods": {"A": {"grid": {"rho": [1, 2]}}},
                "tuning_seeds": [1],
                "tasks": {"T": {"metric": "predict_mse", "greater_is_better": False, "tuning_metric": "eval_mae"}},
            },
            "greater_is_better=false for predict_mse, which does not tell whether higher eval_mae is better",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(config, changes, message):
    with pytest.raises(CompareError, match=message):
        read_comparison(config(**changes), {}, {})


def test_a_method_without_settings_may_be_empty(config):
    path = config(methods={"A": None, "B": {}, "C": "null"}, tasks={"T": {"metric": "m", "tuning_metric": None}})
    assert [method.settings for method in read_comparison(path, {}, {}).methods] == [{}, {}, {}]


def test_a_name_that_is_set_twice_is_refused(config):
    path = config()
    path.write_text(path.read_text().replace("  B:\n", "  A:\n"))
    with pytest.raises(CompareError, match=r"compare.yaml cannot be read: line 10 sets A a second time\. Remove one"):
        read_comparison(path, {}, {})


def test_a_yaml_takes_from_its_base_what_it_does_not_set(config, tmp_path):
    """Settings one by one, anything else as a whole; null removes what the base sets."""
    config(settings={"a": 1, "b": 1, "c": 1}, tuning_seeds=[7], keep_models=True).rename(tmp_path / "shared.yaml")
    path = tmp_path / "own.yaml"
    path.write_text(
        "base: shared.yaml\noutput_dir: other\ntuning_seeds: null\n"
        "settings: {b: 2, c: null, d: null}\nmethods: {C: {value: 5}}\n"
    )
    comparison = read_comparison(path, {}, {})
    # Where the base sets nothing, null is the value that it is without a base.
    assert comparison.settings == {"a": "1", "b": "2", "d": "null"}
    assert [(method.name, method.settings) for method in comparison.methods] == [("C", {"value": "5"})]
    assert [task.name for task in comparison.tasks] == ["T"]
    assert (comparison.seeds, comparison.tuning_seeds, comparison.keep_models) == ([0, 1], [], True)
    assert str(comparison.output_dir) == "other"


def test_a_base_lies_relative_to_the_yaml(config, tmp_path):
    path = config()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "own.yaml").write_text(f"base: ../{path.name}\nseeds: 5\n")
    assert read_comparison(tmp_path / "below" / "own.yaml", {}, {}).seeds == [5]


@pytest.mark.parametrize(
    ("own", "shared", "message"),
    [
        ("base: nowhere.yaml", None, r"base=nowhere.yaml is not a file \(.*/nowhere.yaml\)\. Name one relative to"),
        ("base: own.yaml", None, r"own.yaml: base=own.yaml has a base itself, own.yaml, which is not supported"),
        ("base: shared.yaml", "base: own.yaml", r"base=shared.yaml has a base itself, own.yaml"),
        ("base: [a, b]", None, r"base must be a single text, but is \['a', 'b'\]"),
        ("base: shared.yaml", "a: 1\nb: [", r"shared.yaml cannot be read: line \d"),
        ("base: shared.yaml", "seed: 1", r"shared.yaml has unknown names: seed\. .* Did you mean seeds\?"),
        ("base: shared.yaml", "settings: 1", r"settings must have one `name: value` per line, but holds '1'"),
        ("base: shared.yaml", "recipe: recipe.py", r"own.yaml sets no output_dir"),
    ],
)
def test_a_base_that_cannot_be_used_is_refused_by_name(config, tmp_path, own, shared, message):
    config()
    (tmp_path / "own.yaml").write_text(own)
    if shared is not None:
        (tmp_path / "shared.yaml").write_text(shared)
    with pytest.raises(CompareError, match=message):
        read_comparison(tmp_path / "own.yaml", {}, {})


@pytest.mark.parametrize(
    ("metric", "tuning_metric", "told", "directions"),
    [
        ("predict_accuracy", "eval_accuracy", None, (True, True)),
        ("predict_accuracy", "eval_loss", None, (True, False)),
        ("predict_loss", "eval_accuracy", False, (False, True)),
        ("predict_error", "eval_error", False, (False, False)),
        ("predict_error", "eval_loss", False, (False, False)),
        ("accuracy", "loss", True, (True, False)),
    ],
)
def test_the_tuning_metric_has_a_direction_of_its_own(config, metric, tuning_metric, told, directions):
    task = {"metric": metric, "tuning_metric": tuning_metric}
    path = config(tasks={"T": task if told is None else task | {"greater_is_better": told}})
    [task] = read_comparison(path, {}, {}).tasks
    assert (task.greater_is_better, task.tuning_greater_is_better) == directions


def test_settings_of_the_command_line_are_for_all_runs(config):
    path = config(settings={"a": 1, "b": 1}, tasks={"T": {"metric": "eval_loss", "b": 2}})
    for run in read_comparison(path, {"seeds": ["4"]}, {"a": "7", "b": "8"}).final_runs():
        assert (run.settings["a"], run.settings["b"], run.seed) == ("7", "8", 4)
    with pytest.raises(CompareError, match="value is a setting of A, and cannot be set for all runs"):
        read_comparison(path, {}, {"value": "2"})
    assert not read_comparison(path, {}, {}).tasks[0].greater_is_better


def test_interval_of_a_mean_by_hand():
    """1, 2, 3, 6: mean 3, standard deviation sqrt(14/3), and 3.182446305 is Student's t for 3 degrees of freedom."""
    interval = mean_interval([1.0, 2.0, 3.0, 6.0])
    half = 3.182446305284263 * (14 / 3) ** 0.5 / 2
    assert interval.mean == 3.0
    low, high = interval.ends
    assert abs(low - (3 - half)) < 1e-12 and abs(high - (3 + half)) < 1e-12
    assert mean_interval([0.5]) == Interval(0.5, None)


@pytest.mark.parametrize("values", [[0.25, 0.25, 0.25], [0.3 - 0.1, 0.2, 0.2]])
def test_interval_of_differences_that_are_equal_is_their_mean(values, recwarn):
    """But for rounding, and without a warning of SciPy."""
    interval = mean_interval(values)
    assert interval.ends == pytest.approx((values[0], values[0]), abs=1e-12) and not recwarn.list


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_figure_that_is_no_number_loses_nothing_of_the_report(config, tmp_path, capsys, value):
    """Constant predictions have no correlation, and a perplexity may overflow."""
    assert compare.main([str(config())]) == 0
    path = tmp_path / "out" / "t" / "b" / "seed-1" / "result.json"
    result = json.loads(path.read_text())
    result["metrics"]["predict_accuracy"] = float(value)
    path.write_text(json.dumps(result))
    capsys.readouterr()
    assert compare.main([str(config()), "--report_only"]) == 0
    note = f"Metrics that are not finite, so that there is no interval: predict_accuracy of T, B, seed 1 is {value}."
    text = (tmp_path / "out" / "report.md").read_text()
    assert note in text and note in capsys.readouterr().out
    [row] = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| B ")]
    assert [cell.strip() for cell in row] == ["B", value, f"{float(value):+.4f}"]
    assert {"report.md", "report.html", "runs.csv", "results.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert mean_interval([float("inf"), float("-inf")]).ends is None


SECTIONS = [
    (
        "T_1",
        "predict_accuracy, higher is better",
        [
            {
                "method": "[bold]A_b[/bold] | *c*",
                "chosen": "",
                "tried": "3",
                "mean (range)": "0.5881 (0.5242 to 0.6974)",
            }
            | {"difference [95 %]": "", "wins / losses": "", "training time": "1.00x"}
            | {"median step": "", "FLOPs": "", "peak memory": "", "n": "3"},
            {"method": "LSAM, top 2 (the paper's rule)", "chosen": "rho=0.1", "tried": "3", "mean (range)": "missing"}
            | {"difference [95 %]": "+0.0319 [-0.2719, +0.3358]", "wins / losses": "1 / 2", "training time": "1.24x"}
            | {"median step": "", "FLOPs": "", "peak memory": "", "n": "0"},
        ],
    )
]


def test_the_console_shows_text_as_it_is_a_row_a_line_where_there_is_no_terminal(capsys):
    show(SECTIONS, ["predict_accuracy [is] *nan*"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == ["Note: predict_accuracy [is] *nan*", ""] and lines[2] == "T_1"
    assert "method chosen mean (range) difference [95 %] wins / losses n" in lines
    assert "[bold]A_b[/bold] | *c* 0.5881 (0.5242 to 0.6974) 3" in lines
    assert "LSAM, top 2 (the paper's rule) rho=0.1 missing +0.0319 [-0.2719, +0.3358] 1 / 2 0" in lines
    # Costs are a table of their own; what is empty has no column.
    assert "method training time" in lines and "LSAM, top 2 (the paper's rule) 1.24x" in lines


def test_the_tables_fit_into_the_terminal_and_break_no_number(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for name, value in {"COLUMNS": "60", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    show(SECTIONS, [])
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, out.splitlines())) <= 60
    words = {word for line in out.splitlines() for word in line.split()}
    assert {"0.5881", "(0.5242", "0.6974)", "+0.0319", "[-0.2719,", "+0.3358]", "1.24x"} <= words


class Page(HTMLParser):
    """Every tag and what it refers to."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.references, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("href", "xlink:href", "src")]

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_takes_names_for_text(config, tmp_path):
    name = "<script>alert(1)</script> $x^ | & _y_"
    assert compare.main([str(config(methods={"A": {"value": 1}, name: {"value": 2}}))]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 2 and page.tags.count("table") == 1
    assert not {"script", "link", "img", "iframe", "image"} & set(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    assert not re.search(r"url\((?!#)|@import|<!ENTITY", text)
    assert text.lower().count("<!doctype") == 1 and "<?xml" not in text
    assert name in page.text
    row = next(line for line in (tmp_path / "out" / "report.md").read_text().splitlines() if "script" in line)
    assert (
        row.startswith(r"| \<script>alert(1)\</script> $x^ \| & \_y\_ |") and len(re.findall(r"(?<!\\)\|", row)) == 10
    )
