"""Promise 1: off means off. Weights, losses, logs and random state are bitwise those of the plain Trainer."""

import pytest
from tiny import MODELS, Examples, arguments, assert_equal, random_states, weights
from transformers import Trainer

from hf_lsam import LSAMConfig, LSAMTrainer

OFF = {
    "rho": LSAMConfig(rho=0.0),
    "alpha": LSAMConfig(alpha=0.0),
    "alpha, one pass": LSAMConfig(alpha=0.0, ascent_gradient="previous"),
    "selection": LSAMConfig(block_selection="none"),
}
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def run(trainer_class, name, folder, **options):
    model = MODELS[name](dropout=0.1)
    trainer = trainer_class(
        model=model,
        args=arguments(
            folder,
            max_steps=5,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            logging_steps=1,
            label_smoothing_factor=0.1,
        ),
        train_dataset=Examples(20, language_model=name == "llama"),
        **options,
    )
    trainer.train()
    logs = [{k: v for k, v in line.items() if k not in TIMES} for line in trainer.state.log_history]
    return weights(model), logs, random_states()


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("setting", list(OFF))
def test_off_is_the_plain_trainer(setting, name, tmp_path):
    plain, plain_logs, plain_state = run(Trainer, name, tmp_path / "plain")
    off, off_logs, off_state = run(LSAMTrainer, name, tmp_path / "off", lsam_config=OFF[setting])
    assert_equal(plain, off)
    assert plain_logs == off_logs
    assert plain_state == off_state
    assert not (tmp_path / "off" / "lsam_blocks.jsonl").exists()


@pytest.mark.parametrize("ascent_gradient", ["current", "previous"])
def test_perturbed_runs_draw_the_same_random_numbers(ascent_gradient, tmp_path):
    """Dropout and data order of a perturbed run are those of the plain one, so that runs of a seed can be compared."""
    _, _, plain_state = run(Trainer, "bert", tmp_path / "plain")
    config = LSAMConfig(rho=0.1, ascent_gradient=ascent_gradient)
    on, _, on_state = run(LSAMTrainer, "bert", tmp_path / "on", lsam_config=config)
    assert plain_state == on_state
    assert all(bool(tensor.isfinite().all()) for tensor in on.values())
