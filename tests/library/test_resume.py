"""A run that was killed or terminated goes on from its last checkpoint as if it had not been."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import resume_worker
from older import IS_5
from resume_worker import METHODS, STEPS
from safetensors import safe_open
from safetensors.torch import load_file
from test_state import StopAt, trainer_for
from tiny import Examples, arguments, assert_equal, bert, weights
from transformers import EarlyStoppingCallback, Trainer

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.state import load_state
from hf_lsam.step import LSAMStep

WORKER = Path(resume_worker.__file__)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs, and the worker's plan; a failed assertion shows the plan, and so the seed."""
    folder = tmp_path_factory.mktemp("resume")
    seed = random.SystemRandom().randrange(10**6)
    done = subprocess.run([sys.executable, WORKER, folder, str(seed)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"seed {seed}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return folder, json.loads((folder / "plan.json").read_text())


def assert_same_end(left, right, plan, logs=True, within=False):
    """
    Every file of the last checkpoints is the same, byte for byte, but those that name the folder.

    Where a checkpoint is saved `within` a step, the Trainer counts what ran of that step once more.
    """
    left_end, right_end = (folder / f"checkpoint-{STEPS}" for folder in (left, right))
    names = {path.name for path in left_end.iterdir()}
    assert names == {path.name for path in right_end.iterdir()}, plan
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "lsam_state.safetensors"} < names
    for name in names - {"training_args.bin", "trainer_state.json"}:
        assert (left_end / name).read_bytes() == (right_end / name).read_bytes(), f"{name} differs: {plan}"
    if logs:
        states = [json.loads((end / "trainer_state.json").read_text()) for end in (left_end, right_end)]
        flos = [state.pop("total_flos") for state in states]
        assert flos[0] < flos[1] if within else flos[0] == flos[1], plan
        assert states[0] == states[1], plan
        assert len(states[0]["log_history"]) == STEPS // 2
        rows = [(folder / "lsam_blocks.jsonl").read_text() for folder in (left, right)]
        assert rows[0] == rows[1] and rows[0].count("\n") == STEPS // 2, plan


@pytest.mark.parametrize("method", list(METHODS))
def test_a_run_killed_again_and_again_ends_as_the_uninterrupted_one(method, runs):
    folder, plan = runs
    done = plan[method]["killed"]
    kills = [entry for entry in done if isinstance(entry[0], list)]
    assert [status for _, status, _ in kills] == [-9] * len(kills), plan
    # The call of pass 2, or that of the one pass, was one at moved weights.
    within = kills[-2]
    assert within[2] is True, plan
    assert done[-1][1] == 0, plan
    assert_same_end(folder / f"{method}-whole", folder / f"{method}-killed", plan)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_checkpoint_that_was_being_saved_is_refused_by_name(method, runs):
    _, plan = runs
    (message,) = [report for what, _, report in plan[method]["killed"] if what == "half-written"]
    assert message.endswith("checkpoint-10/trainer_state.json'") and "No such file" in message, plan


@pytest.mark.skipif(not IS_5, reason="before transformers 5.0 SIGTERM ends a run and saves nothing")
@pytest.mark.parametrize("method", list(METHODS))
def test_sigterm_at_moved_weights_saves_those_that_the_step_began_with(method, runs):
    folder, plan = runs
    term, end = plan[method]["terminated"][:2]
    assert term[1:] == [0, True] and end[1] == 0, plan
    part = folder / f"{method}-terminated-step"
    assert_same_end(folder / f"{method}-whole-0", part, plan, within=True)


@pytest.mark.skipif(not IS_5, reason="before transformers 5.0 SIGTERM ends a run and saves nothing")
def test_sigterm_in_an_update_loses_a_log_line_but_no_row_of_it(runs):
    folder, plan = runs
    assert [entry[1] for entry in plan["lsam"]["terminated"]] == [0] * 4, plan
    whole, part = folder / "lsam-whole-0", folder / "lsam-terminated-update"
    assert_same_end(whole, part, plan, logs=False)
    # The Trainer saves before the line of step 6: the next line is then one of steps 5 to 8.
    rows = {
        name: {row["step"]: row for row in map(json.loads, (name / "lsam_blocks.jsonl").read_text().splitlines())}
        for name in (whole, part)
    }
    state = json.loads((part / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    logged = [line["step"] for line in state["log_history"]]
    assert logged == list(rows[part]) == [2, 4, 8, 10, 12], plan
    six, eight = (rows[whole][step]["counts"] for step in (6, 8))
    both = {name: six.get(name, 0) + eight.get(name, 0) for name in six | eight}
    assert rows[part][8]["counts"] == both, plan


def test_the_plain_trainer_loses_the_same_partial_loss(tmp_path):
    """Why the tests of state compare all of a line but its loss."""
    histories = []
    for folder, stop in (("whole", None), ("part", 4)):
        trainer = trainer_for(tmp_path / folder, None, stop=stop, trainer_class=Trainer)
        trainer.train()
        if stop:
            trainer = trainer_for(tmp_path / folder, None, trainer_class=Trainer)
            trainer.train(resume_from_checkpoint=str(tmp_path / folder / f"checkpoint-{stop}"))
        histories.append({line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line})
    whole, part = histories
    assert [step for step in whole if whole[step] != part[step]] == [6]


def run(folder, config, model=None, stop=None, resume=None, **options):
    """A run of 8 steps of sequential data without dropout; 4 steps are an epoch."""
    trainer = LSAMTrainer(
        model=model or bert(),
        args=arguments(
            folder,
            **{
                "max_steps": 8,
                "logging_steps": 2,
                "gradient_accumulation_steps": 2,
                "per_device_train_batch_size": 2,
                "save_strategy": "steps",
                "save_steps": 2,
                **options,
            },
        ),
        train_dataset=Examples(16),
        lsam_config=config,
        callbacks=[StopAt(stop)] if stop else [],
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


ONE_PASS = METHODS["one_pass"]


def figures(trainer):
    return [
        {name: value for name, value in line.items() if name.startswith("lsam/")}
        for line in trainer.state.log_history
        if "loss" in line
    ]


def test_a_moved_checkpoint_resumes_the_same(tmp_path):
    whole = run(tmp_path / "whole", ONE_PASS)
    run(tmp_path / "part", ONE_PASS, stop=6)
    (tmp_path / "part" / "checkpoint-6").rename(tmp_path / "elsewhere")
    resumed = run(tmp_path / "new", ONE_PASS, resume=tmp_path / "elsewhere")
    assert_equal(weights(whole.model), weights(resumed.model))
    assert figures(resumed) == figures(whole) and len(figures(whole)) == 4


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    trainer = run(tmp_path, METHODS["looksam"], stop=2)
    path = tmp_path / "checkpoint-2" / "lsam_state.safetensors"
    content = path.read_bytes()
    assert len(load_file(path)) > 10
    step = LSAMStep(trainer.model, METHODS["looksam"], 8)
    for length in {*range(0, 600, 7), *range(600, len(content), 997), len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(
            ValueError, match=r"lsam_state\.safetensors is damaged .*Resume from an earlier checkpoint"
        ):
            load_state(step, str(tmp_path / "checkpoint-2"))
    assert step.correction is None and step.previous is None


def test_another_model_starts_clean_with_a_warning(tmp_path, caplog):
    """A model with fewer blocks cannot load the weights but for those it has; the state is not used for it."""
    run(tmp_path, ONE_PASS, stop=2)
    step = LSAMStep(bert(blocks=3), ONE_PASS, 8)
    load_state(step, str(tmp_path / "checkpoint-2"))
    assert "saved with other settings of layer-wise SAM (the blocks to select from)" in caplog.text
    assert step.previous is None


@pytest.mark.parametrize("method", ["one_pass", "looksam"])
def test_other_settings_resume_as_if_there_had_been_no_state(method, tmp_path, caplog):
    run(tmp_path / "part", METHODS[method], stop=4)
    other = LSAMConfig(**{**vars(METHODS[method]), "rho": 0.2})
    checkpoint = tmp_path / "part" / "checkpoint-4"
    resumed = run(tmp_path / "a", other, resume=checkpoint)
    assert "saved with other settings of layer-wise SAM (rho)" in caplog.text
    (checkpoint / "lsam_state.safetensors").unlink()
    without = run(tmp_path / "b", other, resume=checkpoint)
    assert "holds no lsam_state.safetensors" in caplog.text
    assert_equal(weights(resumed.model), weights(without.model))


def test_a_model_only_checkpoint_has_neither_optimizer_nor_state_and_says_so(tmp_path, caplog):
    run(tmp_path, ONE_PASS, stop=2, save_only_model=True)
    assert not {"optimizer.pt", "lsam_state.safetensors"} & {p.name for p in (tmp_path / "checkpoint-2").iterdir()}
    resumed = run(tmp_path, ONE_PASS, resume=tmp_path / "checkpoint-2")
    assert "holds no lsam_state.safetensors" in caplog.text
    assert resumed.state.global_step == 8


def test_ignore_data_skip_goes_on_with_the_state(tmp_path):
    """At the end of an epoch there is no data to skip, so with or without it the run is the uninterrupted one."""
    whole = run(tmp_path / "whole", ONE_PASS)
    run(tmp_path / "part", ONE_PASS, stop=4)
    resumed = run(tmp_path / "part", ONE_PASS, resume=tmp_path / "part" / "checkpoint-4", ignore_data_skip=True)
    assert_equal(weights(whole.model), weights(resumed.model))
    assert figures(resumed) == figures(whole)


def test_callback_states_are_restored_beside_ours(tmp_path):
    """Patience that is used up in part by the first half stops the second half where it stops the whole run."""

    def train(folder, stop=None, resume=None):
        trainer = LSAMTrainer(
            model=bert(),
            args=arguments(
                folder,
                max_steps=12,
                save_strategy="steps",
                eval_strategy="steps",
                save_steps=1,
                eval_steps=1,
                load_best_model_at_end=True,
                metric_for_best_model="worse",
                greater_is_better=True,
                restore_callback_states_from_checkpoint=True,
            ),
            train_dataset=Examples(48),
            eval_dataset=Examples(4),
            # A metric that never gets better after the first evaluation.
            compute_metrics=lambda _: {"worse": 0.0},
            lsam_config=ONE_PASS,
            callbacks=[EarlyStoppingCallback(5), *([StopAt(stop)] if stop else [])],
        )
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return trainer

    whole = train(tmp_path / "whole")
    train(tmp_path / "part", stop=3)
    checkpoint = tmp_path / "part" / "checkpoint-3"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"] = False
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    resumed = train(tmp_path / "part", resume=checkpoint)
    assert whole.state.global_step == resumed.state.global_step == 6
    ends = [load_file(tmp_path / part / "checkpoint-6" / "model.safetensors") for part in ("whole", "part")]
    assert_equal(*ends)
    with safe_open(tmp_path / "part" / "checkpoint-6" / "lsam_state.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lsam"])["previous"]["norm"] > 0


def test_a_checkpoint_saved_before_the_first_step_holds_the_state_it_came_from(tmp_path):
    """`enable_jit_checkpoint` may save at the beginning of a step, and so of the first one after a resume."""
    run(tmp_path / "part", ONE_PASS, stop=4)

    class SaveAtOnce(StopAt):
        trainer = None

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                SaveAtOnce.trainer._save_checkpoint(SaveAtOnce.trainer.model, trial=None)

    trainer = LSAMTrainer(
        model=bert(),
        args=arguments(tmp_path / "new", max_steps=8, gradient_accumulation_steps=2, per_device_train_batch_size=2),
        train_dataset=Examples(16),
        lsam_config=ONE_PASS,
        callbacks=[SaveAtOnce(5)],
    )
    SaveAtOnce.trainer = trainer
    trainer.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-4"))
    name = "checkpoint-4/lsam_state.safetensors"
    assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "part" / name).read_bytes()
