"""Checks of the files that a user names: whether they exist, and whether their text is UTF-8."""

import codecs
import os
from pathlib import Path

from hf_lsam_recipes.support.shipped import did_you_mean

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def check_utf8(path: Path) -> None:
    """Raise `ValueError` if the file is not UTF-8; the message says where, and how to convert it."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if wrong := _wrong_with(line, number):
                reason, name = wrong
                raise ValueError(
                    f"{path} is not UTF-8: {reason}. Save it as UTF-8, or convert it: iconv -f {name} -t UTF-8 {path} "
                    f"> {path.with_stem(path.stem + '_utf8')}"
                )


def _wrong_with(line: bytes, number: int) -> tuple[str, str] | None:
    """Return why line `number` of a file is not UTF-8, and the likely encoding; `None` if it is."""
    if line.startswith(UTF_16) or b"\0" in line:
        return "it looks like UTF-16, as some editors and spreadsheets save it", "UTF-16"
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return f"line {number} has bytes of another encoding, such as Latin-1 or Windows-1252", "WINDOWS-1252"
    return None


def explain_missing(path: Path) -> str:
    """Explain why `path` is not a file: its first folder that does not exist, or files with similar names."""
    for folder in reversed(path.parents):
        if not folder.is_dir():
            above = folder.parent if str(folder.parent) != "." else Path.cwd()
            return f"there is no folder {folder.name} in {above}.{_near(folder.name, above)}"
    if path.is_dir():
        return "it is a folder."
    return f"there is no such file in {path.parent.resolve()}.{_near(path.name, path.parent)}"


def _near(name: str, folder: Path) -> str:
    return did_you_mean(name, sorted(os.listdir(folder)) if os.access(folder, os.R_OK) else [])
