"""Adapters on a quantised base: only they are perturbed, whatever the base is made of."""

import pytest
import torch
from tiny import assert_equal, largest_difference, llama, weights
from tiny_peft import ADAPTERS, ATTENTION, METHODS, frozen, train_literally, trainer_for
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

peft = pytest.importorskip("peft")


class Int8Linear(torch.nn.Linear):
    """A linear layer as quantisation leaves it: integers that take no gradient, made numbers when they are used."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.weight = torch.nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.weight.to(hidden.dtype) * self.scale, self.bias)


@pytest.mark.usefixtures("float64")
def test_a_base_of_integers_equals_the_reference(tmp_path):
    """Only adapters are perturbed and take gradients, so that it does not matter what the base is made of."""

    def build():
        model = llama()
        for layer in model.model.layers:
            for name, module in list(layer.named_modules()):
                if isinstance(module, torch.nn.Linear):
                    parent, _, child = name.rpartition(".")
                    setattr(layer.get_submodule(parent), child, Int8Linear(module))
        set_seed(1)
        return peft.get_peft_model(model, ADAPTERS["lora"]("llama"), autocast_adapter_dtype=False)

    settings, literal = METHODS["top 2"]
    fast, slow = build(), build()
    base = frozen(fast)
    assert sum(value.dtype == torch.int8 for value in base.values()) == 4 * 7
    trainer_for(fast, tmp_path, settings).train()
    train_literally(slow, literal)
    assert largest_difference(weights(fast), weights(slow)) < 1e-12
    assert_equal(frozen(fast), base)


def test_a_base_of_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    set_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=64, pad_token_id=0, **sizes)).save_pretrained(tmp_path / "model")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=quantised, device_map="cpu")
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=ATTENTION["llama"], lora_dropout=0.1))
    base = frozen(model)
    assert torch.uint8 in {value.dtype for value in base.values()}
    trainer = trainer_for(model, tmp_path / "out", dict(rho=0.5, block_selection="last"), logging_steps=1)
    trainer.train()
    assert_equal(frozen(model), base)
    assert trainer._lsam.second_pass.replays
    assert trainer.state.log_history[0]["lsam/active"] == 1
    assert trainer.state.log_history[0]["lsam/first_block"] == 2
