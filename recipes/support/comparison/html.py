"""The report of `compare.py` as a page: tables and pictures in one self-contained file."""

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment
from matplotlib.figure import Figure

from hf_lsam_recipes.support.comparison.plan import Comparison, Task
from hf_lsam_recipes.support.comparison.statistics import TEXTS, Row
from hf_lsam_recipes.support.figures.palette import style

# Values are escaped; pictures are SVG elements of our own.
PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Comparison</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
.table { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid #ddd }
td { white-space: nowrap }
th.text, td.text { text-align: left; white-space: normal; min-width: 7rem }
.note { background: #fff4d6; padding: .5rem 1rem }
.panels { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1rem; margin-top: 1rem }
.panels svg { max-width: 100%; height: auto }
</style>
</head>
<body>
{% macro kind(name) %}{% if name in texts %} class="text"{% endif %}{% endmacro %}
<h1>Comparison</h1>
{% for note in notes %}
<p class="note">{{ note }}</p>
{% endfor %}
{% for (title, caption, rows), panels in sections %}
<h2>{{ title }}</h2>
<p>{{ caption }}</p>
<div class="table">
<table>
<tr>{% for name in rows[0] %}<th{{ kind(name) }}>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for name, cell in row.items() %}<td{{ kind(name) }}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
</div>
{% if panels %}
<div class="panels">
{% for panel in panels %}
{{ panel | safe }}
{% endfor %}
</div>
{% endif %}
{% endfor %}
</body>
</html>
""")

# Inches of a panel, and characters of a line in it. Two panels are as wide as the page, and one is legible on a phone.
WIDTH = 5.0
NAME, LABEL = 20, 40


def page(
    sections: Sequence[tuple[str, str, list[dict[str, str]]]],
    panels: Sequence[Sequence[str]],
    notes: Sequence[str],
) -> str:
    """
    The whole page.

    Args:
        sections (`list[tuple]`): For each task its name, a caption, and the rows of its table.
        panels (`list[list[str]]`): For each task its pictures, SVG elements.
        notes (`list[str]`): Caveats for the reader.
    """
    return PAGE.render(sections=list(zip(sections, panels, strict=True)), notes=notes, texts=TEXTS) + "\n"


def draw_panels(
    comparison: Comparison, task: Task, rows: Sequence[Row], results: Sequence[dict[str, Any]]
) -> list[str]:
    """
    The differences to the baseline, seed by seed, and the validation curves, each as an SVG element.

    A panel without anything to show is left out: the differences where no method has one, and the curves of runs that
    were not evaluated during training.
    """
    figures = {"differences": _differences(comparison, task, rows), "curves": _curves(comparison, task, results)}
    return [_svg(figure, f"{task.name} {name}") for name, figure in figures.items() if figure is not None]


def _svg(figure: Figure, salt: str) -> str:
    """The SVG element of a figure; `salt` keeps the ids that it refers to apart from those of other figures."""
    file = io.StringIO()
    # Without a date and random ids, the same results give the same page.
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _differences(comparison: Comparison, task: Task, rows: Sequence[Row]) -> Figure | None:
    """A row for each method that has a difference, in the style of the method's curve."""
    shown = [(index, row) for index, row in enumerate(rows) if any(map(math.isfinite, row.differences.values()))]
    if not shown:
        return None
    names = [textwrap.fill(row.method, NAME) for _, row in shown]
    figure = Figure(figsize=(WIDTH, 1.3 + len(shown) * (0.2 + _text_height(names))), layout="constrained")
    axes = figure.subplots()
    for place, (index, row) in enumerate(shown):
        colour, difference = style(index)["color"], row.difference
        axes.plot(list(row.differences.values()), [place] * len(row.differences), "o", c=colour, ms=4, alpha=0.5)
        if difference is not None:
            axes.plot(difference.mean, place, "D", c=colour)
            if difference.ends is not None:
                axes.plot(difference.ends, [place, place], c=colour, lw=1.8)
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axes.locator_params(axis="x", nbins=5)
    axes.set_yticks(range(len(shown)), names, parse_math=False)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    label = f"{task.metric} minus that of {comparison.baseline}"
    axes.set_xlabel(textwrap.fill(label, LABEL), parse_math=False)
    axes.set_title("Seeds, mean and 95 % interval", fontsize=11)
    return figure


def _curves(comparison: Comparison, task: Task, results: Sequence[dict[str, Any]]) -> Figure | None:
    """The mean over the seeds at each step of evaluation that all of them have, of each method that has one."""
    name = task.tuning_metric or "eval_" + task.metric.partition("_")[2]
    curves = {}
    for index, method in enumerate(comparison.methods):
        runs = [
            {line["step"]: line[name] for line in result["curve"] if name in line}
            for result in results
            if (result["task"], result["method"]) == (task.name, method.name)
        ]
        steps = sorted(set.intersection(*map(set, runs))) if runs else []
        means = [np.mean([run[step] for run in runs]) for step in steps]
        if np.isfinite(means).any():
            curves[index] = steps, means
    if not curves:
        return None
    # A label that begins with an underscore would stay out of the legend.
    names = [textwrap.indent(textwrap.fill(comparison.methods[index].name, NAME), " ") for index in curves]
    legend_height = math.ceil(len(names) / 2) * (0.05 + _text_height(names))
    figure = Figure(figsize=(WIDTH, 3.0 + legend_height), layout="constrained")
    axes = figure.subplots()
    for (index, (steps, means)), label in zip(curves.items(), names, strict=True):
        axes.plot(steps, means, label=label, **style(index) | {"marker": "."})
    axes.locator_params(nbins=6)
    axes.set_xlabel("optimizer step")
    axes.set_title(textwrap.fill(f"{name} during training", LABEL), fontsize=11, parse_math=False)
    for text in figure.legend(loc="outside lower center", ncols=2, fontsize=9).get_texts():
        text.set_parse_math(False)
    return figure


def _text_height(texts: Sequence[str]) -> float:
    """Inches of the tallest of `texts`."""
    return 0.17 * max(text.count("\n") + 1 for text in texts)
