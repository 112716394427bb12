"""What else happens to a Trainer: several runs, callbacks at any point, the best model, the Hub."""

import copy
import weakref
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tiny import (
    Examples,
    arguments,
    assert_equal,
    bert,
    block_rows,
    largest_difference,
    out_of_reach,
    training_lines,
    weights,
)
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.utils import ModelOutput

from hf_lsam import LSAMConfig, LSAMTrainer

ONE_PASS = LSAMConfig(rho=0.3, ascent_gradient="previous")
LOOKSAM = LSAMConfig(rho=0.3, block_selection="all", perturb_interval=3, reuse_correction=0.7)
METHODS = {
    "lsam": LSAMConfig(rho=0.3, alpha=0.5),
    "one pass": ONE_PASS,
    "looksam": LOOKSAM,
    "micro-batch": LSAMConfig(rho=0.3, sharpness_scope="micro_batch"),
}


def trainer_for(folder, config, callbacks=(), **options):
    model, metric = options.pop("model", None) or bert(), options.pop("compute_metrics", None)
    return LSAMTrainer(
        **({"model_init": lambda: bert()} if options.pop("init", False) else {"model": model}),
        args=arguments(folder, **{"max_steps": 6, "logging_steps": 2, "gradient_accumulation_steps": 2, **options}),
        train_dataset=Examples(24),
        eval_dataset=Examples(4, seed=1),
        lsam_config=config,
        callbacks=list(callbacks),
        compute_metrics=metric,
    )


def figures(trainer):
    return [
        {name: value for name, value in line.items() if name.startswith(("lsam/", "loss"))}
        for line in training_lines(trainer)
    ]


# --- memory


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_the_graph_of_a_step_is_freed_with_it(scope, tmp_path):
    """A trainer may keep features of the pass, and let go of them before the next step."""
    notes = out_of_reach(features=[], alive=[])

    class Features(LSAMTrainer):
        def training_step(self, *args, **kwargs):
            self.features = []
            loss = super().training_step(*args, **kwargs)
            notes.features += map(weakref.ref, self.features)
            self.features = []
            notes.alive.append(sum(feature() is not None for feature in notes.features))
            return loss

        def compute_loss(self, model, inputs, **kwargs):
            output = model(**inputs)
            self.features.append(output.logits)
            return output.loss

    config = LSAMConfig(rho=0.3, perturb_interval=2, sharpness_scope=scope)
    args = arguments(tmp_path, max_steps=6)
    Features(model=bert(), args=args, train_dataset=Examples(24), lsam_config=config).train()
    assert notes.alive == [0] * 6


