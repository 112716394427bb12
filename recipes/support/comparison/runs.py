"""The runs of `compare.py`: starts, watches, stops and resumes them, and writes their results."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from hf_lsam_recipes.support.comparison.plan import CompareError, Comparison, Run
from hf_lsam_recipes.support.json_files import read_json, write_json

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
# Seconds between polls of the running processes, and between the signal to stop and the kill.
POLL_INTERVAL, GRACE_PERIOD = 0.1, 10.0


@dataclass
class Running:
    """A run whose process is running; `log` holds the lock on its folder."""

    run: Run
    process: subprocess.Popen
    log: IO[str]
    resumed: bool
    start: float


def run_all(
    runs: Sequence[Run], comparison: Comparison, stamp: dict[str, Any], on_end: Callable[[Run, str | None], None]
) -> None:
    """
    Run each of `runs` that has no result, `comparison.processes` at a time.

    Args:
        runs (`list[Run]`): In the order in which they start.
        comparison (`Comparison`): How to run them.
        stamp (`dict`): Commit, versions and machine, written into every result.
        on_end (`Callable`): Called with each run that has ended, and with its problem or `None`.
    """
    waiting, active = deque(runs), list[Running]()
    try:
        while waiting or active:
            while waiting and len(active) < comparison.processes:
                run = waiting.popleft()
                try:
                    started = start(run, comparison)
                except CompareError as error:
                    on_end(run, str(error))
                else:
                    if started is not None:
                        active.append(started)
                    else:
                        on_end(run, None)
            for running in [running for running in active if running.process.poll() is not None]:
                active.remove(running)
                with running.log:
                    problem = finish(running, comparison, stamp)
                on_end(running.run, problem)
            time.sleep(POLL_INTERVAL)
    finally:
        stop(active)


def start(run: Run, comparison: Comparison) -> Running | None:
    """
    Start the process of a run. It resumes from the last checkpoint if there is one with the same settings.

    The process inherits the lock on the log, so that a run is not started twice if its `compare.py` was killed.

    Returns:
        `Running` or `None`: The running process; `None` if the run has a result by now.

    Raises:
        CompareError: if another process of this run is still running, or if its result has other settings.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    log = (run.folder / "log.txt").open("a", encoding="utf-8")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        log.close()
        raise CompareError(
            f"{run.name}: its process is still running, started by another compare.py or by one that was killed. Wait "
            "for it or end it, then call compare.py again."
        ) from error
    try:
        finished = run.result() is not None
    except CompareError:
        log.close()
        raise
    if finished:
        log.close()
        return None
    model, settings_file = run.folder / "model", run.folder / "settings.yaml"
    # `recipe` is not a setting of the recipe: it distinguishes results of different recipes.
    settings = {name: value for name, value in run.settings.items() if name != "recipe"}
    settings["output_dir"] = str(model)
    same = settings_file.exists() and yaml.safe_load(settings_file.read_text(encoding="utf-8")) == settings
    resumed = same and remove_incomplete_checkpoints(model)
    if not resumed:
        shutil.rmtree(model, ignore_errors=True)
        log.truncate(0)
    settings_file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    threads = {name: str(comparison.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    process = subprocess.Popen(
        [sys.executable, str(comparison.recipe), str(settings_file)] + ["--resume_from_checkpoint", "true"] * resumed,
        env=os.environ | threads | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        # A separate group, so that all of its processes are stopped with it.
        start_new_session=True,
    )
    return Running(run, process, log, resumed, time.perf_counter())


def remove_incomplete_checkpoints(model: Path) -> bool:
    """Remove the incomplete checkpoints of a killed run; returns whether a complete one remains."""
    left = False
    for checkpoint in model.glob("checkpoint-*"):
        try:
            # The Trainer writes this file last.
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            left = True
        except (OSError, json.JSONDecodeError):
            shutil.rmtree(checkpoint)
    return left


def finish(running: Running, comparison: Comparison, stamp: dict[str, Any]) -> str | None:
    """Write the result of a run whose process has ended; returns the problem or `None`."""
    run, seconds = running.run, time.perf_counter() - running.start
    log = run.folder / "log.txt"
    if running.process.returncode != 0:
        ending = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        return f"{run.name} failed (exit code {running.process.returncode}):\n{ending}\nThe full output is in {log}."
    model = run.folder / "model"
    metrics = read_json(model / "all_results.json") or {}
    task = next(task for task in comparison.tasks if task.name == run.task)
    metric = task.tuning_metric if run.tuning else task.metric
    if metric not in metrics:
        return (
            f"{run.name}: its all_results.json has no {metric}, but {', '.join(metrics) or 'nothing'}. Set the metric "
            "of the task to one of them, or set do_eval or do_predict if the metric needs it."
        )
    state = read_json(model / "trainer_state.json") or {}
    history = state.get("log_history", [])
    # Evaluations and measurements during training do not count as training time.
    excluded = sum(line.get(name, 0.0) for line in history for name in ("eval_runtime", "sharpness/seconds"))
    blocks = model / "lsam_blocks.jsonl"
    rows = blocks.read_text(encoding="utf-8").splitlines() if blocks.exists() else []
    result = {
        "task": run.task,
        "method": run.method,
        "seed": run.seed,
        "chosen": run.chosen,
        "tuning": run.tuning,
        "digest": run.digest,
        "settings": run.settings,
        **{name: value for name, value in stamp.items() if name != "seeds"},
        "processes": comparison.processes,
        "threads": comparison.threads,
        "resumed": running.resumed,
        "metrics": metrics,
        # For a resumed run, the Trainer only measures the time since it was resumed.
        "training_seconds": None if running.resumed else _subtract(metrics.get("train_runtime"), excluded),
        "wall_seconds": None if running.resumed else seconds,
        "step_seconds": metrics.get("train_step_seconds"),
        "flops": state.get("total_flos"),
        "peak_memory_mib": metrics.get("train_peak_memory_mib"),
        "curve": history,
        "blocks": [json.loads(row) for row in rows],
        "landscapes": read_json(model / "landscapes.json"),
    }
    write_json(run.folder / "result.json", result)
    if not comparison.keep_models:
        for path in [path for pattern in WEIGHTS for path in model.glob(pattern)]:
            path.unlink()
        for checkpoint in model.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return None


def stop(active: Sequence[Running]) -> None:
    """End the processes, and those that they started; checkpoints are kept."""
    for running in active:
        _signal(running, signal.SIGTERM)
    deadline = time.perf_counter() + GRACE_PERIOD
    for running in active:
        try:
            running.process.wait(max(0.0, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            _signal(running, signal.SIGKILL)
            running.process.wait()
        running.log.close()


def _signal(running: Running, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.process.pid, number)


def _subtract(seconds: float | None, part: float) -> float | None:
    return None if seconds is None else seconds - part
