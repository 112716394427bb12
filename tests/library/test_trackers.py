"""The `lsam/` figures reach the trackers that `report_to` names."""

import json
import os
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import Examples, arguments, bert, training_lines

from hf_lsam import LSAMConfig, LSAMTrainer

FIGURES = ("grad_norm", "captured", "perturbation_norm", "first_block", "overhead", "active", "skipped")


def trained(folder, tracker, **options):
    trainer = LSAMTrainer(
        model=bert(),
        args=arguments(folder, report_to=tracker, logging_steps=2, **options),
        train_dataset=Examples(16),
        lsam_config=LSAMConfig(rho=0.3),
    )
    trainer.train()
    return training_lines(trainer)


def test_tensorboard_shows_every_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    lines = trained(tmp_path, "tensorboard")
    assert len(lines) == 2
    (folder,) = {path.parent for path in tmp_path.rglob("events.out*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    for figure in FIGURES:
        shown = [(event.step, event.value) for event in events.Scalars(f"train/lsam/{figure}")]
        assert [step for step, _ in shown] == [2, 4]
        assert [value for _, value in shown] == pytest.approx([line[f"lsam/{figure}"] for line in lines])


TRACKIO = """
import json, sys
import trackio.sqlite_storage
from older import NO_SPACE
from test_trackers import trained

lines = trained(sys.argv[1], "trackio", project="tiny", run_name="one", **NO_SPACE)
logs = trackio.sqlite_storage.SQLiteStorage.get_logs("tiny", "one")
print(json.dumps([lines, logs]))
"""


def test_trackio_shows_every_figure(tmp_path):
    """In a process of its own: trackio reads its folder when it is imported. No network, no server."""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO, tmp_path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines, logs = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    shown = [log for log in logs if "train/loss" in log]
    assert len(shown) == len(lines) == 2
    for log, line in zip(shown, lines, strict=True):
        assert {figure: log[f"train/lsam/{figure}"] for figure in FIGURES} == {
            figure: line[f"lsam/{figure}"] for figure in FIGURES
        }
