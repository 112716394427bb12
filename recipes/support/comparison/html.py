"""The report of `compare.py` as a page: tables and pictures in one self-contained file."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_lsam_recipes.support.comparison.plan import Comparison, Task
from hf_lsam_recipes.support.comparison.statistics import Row
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
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #ddd }
.note { background: #fff4d6; padding: .5rem 1rem }
svg { max-width: 100%; height: auto }
</style>
</head>
<body>
<h1>Comparison</h1>
{% for note in notes %}
<p class="note">{{ note }}</p>
{% endfor %}
{% for (title, caption, rows), picture in sections %}
<h2>{{ title }}</h2>
<p>{{ caption }}</p>
<div class="table">
<table>
<tr>{% for name in rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for cell in row.values() %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
</div>
{{ picture | safe }}
{% endfor %}
</body>
</html>
""")


def page(
    sections: Sequence[tuple[str, str, list[dict[str, str]]]], pictures: Sequence[str], notes: Sequence[str]
) -> str:
    """
    The whole page.

    Args:
        sections (`list[tuple]`): For each task its name, a caption, and the rows of its table.
        pictures (`list[str]`): An SVG element for each of them.
        notes (`list[str]`): Caveats for the reader.
    """
    return PAGE.render(sections=list(zip(sections, pictures, strict=True)), notes=notes) + "\n"


def picture(comparison: Comparison, task: Task, rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> str:
    """The differences to the baseline, seed by seed, and the validation curves, as an SVG element."""
    figure = Figure(figsize=(12, 1.6 + 0.4 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2)
    _differences(left, comparison, task, rows)
    _curves(right, comparison, task, results)
    file = io.StringIO()
    # Without a date and random ids, the same results give the same page.
    with matplotlib.rc_context({"svg.hashsalt": task.name}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _differences(axes: Axes, comparison: Comparison, task: Task, rows: Sequence[Row]):
    for index, row in enumerate(rows):
        colour, difference = style(index)["color"], row.difference
        axes.plot(list(row.differences.values()), [index] * len(row.differences), "o", c=colour, ms=4, alpha=0.5)
        if difference is not None:
            axes.plot(difference.mean, index, "D", c=colour)
            if difference.ends is not None:
                axes.plot(difference.ends, [index, index], c=colour, lw=1.8)
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), [row.method for row in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"{task.metric} less that of {comparison.baseline}", parse_math=False)
    axes.set_title("Seeds, mean and 95 % interval", fontsize=11)


def _curves(axes: Axes, comparison: Comparison, task: Task, results: Sequence[dict[str, Any]]):
    """The mean over the seeds at each step of evaluation that all of them have."""
    name = task.tuning_metric or "eval_" + task.metric.partition("_")[2]
    for index, method in enumerate(comparison.methods):
        runs = [
            {line["step"]: line[name] for line in result["curve"] if name in line}
            for result in results
            if (result["task"], result["method"]) == (task.name, method.name)
        ]
        steps = sorted(set.intersection(*map(set, runs))) if runs else []
        means = [np.mean([run[step] for run in runs]) for step in steps]
        # A label that begins with an underscore would stay out of the legend.
        axes.plot(steps, means, label=f" {method.name}", **style(index) | {"marker": "."})
    axes.set_xlabel("optimizer step")
    axes.set_title(f"{name} during training", fontsize=11, parse_math=False)
    for text in axes.legend(fontsize=8).get_texts():
        text.set_parse_math(False)
