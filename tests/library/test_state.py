"""What goes from step to step is in the checkpoint: a resumed run equals the uninterrupted one."""

import pytest
from older import RESUMABLE
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import Examples, arguments, assert_equal, bert, weights
from transformers import Trainer, TrainerCallback

from hf_lsam import LSAMConfig, LSAMTrainer

METHODS = {
    "top 2": LSAMConfig(rho=0.3),
    "one pass": LSAMConfig(rho=0.3, ascent_gradient="previous"),
    "one pass, adaptive": LSAMConfig(rho=0.3, ascent_gradient="previous", adaptive=True),
    "looksam": LSAMConfig(rho=0.3, block_selection="all", perturb_interval=5, reuse_correction=0.7),
    "micro-batch": LSAMConfig(rho=0.3, sharpness_scope="micro_batch"),
}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def trainer_for(folder, config, stop=None, trainer_class=LSAMTrainer):
    trainer = trainer_class(
        model=bert(dropout=0.1),
        args=arguments(
            folder,
            max_steps=12,
            logging_steps=3,
            save_strategy="steps",
            save_steps=1,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            train_sampling_strategy="random",
        ),
        train_dataset=Examples(RESUMABLE),
        **({"lsam_config": config} if trainer_class is LSAMTrainer else {}),
        callbacks=[StopAt(stop)] if stop else [],
    )
    return trainer


def lines(trainer):
    """The log without the loss: the Trainer drops what it summed up since the last line when it is interrupted."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [{key: value for key, value in line.items() if key != "loss"} for line in lines]


@pytest.mark.parametrize("stop", [4, 7])
@pytest.mark.parametrize("method", list(METHODS))
def test_resumed_equals_uninterrupted(method, stop, tmp_path):
    whole = trainer_for(tmp_path / "whole", METHODS[method])
    whole.train()
    trainer_for(tmp_path / "part", METHODS[method], stop=stop).train()
    resumed = trainer_for(tmp_path / "part", METHODS[method])
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / f"checkpoint-{stop}"))
    assert_equal(weights(whole.model), weights(resumed.model))
    assert lines(resumed) == lines(whole) and len(lines(whole)) == 4
    read = [(tmp_path / part / "lsam_blocks.jsonl").read_text() for part in ("whole", "part")]
    assert read[0] == read[1]


def resume(folder, config, stop=4):
    trainer = trainer_for(folder, config)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
    return trainer


@pytest.fixture
def stopped(tmp_path):
    trainer_for(tmp_path / "run", METHODS["one pass"], stop=4).train()
    return tmp_path / "run"


@pytest.mark.parametrize("damage", ["truncated", "not a tensor file", "empty"])
def test_a_damaged_file_is_refused_before_training(damage, stopped):
    path = stopped / "checkpoint-4" / "lsam_state.safetensors"
    content = path.read_bytes()
    path.write_bytes(
        {"truncated": content[: len(content) // 2], "not a tensor file": b"x" * 100, "empty": b""}[damage]
    )
    with pytest.raises(ValueError, match="lsam_state.safetensors is damaged .*Resume from an earlier checkpoint"):
        resume(stopped, METHODS["one pass"])
    assert not (stopped / "checkpoint-5").exists()


def test_other_settings_start_clean_with_a_warning(stopped, caplog):
    trainer = resume(stopped, LSAMConfig(rho=0.1, ascent_gradient="previous"))
    assert "saved with other settings of layer-wise SAM (rho)" in caplog.text
    assert trainer.state.global_step == 12


def test_a_checkpoint_of_the_plain_trainer_starts_clean_with_a_warning(tmp_path, caplog):
    trainer_for(tmp_path, None, stop=4, trainer_class=Trainer).train()
    trainer = resume(tmp_path, METHODS["one pass"])
    assert "holds no lsam_state.safetensors" in caplog.text
    assert trainer.state.global_step == 12


def test_the_state_of_another_model_is_refused(stopped):
    path = stopped / "checkpoint-4" / "lsam_state.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor[..., :1].contiguous() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="belongs to another model: it holds"):
        resume(stopped, METHODS["one pass"])


def test_no_draft_is_left(stopped):
    assert sorted(path.name for path in (stopped / "checkpoint-4").glob("lsam*")) == ["lsam_state.safetensors"]
