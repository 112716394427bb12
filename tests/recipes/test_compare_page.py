"""What the page and the tables of a comparison show, and what they leave out because it would be empty."""

import re
from html.parser import HTMLParser

import pytest

from hf_lsam_recipes import compare
from hf_lsam_recipes.support.comparison.console import show

pytest_plugins = ["compare_fixtures"]

COSTS = ["training time", "median step", "FLOPs", "peak memory"]
DIFFERENCES, CURVES = "Seeds, mean and 95 % interval", "eval_accuracy during training"


class Page(HTMLParser):
    """The texts of each picture, which matplotlib writes as comments, and the cells of each table with their class."""

    def __init__(self, text: str):
        super().__init__()
        self.pictures: list[list[str]] = []
        self.rows: list[list[tuple[str, str | None]]] = []
        self.open: str | None = None
        self.kind: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "svg":
            self.pictures.append([])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append(("", dict(attrs).get("class")))
            self.open = tag

    def handle_endtag(self, tag):
        if tag == self.open:
            self.open = None

    def handle_data(self, data):
        if self.open:
            text, kind = self.rows[-1][-1]
            self.rows[-1][-1] = text + data, kind

    def handle_comment(self, data):
        self.pictures[-1].append(" ".join(data.split()))


@pytest.fixture
def report(config, tmp_path, capsys):
    """Runs a comparison and returns its page, the titles of the columns in Markdown, and what the console got."""

    def run(**changes) -> tuple[Page, list[str], str]:
        compare.main([str(config(**changes))])
        markdown = (tmp_path / "out" / "report.md").read_text()
        titles = next(line for line in markdown.splitlines() if line.startswith("| method"))
        page = Page((tmp_path / "out" / "report.html").read_text())
        return page, [title.strip() for title in titles.split("|")[1:-1]], capsys.readouterr().out

    return run


def replace_in_recipe(tmp_path, old: str, new: str) -> None:
    recipe = tmp_path / "recipe.py"
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))


def test_each_panel_is_a_picture_and_the_baseline_has_no_row_of_differences(report):
    page, _, _ = report(methods={"C": {"value": 2}, "A": {"value": 1}, "B": {"value": 3}}, baseline="A")
    differences, curves = page.pictures
    assert [text for text in differences if text in "ABC"] == ["C", "B"]
    assert DIFFERENCES in differences and "predict_accuracy minus that of A" in differences
    # All methods have a curve.
    assert [text for text in curves if text in "ABC"] == ["C", "A", "B"] and CURVES in curves


@pytest.mark.parametrize("logged", ["", '"eval_accuracy": float("nan"), '])
def test_there_is_no_panel_of_curves_without_an_evaluation_during_training(report, tmp_path, logged):
    replace_in_recipe(tmp_path, '{"step": 2, "eval_accuracy": value / 10, ', '{"step": 2, ' + logged)
    page, _, _ = report()
    [differences] = page.pictures
    assert DIFFERENCES in differences and CURVES not in differences


def test_a_method_without_an_evaluation_is_not_in_the_legend(report, tmp_path):
    replace_in_recipe(tmp_path, '"eval_accuracy": value / 10,', '"eval_accuracy" if value < 3 else "x": value / 10,')
    _, curves = report()[0].pictures
    assert [text for text in curves if text in "AB"] == ["A"]


def test_there_is_no_panel_of_differences_where_no_method_has_one(report):
    page, titles, _ = report(methods={"A": {"value": 1}})
    [curves] = page.pictures
    assert CURVES in curves
    assert titles == ["method", "mean (range)", *COSTS, "n"]


def test_a_method_without_a_run_has_no_row_of_differences(report):
    page, _, _ = report(methods={"A": {"value": 1}, "bad": {"value": 13}, "B": {"value": 3}})
    assert [[text for text in picture if text in ("A", "bad", "B")] for picture in page.pictures] == [
        ["B"],
        ["A", "B"],
    ]


def test_where_nothing_was_tuned_no_column_says_so(report):
    page, titles, out = report()
    assert titles == ["method", "mean (range)", "difference [95 %]", "wins / losses", *COSTS, "n"]
    assert [text for text, _ in page.rows[0]] == titles
    assert "chosen" not in out and "tried" not in out


def test_where_a_method_was_tuned_both_columns_are_there(report):
    methods = {"A": {"value": 1}, "B": {"grid": {"value": [1, 3]}}}
    page, titles, out = report(methods=methods, tuning_seeds=[7])
    assert titles[:4] == ["method", "chosen", "tried", "mean (range)"]
    assert [[text for text, _ in row[:3]] for row in page.rows] == [
        titles[:3],
        ["A", "", "1"],
        ["B", "value=1", "2"],
    ]
    assert re.search(r"method +chosen +mean", out) and "value=1" in out


def test_a_grid_of_one_value_shows_it_though_there_was_no_choice(report):
    _, titles, _ = report(methods={"A": {"value": 1}, "B": {"grid": {"value": [3]}}})
    assert titles[:3] == ["method", "chosen", "mean (range)"]


def test_one_seed_has_neither_a_range_nor_an_interval(report):
    page, _, out = report(seeds=[0])
    assert [[text for text, _ in row[1:3]] for row in page.rows[1:]] == [["0.1000", ""], ["0.3000", "+0.2000"]]
    assert re.search(r"method +mean +difference +wins / losses +n *\n", out)


def test_numbers_are_on_the_right_and_stay_on_one_line(report, tmp_path):
    methods = {"A": {"value": 1}, "B": {"grid": {"value": [1, 3]}}}
    page, titles, _ = report(methods=methods, tuning_seeds=[7])
    for row in page.rows:
        assert [kind for _, kind in row] == ["text", "text", *[None] * (len(titles) - 2)]
    text = (tmp_path / "out" / "report.html").read_text()
    style = " ".join(text[text.index("<style>") : text.index("</style>")].split())
    assert "text-align: right" in re.search(r"th, td {(.*?)}", style)[1]
    assert "td { white-space: nowrap }" in style and ".table { overflow-x: auto }" in style
    assert "flex-wrap: wrap" in re.search(r"\.panels {(.*?)}", style)[1]


def test_pictures_share_no_marker_and_no_clip_path(report, tmp_path):
    """Ids hold for the whole page. Those of glyphs may be the same, as are the glyphs."""
    report()
    text = (tmp_path / "out" / "report.html").read_text()
    pictures = re.findall(r"(?s)<svg.*?</svg>", text)
    ids = [set(re.findall(r"(?:url\(|href=\")#([mp][0-9a-f]{10})\b", picture)) for picture in pictures]
    assert len(ids) == 2 and all(ids) and not set.intersection(*ids)


def test_there_is_no_table_of_costs_that_are_not_known(capsys):
    show([("T", "caption", [{"method": "A", "mean (range)": "0.5", "n": "1"}])], [])
    out = capsys.readouterr().out
    assert out.count("method") == 1 and "0.5" in out
