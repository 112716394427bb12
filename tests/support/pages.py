"""README.md, the pages of docs/, and the examples in them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language, without the indentation that they have in lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def pages_with(language: str) -> list:
    """The pages that have such blocks, as parameters of a test."""
    with_blocks = [page for page in PAGES if blocks(page.read_text(), language)]
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in with_blocks]
