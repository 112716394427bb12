"""Processes that come to an end, and disks: the others end too, and the checkpoints from before resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_faults
import torch
from packaging import version

WORKER = Path(ranks_faults.__file__)


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Path, dict]:
    """The folder of the trainings that came to an end, and how they did, all of them in one launch."""
    folder = tmp_path_factory.mktemp("ended")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, WORKER, folder], capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "log.txt").write_text(done.stderr)
    return folder, json.loads((folder / "reports.json").read_text())


def files(checkpoint: Path) -> dict[str, bytes]:
    """The content of each file of a checkpoint but those that name its folder."""
    own = ("training_args.bin", "trainer_state.json")
    return {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name not in own}


@pytest.mark.parametrize("fault", ["killed", "leaves"])
def test_where_one_rank_ends_in_pass_2_the_other_ends_with_an_error(fault, ended):
    """With its weights put back, and the checkpoint from before as it was."""
    folder, reports = ended
    first, second = reports[fault]
    assert second["status"] == (-9 if fault == "killed" else 1)
    assert first["status"] == 1 and first["step"] == 3 and first["moved"] is False
    # In the words of gloo; that of older torch does not say where to look.
    assert "peer" in first["error"]
    if version.parse(torch.__version__) >= version.parse("2.13"):
        assert "Check the logs of the remote worker" in first["error"]
    assert {"model.safetensors", "rng_state_0.pth", "rng_state_1.pth"} < files(folder / fault / "checkpoint-2").keys()
    assert not (folder / fault / "checkpoint-4").exists()


def test_sigterm_at_moved_weights_ends_the_run_and_leaves_the_last_checkpoint(ended):
    folder, reports = ended
    assert reports["plain"]["status"] == 0 and reports["terminated"]["status"] == -15
    assert files(folder / "terminated" / "checkpoint-2") == files(folder / "plain" / "checkpoint-2")
    assert not (folder / "terminated" / "checkpoint-4").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "lsam_state.safetensors", "rng_state.pth"])
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(name, ended):
    """No file is longer than 64 bytes from that one on. The one that could not be finished does not resume."""
    folder, reports = ended
    report, part = reports[f"disk full at {name}"], folder / f"disk full at {name}"
    assert report["status"] == 1 and report["step"] == 4 and report["error"]
    assert files(part / "checkpoint-2") == files(folder / "whole" / "checkpoint-2")
    assert not (part / "checkpoint-4" / "trainer_state.json").exists()
    assert not list(part.rglob("*.draft"))
    if name == "lsam_state.safetensors":
        assert "lsam_state.safetensors could not be written" in report["error"] and "File too large" in report["error"]
        assert (
            "Check disk space and write access" in report["error"] and "resume from the one before" in report["error"]
        )


def test_a_run_goes_on_from_the_checkpoint_before_once_there_is_room(ended):
    folder, reports = ended
    assert reports["resumed"] == {"status": 0, "error": None, "step": 6, "moved": None}
    for step in (4, 6):
        assert files(folder / "resumed" / f"checkpoint-{step}") == files(folder / "whole" / f"checkpoint-{step}")


def test_rows_that_cannot_be_written_do_not_end_the_run(ended):
    folder, reports = ended
    for name in ("disk full at lsam_blocks.jsonl", "read-only, unsaved"):
        assert reports[name] == {"status": 0, "error": None, "step": 6, "moved": None}
    part = folder / "disk full at lsam_blocks.jsonl"
    assert files(part / "checkpoint-6") == files(folder / "whole" / "checkpoint-6")
    log = (folder / "log.txt").read_text()
    assert log.count("lsam_blocks.jsonl cannot be written ([Errno 13] Permission denied") == 2
    assert log.count("Training continues, and the file will lack rows.") == 3


def test_an_output_directory_that_is_read_only_ends_the_run_at_its_first_checkpoint(ended):
    """The Trainer's own message names the file."""
    report = ended[1]["read-only"]
    assert report["status"] == 1 and report["step"] == 2
    assert "ermission denied" in report["error"] and "checkpoint-2" in report["error"]
