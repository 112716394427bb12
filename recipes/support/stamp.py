"""What figures were made with: every file of results carries it. As a script, it prints it."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "numpy")


def stamp(seeds: Sequence[int]) -> dict[str, Any]:
    """The seeds, the commit, the versions and the machine."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPUs"
    return {
        "seeds": list(seeds),
        "commit": commit,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
        "machine": f"{platform.system()} {platform.machine()}, {device}",
    }


if __name__ == "__main__":
    print(json.dumps(stamp(())))
