"""JSON result files, which are written completely or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def check_output_file(setting: str, path: str | Path | None) -> None:
    """Raise `ValueError` if `path`, the value of `setting`, is not `None` and no file can be written there."""
    if path is None:
        return
    folder = Path(path).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(
            f"{setting}={path}: {folder} is not a folder that can be written to. Create it, or name another."
        )
    if Path(path).is_dir():
        raise ValueError(f"{setting}={path} is a folder: name a file in it.")


def read_json(path: Path) -> Any:
    """Read the JSON file `path`; `None` if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as JSON, replacing the file only when everything is written."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
