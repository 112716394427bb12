"""Promise 10: what is not supported raises before training, and what could silently do nothing warns."""

import subprocess
import sys

import pytest
import torch
from accelerate import DistributedDataParallelKwargs
from tiny import Examples, arguments, assert_equal, bert, weights
from transformers import AlbertConfig, AlbertForSequenceClassification

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.step_log import StuckWatch


def trainer_for(folder, config, model=None, **options):
    return LSAMTrainer(
        model=model or bert(),
        args=arguments(folder, **options),
        train_dataset=Examples(16),
        lsam_config=config,
    )


MISFITS = [
    (LSAMConfig(num_perturbed_blocks=5), "num_perturbed_blocks=5, but the model has 4 candidates"),
    (
        LSAMConfig(block_selection="budget", max_overhead=0.01, ascent_gradient="previous"),
        "max_overhead=0.01 is too small.*block_selection='last'",
    ),
    (LSAMConfig(block_selection="budget", max_overhead=0.01), "max_overhead=0.01 is too small"),
    (LSAMConfig(block_pattern="nothing"), "block_pattern 'nothing' matches no module"),
]


@pytest.mark.parametrize("config, message", MISFITS, ids=lambda value: str(value)[:40])
def test_settings_that_do_not_fit_the_model_raise_before_training(config, message, tmp_path):
    trainer = trainer_for(tmp_path / "out", config, save_strategy="steps", save_steps=1)
    start = weights(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert_equal(start, weights(trainer.model))
    assert trainer.state.global_step == 0
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_albert_raises_before_training(tmp_path):
    size = dict(vocab_size=64, hidden_size=16, embedding_size=16, num_attention_heads=2, intermediate_size=32)
    model = AlbertForSequenceClassification(AlbertConfig(**size, num_labels=3))
    with pytest.raises(ValueError, match="ALBERT.*block_selection='all'"):
        trainer_for(tmp_path, LSAMConfig(), model).train()
    trainer_for(tmp_path, LSAMConfig(block_selection="all"), model).train()


def test_misfits_with_model_init_raise_before_training(tmp_path):
    trainer = LSAMTrainer(
        model_init=lambda: bert(),
        args=arguments(tmp_path),
        train_dataset=Examples(16),
        lsam_config=LSAMConfig(num_perturbed_blocks=5),
    )
    with pytest.raises(ValueError, match="num_perturbed_blocks=5"):
        trainer.train()
    assert trainer.state.global_step == 0


UNSUPPORTED = {
    "DataParallel": (lambda t: setattr(t.args, "_n_gpu", 2), {}),
    "optim=": (lambda t: None, {"optim": "lomo"}),
    "torch_compile_mode": (lambda t: None, {"torch_compile_mode": "reduce-overhead"}),
    "device_map": (lambda t: setattr(t.model, "hf_device_map", {"bert": 0, "classifier": 1}), {}),
}


@pytest.mark.parametrize("reason", list(UNSUPPORTED))
def test_unsupported_raises_with_the_way_out(reason, tmp_path):
    change, options = UNSUPPORTED[reason]
    trainer = trainer_for(tmp_path, LSAMConfig(), **options)
    change(trainer)
    with pytest.raises(NotImplementedError, match="block_selection='none'") as raised:
        trainer.train()
    assert reason in str(raised.value)


def test_off_is_supported_everywhere(tmp_path):
    trainer = trainer_for(tmp_path, LSAMConfig(block_selection="none"), max_steps=1)
    UNSUPPORTED["DataParallel"][0](trainer)
    trainer.train()
    assert trainer.state.global_step == 1


def test_weights_too_coarse_for_rho_warn_that_the_move_is_noisy(tmp_path, caplog):
    torch.manual_seed(0)
    model = bert().to(torch.bfloat16)
    trainer_for(tmp_path, LSAMConfig(rho=0.02), model, max_steps=1).train()
    assert "moves the torch.bfloat16 weights by less than they resolve: rounded stochastically" in caplog.text
    caplog.clear()
    trainer_for(tmp_path, LSAMConfig(rho=5.0), bert().to(torch.bfloat16), max_steps=1).train()
    trainer_for(tmp_path, LSAMConfig(rho=0.02), bert(), max_steps=1).train()
    assert "less than they resolve" not in caplog.text


class OneLoss(LSAMTrainer):
    """A loss that never changes, as that of a run that is stuck."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss - loss.detach() + 1.1


@pytest.mark.parametrize(
    "trainer_class, config, warns",
    [
        (OneLoss, LSAMConfig(rho=0.5), True),
        (OneLoss, LSAMConfig(block_selection="none"), False),
        (LSAMTrainer, LSAMConfig(rho=0.05), False),
    ],
)
def test_a_run_that_is_stuck_warns_once(trainer_class, config, warns, tmp_path, caplog):
    trainer = trainer_class(
        model=bert(),
        args=arguments(tmp_path, max_steps=24, logging_steps=1),
        train_dataset=Examples(16),
        lsam_config=config,
    )
    trainer.train()
    assert caplog.text.count("The loss has stayed at its initial value (1.1)") == int(warns)


@pytest.mark.parametrize("of_first_part, warns", [(2.0, False), (1.0, True)])
def test_a_loss_that_fell_before_the_first_perturbation_is_not_stuck(of_first_part, warns, caplog):
    """As that of plain steps up to `perturb_start`: later it may stay where it is, since that is not its start."""
    watch = StuckWatch()
    for step in range(10, 101, 10):
        in_first_part = step <= 20
        watch.see(of_first_part if in_first_part else 1.0, 0 if in_first_part else 10, step, 100)
    assert caplog.text.count("The loss has stayed at its initial value") == int(warns)


def test_a_resumed_run_whose_loss_had_fallen_is_not_stuck(tmp_path, caplog):
    class Falls(LSAMTrainer):
        """From 2 to 1 in the first half of the training, and not any further."""

        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss - loss.detach() + max(1.0, 2.0 - self.state.global_step / 10)

    def trainer(max_steps):
        args = arguments(tmp_path, max_steps=max_steps, logging_steps=1, save_strategy="steps", save_steps=12)
        return Falls(model=bert(), args=args, train_dataset=Examples(16), lsam_config=LSAMConfig())

    trainer(12).train()
    trainer(24).train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert "has stayed at its initial value" not in caplog.text


def test_importing_the_package_needs_no_recipe_package():
    """`datasets` and the like are for the recipes; a plain import must not find them."""
    code = """
import sys
for name in ("datasets", "evaluate", "peft", "matplotlib", "sklearn", "scipy"):
    sys.modules[name] = None
import hf_lsam
print(sorted(hf_lsam.__all__))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['LSAM', 'LSAMConfig', 'LSAMMixin', 'LSAMTrainer']"


def test_the_import_adds_little_to_that_of_the_trainer():
    code = """
import time, transformers
transformers.Trainer
start = time.perf_counter()
import hf_lsam
print(time.perf_counter() - start)
"""
    # A busy machine may be slow once.
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        if float(result.stdout) < 0.2:
            return
    raise AssertionError(f"it took {result.stdout.strip()} s")


def test_a_config_that_is_none_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"lsam_config must be an LSAMConfig, but is a dict.*LSAMConfig\(\*\*"):
        trainer_for(tmp_path, {"rho": 0.1})


