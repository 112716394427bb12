"""What a model card holds, as a Markdown parser reads it."""

import json
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def body_of(card: str) -> str:
    """The card without its YAML header."""
    return card.removeprefix("---\n").split("\n---\n", 1)[1]


def tables_of(card: str) -> list[dict[str, Any]]:
    """The tables of a card: names and values, these as JSON reads them where it can."""
    tables: list[list[str]] = []
    for token, previous in zip((tokens := PARSER.parse(body_of(card)))[1:], tokens, strict=False):
        if token.type == "table_open":
            tables.append([])
        elif previous.type == "td_open":
            tables[-1].append("".join(child.content for child in token.children or ()))
    return [dict(zip(cells[::2], map(parsed, cells[1::2]), strict=True)) for cells in tables]


def parsed(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def outline(text: str) -> list[str]:
    """The elements of a text, without what they say: two texts of the same form have the same."""

    def kinds(tokens: list[Token]) -> list[str]:
        return [kind for token in tokens for kind in (token.type, *kinds(token.children or []))]

    return kinds(PARSER.parse(text))


def code_of(card: str) -> str:
    """The code of the usage section."""
    return next(token.content for token in PARSER.parse(body_of(card)) if token.info == "python")


def tables_in(folder: Path) -> list[dict[str, Any]]:
    """Those of the card in a folder: of training, of layer-wise SAM, and of the metrics."""
    return tables_of((folder / "README.md").read_text())
