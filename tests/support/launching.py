"""Several processes of one program, launched by torchrun."""

import os
import subprocess
import sys
from pathlib import Path


def launch(script: str, folder: Path, processes: int = 2, timeout: int = 300, **environment: str) -> None:
    """Run `script FOLDER` in all processes, and wait until they have come to a good end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    result = subprocess.run(
        [*command, script, str(folder)],
        capture_output=True,
        text=True,
        timeout=timeout,
        # The script finds what the tests find: `pythonpath` of pyproject.toml, and each test's own folder.
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
