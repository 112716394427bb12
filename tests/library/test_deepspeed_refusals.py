"""What DeepSpeed does that is not supported is refused before training; no DeepSpeed is needed to test that."""

from pathlib import Path

import pytest
from accelerate import DeepSpeedPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from deepspeed_cases import BF16, ONE_PASS, TWO_PASSES, engine
from tiny import Examples, arguments, assert_equal, bert, weights

from hf_lsam import LSAMConfig, LSAMTrainer

REFUSED = {
    "data_types.grad_accum_dtype='fp32'": (BF16["bf16-1-accumulated-in-float32"]["deepspeed"], TWO_PASSES),
    "ZeRO stage 0": (engine(0), ONE_PASS),
    "ZeRO stage 3": (engine(3), ONE_PASS),
    "sharpness_scope='batch'": (engine(2), dict(sharpness_scope="micro_batch")),
    "offload_optimizer.device='cpu'": (engine(2, zero=dict(offload_optimizer=dict(device="cpu"))), ONE_PASS),
    "round_robin_gradients=True": (engine(2, zero=dict(round_robin_gradients=True)), ONE_PASS),
    "zenflow=": (engine(2, zero=dict(zenflow=dict(topk_ratio=0.1))), ONE_PASS),
    "fp16.enabled=True": (engine(2, fp16=dict(enabled=True)), ONE_PASS),
    "torch_autocast.dtype='float16'": (engine(2, torch_autocast=dict(enabled=True, dtype="float16")), ONE_PASS),
    "tensor_parallel.autotp_size=2": (engine(2, tensor_parallel=dict(autotp_size=2)), ONE_PASS),
    "compile.deepcompile=True": (engine(2, compile=dict(deepcompile=True)), ONE_PASS),
    "compression_training=": (engine(2, compression_training=dict(layer_reduction=dict(enabled=True))), ONE_PASS),
    "Muon": (engine(2, optimizer=dict(type="Muon")), ONE_PASS),
}


@pytest.mark.parametrize("reason", list(REFUSED))
def test_the_rest_is_refused_before_training(reason, tmp_path, monkeypatch):
    settings, config = REFUSED[reason]
    trainer = LSAMTrainer(
        model=bert(), args=arguments(tmp_path), train_dataset=Examples(16), lsam_config=LSAMConfig(**config)
    )
    start, state = weights(trainer.model), trainer.accelerator.state
    monkeypatch.setattr(state, "distributed_type", DistributedType.DEEPSPEED)
    monkeypatch.setattr(state, "deepspeed_plugins", DeepSpeedPlugin(hf_ds_config=settings), raising=False)
    with pytest.raises(NotImplementedError, match="block_selection='none'") as raised:
        trainer.train()
    assert reason in str(raised.value)
    assert_equal(start, weights(trainer.model))


def test_the_launch_file_asks_for_zero_2_without_offload():
    path = Path(__file__).parents[2] / "accelerate_configs" / "deepspeed_zero2.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == DistributedType.DEEPSPEED
    plugin = DeepSpeedPlugin(zero_stage=config.deepspeed_config["zero_stage"])
    assert plugin.zero_stage == 2 and config.deepspeed_config["offload_optimizer_device"] == "none"
