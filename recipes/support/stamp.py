"""The provenance of results: seeds, commit, versions and machine. As a script, it prints them as JSON."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import hf_lsam

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "numpy")


def stamp(seeds: Sequence[int]) -> dict[str, Any]:
    """The provenance of results that were computed with `seeds`: also `commit`, `versions` and `machine`."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPUs"
    return {
        "seeds": list(seeds),
        "commit": find_commit(Path(__file__).resolve().parents[2]),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
        "machine": f"{platform.system()} {platform.machine()}, {device}",
    }


def find_commit(folder: Path) -> str:
    """The commit if `folder` is a clone, else the version: an installed package may be inside another repository."""
    if not (folder / "pyproject.toml").exists():
        return f"hf-lsam {hf_lsam.__version__}"
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    print(json.dumps(stamp(())))
