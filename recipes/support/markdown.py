"""Tables in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each of `rows`, under their names. Every cell is shown as it is, whatever is in it."""
    lines = [{escape(name): escape(str(value)) for name, value in row.items()} for row in rows]
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def escape(text: str) -> str:
    """`text` on one line, without a character that Markdown takes for markup."""
    # Of brackets, those of a link; an interval stays readable.
    for mark in ("\\", "|", "*", "_", "`", "<", "~", "]("):
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
