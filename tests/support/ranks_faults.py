"""
Run by test_ended.py as `ranks_faults.py FOLDER`: trainings whose process, or whose disk, comes to an end.

Every process is a fork of this one, so that libraries are imported once. Writes `reports.json` to the folder: how each
process ended, and with which error.
"""

import gc
import json
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from tiny import Examples, arguments, bert, weights
from transformers import TrainerCallback

import hf_lsam.trainer
from hf_lsam import LSAMConfig, LSAMTrainer

TWO_PASSES = LSAMConfig(rho=0.3)
# Every weight has a gradient in its state.
ONE_PASS = LSAMConfig(rho=0.3, block_selection="all", ascent_gradient="previous")
SECONDS = 90


class StepBegins(TrainerCallback):
    """Keeps the weights that each step begins with."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights = weights(model)


class Doomed(LSAMTrainer):
    """Calls `end` in pass 2 of step 3, or where `place` names what is written after step 4."""

    def __init__(self, *args, end=None, place=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.end, self.place, self.begins = end, place, StepBegins()
        self.add_callback(self.begins)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.end and self.place == "pass 2" and self.state.global_step == 3 and self.moved():
            self.end()
        return loss

    def moved(self):
        now = weights(self.accelerator.unwrap_model(self.model_wrapped))
        names = [name.removeprefix("module.") for name in self.begins.weights]
        return any(not torch.equal(now[n], old) for n, old in zip(names, self.begins.weights.values(), strict=True))

    def reach(self, place):
        if place == self.place and self.state.global_step == 4:
            self.end()

    def save_model(self, *args, **kwargs):
        self.reach("model.safetensors")
        super().save_model(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir):
        self.reach("optimizer.pt")
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir):
        self.reach("rng_state.pth")
        super()._save_rng_state(output_dir)

    def log(self, *args, **kwargs):
        self.reach("lsam_blocks.jsonl")
        super().log(*args, **kwargs)
        disk_ends(resource.RLIM_INFINITY)


def train(report, folder, config=ONE_PASS, end=None, place=None, resume=None, rank=0, **options):
    """Train, and write down how it ended."""
    trainer = Doomed(
        model=bert(dropout=0.1),
        args=arguments(
            folder, **{"max_steps": 6, "logging_steps": 2, "save_strategy": "steps", "save_steps": 2} | options
        ),
        train_dataset=Examples(48),
        lsam_config=config,
        end=end if rank == 1 or "RANK" not in os.environ else None,
        place=place,
    )
    if place == "lsam_state.safetensors":
        save_state = hf_lsam.trainer.save_state

        def reached(step, output_dir, global_step, *args):
            trainer.reach(place)
            save_state(step, output_dir, global_step, *args)

        hf_lsam.trainer.save_state = reached
    error = None
    try:
        trainer.train(resume_from_checkpoint=resume)
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
    disk_ends(resource.RLIM_INFINITY)
    at = trainer.state.global_step
    json.dump({"error": error, "step": at, "moved": trainer.moved() if at == 3 else None}, report)
    return error


def disk_ends(size=64):
    """From here on no file may be longer: `OSError`, as where the disk is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def nobody():
    """The superuser writes wherever he likes; another user does not."""
    if os.getuid() == 0:
        os.setuid(65534)


def fork(path, prepare, *args, **options) -> int:
    """Train in a process of its own, after `prepare`, which may take away the right to open its report."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with open(path, "w", encoding="utf-8") as report:
                prepare()
                status = int(train(report, *args, **options) is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def ended(pid: int) -> int | str:
    """How a process ended, or "hangs"."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if (waited := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(waited[1])
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"


def alone(name: str, prepare=lambda: None, folder=None, **options) -> dict:
    """One process."""
    report = WHERE / f"{name}.json"
    status = ended(fork(report, prepare, folder or WHERE / name, **options))
    return {"status": status} | json.loads(report.read_text() or "{}")


def together(name: str, end, **options) -> list[dict]:
    """Two processes, of which the second comes to its end; the first is waited for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids, reports = [], [WHERE / f"{name}.{rank}.json" for rank in range(2)]
    for rank, report in enumerate(reports):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}

        def prepare(place=place):
            os.environ.update(place)

        options = {"config": TWO_PASSES, "place": "pass 2", "per_device_train_batch_size": 2} | options
        pids.append(fork(report, prepare, WHERE / name, end=end, rank=rank, **options))
    return [
        {"status": status} | json.loads(report.read_text() or "{}")
        for status, report in zip(map(ended, pids), reports, strict=True)
    ]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def leave():
    raise SystemExit("of the second process only")


def main():
    reports: dict = {"whole": alone("whole"), "plain": alone("plain", config=TWO_PASSES)}
    for name in ("model.safetensors", "optimizer.pt", "lsam_state.safetensors", "rng_state.pth", "lsam_blocks.jsonl"):
        reports[f"disk full at {name}"] = alone(f"disk full at {name}", end=disk_ends, place=name)
    shutil.copytree(WHERE / "disk full at lsam_state.safetensors", WHERE / "resumed")
    shutil.rmtree(WHERE / "resumed" / "checkpoint-4")
    reports["resumed"] = alone("resumed", resume=True)
    reports["terminated"] = alone("terminated", config=TWO_PASSES, end=terminate, place="pass 2")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        reports["read-only"] = alone("read-only", nobody, folder)
        reports["read-only, unsaved"] = alone("read-only, unsaved", nobody, folder, save_strategy="no")
        Path(folder).chmod(0o755)
    reports["killed"] = together("killed", kill)
    reports["leaves"] = together("leaves", leave)
    (WHERE / "reports.json").write_text(json.dumps(reports, indent=1))


if __name__ == "__main__":
    # The Trainer collects garbage at the start of each training; what was imported need not be looked through.
    gc.freeze()
    torch.set_num_threads(1)
    WHERE = Path(sys.argv[1])
    main()