@pytest.mark.parametrize("wrapped", [lambda tensor: tensor, lambda tensor: [tensor], lambda t: ModelOutput(logits=t)])
@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_the_graphs_in_a_large_list_are_freed_when_it_is_cleared(scope, wrapped, tmp_path):
    """A list that is filled over the micro-batches of a step, and that is the same one in all steps."""
    notes = out_of_reach(features=[], alive=[])

    class Features(LSAMTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                self.features.clear()
                notes.alive.append(sum(feature() is not None for feature in notes.features))
            return loss

        def compute_loss(self, model, inputs, **kwargs):
            output = model(**inputs)
            features = [output.logits * 1 for _ in range(70)]
            notes.features += map(weakref.ref, features)
            self.features += map(wrapped, features)
            return output.loss

    config = LSAMConfig(rho=0.3, perturb_interval=2, sharpness_scope=scope)
    args = arguments(tmp_path, max_steps=8, gradient_accumulation_steps=2)
    trainer = Features(model=bert(), args=args, train_dataset=Examples(48), lsam_config=config)
    trainer.features = []
    trainer.train()
    assert notes.alive == [0] * 8


# --- several runs


@pytest.mark.parametrize("method", ["lsam", "one pass", "looksam"])
def test_a_second_run_with_model_init_equals_the_first(method, tmp_path):
    trainer = trainer_for(tmp_path, METHODS[method], init=True)
    ends = []
    for _ in range(2):
        trainer.train()
        ends.append((weights(trainer.model), figures(trainer), block_rows(tmp_path)))
    assert_equal(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:] and len(ends[0][1]) == 3


def test_a_second_run_goes_on_as_a_new_trainer_with_its_model_and_optimizer_would(tmp_path):
    trainer = trainer_for(tmp_path / "one", ONE_PASS)
    trainer.train()
    new = trainer_for(tmp_path / "two", ONE_PASS, model=copy.deepcopy(trainer.model))
    new.create_optimizer()
    new.optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
    # A run sets the learning rates from `initial_lr`, which the first run has left in the optimizer.
    trainer.train()
    new.train()
    assert_equal(weights(trainer.model), weights(new.model))
    assert figures(trainer) == figures(new) and block_rows(tmp_path / "one") == block_rows(tmp_path / "two")


def test_a_second_run_finds_the_blocks_of_another_model(tmp_path):
    trainer = trainer_for(tmp_path / "one", METHODS["lsam"])
    trainer.train()
    other = trainer_for(tmp_path / "two", METHODS["lsam"], model=bert(blocks=3, seed=5))
    trainer.model = trainer.model_wrapped = bert(blocks=3, seed=5)
    trainer.optimizer = None
    trainer.train()
    other.train()
    assert_equal(weights(trainer.model), weights(other.model))
    assert figures(trainer) == figures(other)
    assert block_rows(tmp_path / "one") == block_rows(tmp_path / "two")


# --- callbacks at any point


EVENTS = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end")


class AtEveryPoint(TrainerCallback):
    """At every event of a step: compares the weights to those it began with, then evaluates and saves."""

    def __init__(self):
        self.trainer, self.seen, self.begun = None, [], {}

    def _act(self, event, state, model):
        if event == "on_step_begin":
            self.begun = weights(model)
        elif event != "on_step_end":
            assert_equal(self.begun, weights(model))
        self.seen.append(event)
        if state.global_step in (1, 3):
            self.trainer.evaluate()
            self.trainer._save_checkpoint(model, trial=None)


for _event in EVENTS:
    setattr(
        AtEveryPoint,
        _event,
        lambda self, args, state, control, model=None, event=_event, **kwargs: self._act(event, state, model),
    )


@pytest.mark.parametrize("method", list(METHODS))
def test_callbacks_see_no_moved_weights_and_change_nothing(method, tmp_path):
    quiet = trainer_for(tmp_path / "quiet", METHODS[method])
    quiet.train()
    busy = AtEveryPoint()
    trainer = busy.trainer = trainer_for(tmp_path / "busy", METHODS[method], [busy])
    trainer.train()
    assert busy.seen == list(EVENTS) * 6
    assert_equal(weights(quiet.model), weights(trainer.model))
    assert figures(quiet) == figures(trainer) and block_rows(tmp_path / "quiet") == block_rows(tmp_path / "busy")
    # Saved last within step 3, before its update: a checkpoint of its beginning. (The end of step 2 is one, too.)
    resumed = trainer_for(tmp_path / "busy", METHODS[method])
    resumed.train(resume_from_checkpoint=str(tmp_path / "busy" / "checkpoint-3"))
    assert_equal(weights(quiet.model), weights(resumed.model))
    assert block_rows(tmp_path / "quiet") == block_rows(tmp_path / "busy")


class EndEpochWithin(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == 1 and state.epoch < 1


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_an_epoch_that_ends_between_micro_batches_carries_them_over(scope, tmp_path, float64):
    """The Trainer keeps their gradient for the next step; a tiny perturbation must keep it as well."""
    ends = []
    for rho in (0.0, 1e-9):
        config = LSAMConfig(rho=rho, sharpness_scope=scope)
        options = dict(optim="sgd", max_grad_norm=0.0, num_train_epochs=3, learning_rate=0.1)
        trainer = trainer_for(tmp_path, config, [EndEpochWithin()], **options)
        trainer.train()
        ends.append(weights(trainer.model))
    assert largest_difference(*ends) < 1e-8


# --- the best model


def test_the_best_model_is_loaded_and_training_stops_early(tmp_path):
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7])
    trainer = trainer_for(
        tmp_path,
        METHODS["lsam"],
        [EarlyStoppingCallback(2)],
        compute_metrics=lambda _: {"score": next(losses)},
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=False,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
    )
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    two = trainer_for(tmp_path / "two", METHODS["lsam"], lr_scheduler_type="constant", max_steps=2)
    two.train()
    assert_equal(weights(two.model), weights(trainer.model))


# --- the Hub


@pytest.fixture
def uploads(monkeypatch):
    """What would be sent to the Hub: for each upload the files in the folder, as `upload_folder` filters them."""
    sent = []

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns=None, path_in_repo="", **options):
        names = [str(p.relative_to(folder_path)) for p in sorted(Path(folder_path).rglob("*"))]
        kept = huggingface_hub.utils.filter_repo_objects(names, ignore_patterns=ignore_patterns)
        sent.append((path_in_repo, set(kept)))
        done = torch.futures.Future()
        done.set_result(None)
        done.is_done = done.done
        return done

    def create_repo(self, repo_id, **options):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    # transformers 4.57 calls functions.
    monkeypatch.setattr("transformers.trainer.upload_folder", partial(upload_folder, None), raising=False)
    monkeypatch.setattr("transformers.trainer.create_repo", partial(create_repo, None), raising=False)
    return sent


def test_a_push_holds_all_files(tmp_path, uploads):
    trainer = trainer_for(
        tmp_path / "model",
        METHODS["one pass"],
        push_to_hub=True,
        hub_strategy="checkpoint",
        save_strategy="steps",
        save_steps=3,
    )
    trainer.train()
    trainer.push_to_hub()
    model = {"model.safetensors", "config.json", "training_args.bin", "lsam_blocks.jsonl"}
    first, last = uploads[0], uploads[-1]
    assert first[0] == "" and model <= first[1]
    assert model | {"README.md"} <= last[1]
    assert not {name for _, names in uploads for name in names if "draft" in name}
    checkpoints = [names for path, names in uploads if path == "last-checkpoint"]
    assert len(checkpoints) == 2
    for names in checkpoints:
        assert {"lsam_state.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"} <= names
