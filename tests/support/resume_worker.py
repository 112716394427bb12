"""
Run by test_resume.py as `resume_worker.py FOLDER SEED`: trains in processes that are killed, and resumes them.

Every run is a fork of this process, so that libraries are imported once. Writes `plan.json` to the folder: for each
method what was done at which step, and whether the weights were moved just then.
"""

import gc
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from older import IS_5, RESUMABLE
from tiny import Examples, arguments, bert, weights
from transformers import TrainerCallback

from hf_lsam import LSAMConfig, LSAMTrainer

STEPS, ACCUMULATION = 12, 2
METHODS = {
    "lsam": LSAMConfig(rho=0.3, alpha=0.5),
    "one_pass": LSAMConfig(rho=0.3, ascent_gradient="previous"),
    "looksam": LSAMConfig(rho=0.3, block_selection="all", perturb_interval=3, reuse_correction=0.7),
    "priced": LSAMConfig(rho=0.3, block_selection="all", max_overhead=0.3),  # steps 3, 6 and 9
}


class StepBegins(TrainerCallback):
    """Keeps the weights that each step begins with."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights = weights(model)


class Signalled(LSAMTrainer):
    """
    Sends its own process a signal: in the `call`-th `compute_loss` of a step, or at a named point.

    Args:
        moment: `(signal, step, place)`, where the place is a number of a call, "moved" (the first call of the step at
            moved weights), "update", "model", "optimizer" or "random state": after the update of the step, or while a
            checkpoint is saved, after that file.
        report: File that gets whether the weights were moved.
    """

    def __init__(self, *args, moment=None, report=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.moment, self.report = moment, report
        # An iterator, since a number would be put back after pass 2.
        self.calls = itertools.count(1)
        self.begins = StepBegins()
        self.add_callback(self.begins)
        trainer = self

        class AfterUpdate(TrainerCallback):
            def on_optimizer_step(self, args, state, control, **kwargs):
                trainer.reach("update")

        self.add_callback(AfterUpdate())

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.moment is not None and self.state.global_step == self.moment[1]:
            self.reach(next(self.calls))
            if self.is_moved():
                self.reach("moved")
        return loss

    def is_moved(self):
        now = weights(self.model)
        return any(not torch.equal(now[name], value) for name, value in self.begins.weights.items())

    def save_model(self, *args, **kwargs):
        super().save_model(*args, **kwargs)
        self.reach("model")

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        self.reach("optimizer")

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.reach("random state")

    def reach(self, place):
        if self.moment is None or self.moment[1:] != (self.state.global_step, place):
            return
        self.report.write_text(json.dumps(self.is_moved()))
        os.kill(os.getpid(), self.moment[0])
        if self.moment[0] == signal.SIGTERM:
            manager = next(c.jit_manager for c in self.callback_handler.callbacks if hasattr(c, "jit_manager"))
            while not manager.is_checkpoint_requested:
                time.sleep(0.01)


def train(folder, config, moment, resume, dropout, **options):
    """Train in a fork; returns its wait status and what it reported."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            trainer = Signalled(
                model=bert(dropout=dropout),
                args=arguments(
                    folder,
                    max_steps=STEPS,
                    logging_steps=2,
                    save_strategy="steps",
                    gradient_accumulation_steps=ACCUMULATION,
                    per_device_train_batch_size=2,
                    train_sampling_strategy="random",
                    lr_scheduler_type="linear",
                    **options,
                ),
                train_dataset=Examples(RESUMABLE),
                lsam_config=config,
                moment=moment,
                report=report,
            )
            for callback in trainer.callback_handler.callbacks:
                if getattr(callback, "jit_manager", None) is not None:
                    callback.jit_manager.kill_wait = 0
            trainer.train(resume_from_checkpoint=resume)
            status = 0
        except FileNotFoundError as error:
            report.write_text(json.dumps(str(error)))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, json.loads(report.read_text()) if report.exists() else None


def killed(folder, name, config, choose):
    """Killed in pass 1, resumed and killed in pass 2, resumed and killed while it saves, and resumed to the end."""
    train(folder / f"{name}-whole", config, None, False, 0.1, save_steps=2)
    part = folder / f"{name}-killed"
    part.mkdir()
    calls = range(1, ACCUMULATION + 1)
    moments = [(signal.SIGKILL, choose.choice([3, 4, 5]), choose.choice(calls))]
    if config.ascent_gradient == "current":
        second = 6 if config.perturb_interval > 1 or config.is_priced else choose.choice([6, 7, 8])
        moments.append((signal.SIGKILL, second, "moved"))
    moments.append((signal.SIGKILL, 10, choose.choice(["model", "optimizer", "random state"])))
    plan = []
    for moment in moments:
        plan.append((moment, *train(part, config, moment, bool(plan), 0.1, save_steps=2)))
    plan.append(("half-written", *train(part, config, None, True, 0.1, save_steps=2)))
    shutil.rmtree(part / "checkpoint-10")
    plan.append(("to the end", *train(part, config, None, True, 0.1, save_steps=2)))
    return plan


def terminated(folder, name, config, choose):
    """SIGTERM while the weights are moved, or after an update, with `enable_jit_checkpoint`; resumed to the end."""
    plan = []
    if not IS_5:
        return plan
    train(folder / f"{name}-whole-0", config, None, False, 0.0, save_steps=STEPS)
    places = ["moved"] + (["update"] if name == "lsam" else [])
    for place in places:
        part = folder / f"{name}-terminated-{'update' if place == 'update' else 'step'}"
        part.mkdir()
        # Either way `checkpoint-6` is saved; step 6 is perturbed by each method, and a line is due after 6 steps.
        step = 5 if place == "update" else 6
        moment = (signal.SIGTERM, step, place)
        options = dict(save_steps=STEPS, enable_jit_checkpoint=True)
        plan.append((moment, *train(part, config, moment, False, 0.0, **options)))
        assert [path.name for path in part.glob("checkpoint-*")] == ["checkpoint-6"]
        plan.append(("to the end", *train(part, config, None, True, 0.0, **options)))
    return plan


if __name__ == "__main__":
    # The Trainer collects garbage at the start of each training; what was imported need not be looked through.
    gc.freeze()
    where, seed = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    draws = random.Random(seed)
    plans = {
        name: {"killed": killed(where, name, config, draws), "terminated": terminated(where, name, config, draws)}
        for name, config in METHODS.items()
    }
    (where / "plan.json").write_text(json.dumps({"seed": seed, **plans}))
