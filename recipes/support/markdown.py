"""Tables in Markdown."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

# Characters with a meaning in Markdown. Underscores count except within words, and brackets only in links.
_MARKUP = re.compile(r"[\\|*`<~]|(?<![^\W_])_|_(?![^\W_])|\](?=\()")


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format `rows`, dictionaries with the same keys, as a table with the keys as header. Cells are escaped."""
    lines = [{escape(name): escape(str(value)) for name, value in row.items()} for row in rows]
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def escape(text: str) -> str:
    """Put `text` on one line, and escape Markdown markup. `eval_loss` and `[0, 1]` need no escaping."""
    return " ".join(_MARKUP.sub(r"\\\g<0>", text).split())
