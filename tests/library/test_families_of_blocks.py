"""Models whose blocks are of several classes, or of which the larger part is frozen."""

import pytest
import torch
from situations import LAST, TOP, Situation, follow, make
from tiny import Examples, block_rows
from torch.utils.data import Dataset
from transformers import (
    CLIPVisionConfig,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    set_seed,
)


class Captions(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.cat([torch.full((4,), 63), torch.randint(1, 60, (6,), generator=generator)])
        images = torch.randn(3, 16, 16, generator=generator)
        return dict(input_ids=tokens, labels=tokens.masked_fill(tokens == 63, -100), pixel_values=images)


def llava():
    """The vision tower is trained; the language model is frozen, and its blocks are ten times as large."""
    set_seed(0)
    heads = dict(num_hidden_layers=4, num_attention_heads=2)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, image_size=16, patch_size=8, **heads)
    text = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=256, num_key_value_heads=2, **heads)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63, image_token_id=63)
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" in name)
    return model


@pytest.mark.parametrize("config", [LAST, TOP], ids=["last", "top_k"])
def test_a_frozen_majority(config, tmp_path):
    """What is trained is chosen among, or the refusal names the setting that does it."""
    situation = type("Captioning", (Situation,), {"new": staticmethod(llava), "data": Captions()})
    try:
        run = follow(situation, tmp_path, config, max_steps=1)
    except ValueError as error:
        assert "block_pattern" in str(error)
    else:
        assert run.lines[0]["lsam/active"] == 1
        assert all("vision" in name for name, times in run.rows[0]["counts"].items() if times)


def test_families_of_blocks_are_mixed(tmp_path):
    """Of Jamba's eight blocks one attends, and is small beside those with experts."""
    set_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=64, num_hidden_layers=8, num_experts=16)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, mamba_d_state=4, mamba_dt_rank=4)
    model = JambaForCausalLM(JambaConfig(**sizes, **heads, use_mamba_kernels=False, pad_token_id=0))
    situation = type("Mixed", (Situation,), {"data": Examples(16, language_model=True)})
    trainer = make(situation, tmp_path, {**TOP, "num_perturbed_blocks": None}, model=model, max_steps=1)
    trainer.train()
    (row,) = block_rows(tmp_path)
    assert len(row["counts"]) == 8 and all(times == 1 for times in row["counts"].values())