@pytest.mark.parametrize(
    "settings, what",
    [
        (dict(perturb_start=0.95), "perturb_start=0.95"),
        (dict(perturb_start=0.31, perturb_end=0.32), "perturb_end=0.32"),
        (dict(ascent_gradient="previous", perturb_interval=100), "perturb_interval=100"),
    ],
)
def test_a_run_of_which_no_step_is_perturbed_warns(settings, what, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("hf_lsam.step_log.logger.warning", messages.append)
    trainer_for(tmp_path, LSAMConfig(**settings), max_steps=10).train()
    assert len(messages) == 1 and "No step" in messages[0] and what in messages[0]
    trainer_for(tmp_path, LSAMConfig(perturb_start=0.8), max_steps=10).train()
    assert len(messages) == 1


def test_a_static_graph_with_micro_batch_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_lsam.distributed.is_distributed", lambda: True)
    monkeypatch.setattr("hf_lsam.distributed.dist.get_world_size", lambda: 1)
    trainer = trainer_for(tmp_path, LSAMConfig(sharpness_scope="micro_batch"))
    trainer.accelerator.ddp_handler = DistributedDataParallelKwargs(static_graph=True)
    with pytest.raises(NotImplementedError, match="ddp_static_graph.*sharpness_scope='batch'"):
        trainer.train()
