"""`hyperparameter_search`: each trial trains on its own settings, and one that cannot be is refused."""

from dataclasses import fields

import optuna
import pytest
from older import IS_5
from tiny import Examples, arguments, assert_equal, bert, block_rows, weights
from transformers import Seq2SeqTrainingArguments, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HPSearchBackend
from trl import DPOConfig, KTOConfig, RewardConfig, SFTConfig

from hf_lsam import LSAMConfig, LSAMTrainer


def trainer_for(folder, config, callbacks=(), **options):
    options = {"max_steps": 6, "logging_steps": 2, "gradient_accumulation_steps": 2, **options}
    return LSAMTrainer(
        model_init=lambda: bert(),
        args=arguments(folder, **options),
        train_dataset=Examples(24),
        eval_dataset=Examples(4, seed=1),
        lsam_config=config,
        callbacks=list(callbacks),
    )


def space(trial):
    """Settings and training arguments; one setting is in the second trial only."""
    values = {
        "rho": trial.suggest_float("rho", 0.1, 0.4),
        "alpha": trial.suggest_categorical("alpha", [0.25, 0.5]),
        "num_perturbed_blocks": trial.suggest_int("num_perturbed_blocks", 1, 3),
        "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2, log=True),
    }
    if trial.number == 1:
        values["adaptive"] = trial.suggest_categorical("adaptive", [True])
    return values


class Watch(TrainerCallback):
    """Keeps the configuration that each run trains on, and its final weights."""

    def __init__(self):
        self.trainer, self.seen, self.weights = None, [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.append((self.trainer.lsam_config, args.learning_rate))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights(model))


def searching(folder, **options):
    watch, own = Watch(), LSAMConfig(rho=0.3, max_overhead=0.5)
    watch.trainer = trainer_for(folder, own, [watch], **options)
    return watch.trainer, watch, own


def test_each_trial_trains_on_its_own_settings_and_in_its_own_folder(tmp_path, caplog):
    trainer, watch, own = searching(tmp_path / "search", save_strategy="steps", save_steps=6)
    tried = []

    def noted(trial):
        tried.append(space(trial))
        return tried[-1]

    sampler = optuna.samplers.RandomSampler(seed=3)
    best = trainer.hyperparameter_search(noted, n_trials=3, backend="optuna", sampler=sampler)
    assert "no corresponding field" not in caplog.text
    assert trainer.lsam_config is own and len(tried) == 3
    assert best.hyperparameters == tried[int(best.run_id)]
    for number, (values, (config, rate)) in enumerate(zip(tried, watch.seen, strict=True)):
        assert rate == values.pop("learning_rate")
        assert config == LSAMConfig(**{**vars(own), **values})
        alone = trainer_for(tmp_path / f"alone-{number}", config, learning_rate=rate)
        alone.train()
        assert_equal(watch.weights[number], weights(alone.model))
        folder = tmp_path / "search" / f"run-{number}"
        assert (folder / "checkpoint-6" / "lsam_state.safetensors").exists()
        assert block_rows(folder) == block_rows(tmp_path / f"alone-{number}")
    assert not (tmp_path / "search" / "lsam_blocks.jsonl").exists()


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        ({"alpha": 1.5}, r"alpha mixes two gradients and must lie in \[0, 1\], but is 1.5"),
        ({"alpha": 0.5, "ascent_gradient": "previous"}, "so alpha must be 1, but is 0.5"),
        ({"num_perturbed_blocks": 9}, "num_perturbed_blocks=9, but the model has 4 candidates"),
    ],
)
def test_a_trial_that_cannot_be_ends_the_search_with_one_error(trial, message, tmp_path):
    trainer, watch, own = searching(tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer.hyperparameter_search(lambda _: trial, n_trials=1, backend="optuna")
    assert watch.seen == [] and trainer.lsam_config is own


@pytest.mark.skipif(not IS_5, reason="before transformers 5.0 a search hands no `catch` on to Optuna")
def test_a_search_that_catches_the_error_goes_on_with_the_next_trial(tmp_path):
    trainer, watch, own = searching(tmp_path, max_steps=2)
    space = [{"rho": 0.2, "alpha": 7.0}, {"rho": 0.1}]
    best = trainer.hyperparameter_search(
        lambda trial: space[trial.number], n_trials=2, backend="optuna", catch=(ValueError,)
    )
    assert best.run_id == "1"
    assert [config for config, _ in watch.seen] == [LSAMConfig(**{**vars(own), "rho": 0.1})]


@pytest.mark.parametrize("backend", [HPSearchBackend.RAY, HPSearchBackend.WANDB])
def test_trials_that_are_dictionaries_set_the_settings_too(backend, tmp_path, caplog):
    trainer = trainer_for(tmp_path, LSAMConfig(rho=0.3, alpha=0.5))
    trainer.hp_search_backend, trainer.hp_space = backend, None
    trial = {"rho": 0.1, "num_perturbed_blocks": 3, "learning_rate": 0.5}
    trainer._hp_search_setup(trial)
    assert trainer.lsam_config == LSAMConfig(rho=0.1, alpha=0.5, num_perturbed_blocks=3)
    assert trainer.args.learning_rate == 0.5 and trainer._trial is trial and len(trial) == 3
    assert "no corresponding field" not in caplog.text


def test_a_setting_that_the_arguments_have_too_is_refused(tmp_path):
    trainer, _, _ = searching(tmp_path)
    trainer.args.alpha = 0.1
    with pytest.raises(ValueError, match="The search sets alpha, which is a field of both LSAMConfig and Training"):
        trainer.hyperparameter_search(lambda _: {"alpha": 0.5}, n_trials=1, backend="optuna")


def test_no_setting_is_a_training_argument():
    ours = {field.name for field in fields(LSAMConfig)}
    for kind in (TrainingArguments, Seq2SeqTrainingArguments, SFTConfig, DPOConfig, KTOConfig, RewardConfig):
        assert not ours & {field.name for field in fields(kind)}, kind
