"""The report of `compare.py` on the console."""

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_lsam_recipes.support.comparison.statistics import COSTS, TEXTS

# Where there is no terminal to fit into, a table is as wide as it needs to be.
_UNLIMITED = 1000


def show(sections: Sequence[tuple[str, str, list[dict[str, str]]]], notes: Sequence[str]) -> None:
    """
    Print two tables a task, of results and of costs, fitted into the terminal.

    Args:
        sections (`list[tuple]`): For each task its name, a caption, and the rows of its table.
        notes (`list[str]`): Caveats for the reader.
    """
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=_UNLIMITED)
    for note in notes:
        console.print(Text(f"Note: {note}", style="yellow"))
    costs = list(COSTS.values())
    for title, caption, rows in sections:
        console.print(Text(f"\n{title}", style="bold"))
        # How many settings were tried is the same for all, or told in a note.
        console.print(_table(rows, [name for name in rows[0] if name not in (*costs, "tried")]))
        if known := [name for name in costs if name in rows[0]]:
            console.print(_table(rows, ["method", *known]))
        console.print(Text(caption, style="dim"))


def _table(rows: Sequence[dict[str, str]], names: Sequence[str]) -> Table:
    """Those of the columns that are not empty; a figure and what stands behind it in brackets have one each."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    columns: list[list[str]] = []
    for name in names:
        cells = [name, *(row[name] for row in rows)]
        if name in TEXTS:
            if any(cells[1:]):
                table.add_column(name, overflow="fold")
                columns.append(cells[1:])
            continue
        split = (
            [cell.partition(" ") for cell in cells]
            if name.endswith((")", "]"))
            else [(cell, "", "") for cell in cells]
        )
        for head, *column in ([part[0] for part in split], [part[2] for part in split]):
            if any(column):
                # No number is broken.
                longest = max(len(word) for cell in (head, *column) for word in cell.split())
                table.add_column(Text(head), justify="right", min_width=longest)
                columns.append(column)
    for line in zip(*columns, strict=True):
        table.add_row(*map(Text, line))
    return table
