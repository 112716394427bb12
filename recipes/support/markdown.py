"""Tables in Markdown."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

# Underscores but for those within words, and of brackets those of links.
_MARKUP = re.compile(r"[\\|*`<~]|(?<![^\W_])_|_(?![^\W_])|\](?=\()")


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each of `rows`, under their names. Every cell is shown as it is, whatever is in it."""
    lines = [{escape(name): escape(str(value)) for name, value in row.items()} for row in rows]
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def escape(text: str) -> str:
    """`text` on one line, without a character that Markdown takes for markup. `eval_loss` and `[0, 1]` stay."""
    return " ".join(_MARKUP.sub(r"\\\g<0>", text).split())
