"""The settings that the page of papers gives for each paper train, and perturb what and when it says."""

import re

import pytest
import torch
import transformers
from packaging import version
from pages import ROOT, blocks
from tiny import arguments, bert, block_rows, largest_difference, weights

from hf_lsam import LSAMConfig, LSAMTrainer

if version.parse(transformers.__version__) < version.parse("5.19"):
    pytest.skip("the recipes need transformers 5.19", allow_module_level=True)

from tiny_hub import rows

from hf_lsam_recipes.support.images.resnets import CifarResNet, CifarResNetConfig

PAPERS = (ROOT / "docs" / "papers.md").read_text()
SECTIONS = {text.splitlines()[0]: text for text in re.split(r"^## ", PAPERS, flags=re.MULTILINE)[1:]}


def configs(section: str) -> list[LSAMConfig]:
    """The settings that a section of the page of papers gives."""
    found = []
    for example in blocks(SECTIONS[section], "python"):
        names = {"LSAMConfig": LSAMConfig}
        exec(example, names)
        found.append(names["config"])
    return found


def tiny_model(config: LSAMConfig):
    """A ResNet for settings that name its convolutions, else a BERT, each with its data."""
    if config.block_pattern is not None and "stem" in config.block_pattern:
        images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        model = CifarResNet(CifarResNetConfig(depth=8, num_labels=2))
        return model, [{"pixel_values": image, "labels": number % 2} for number, image in enumerate(images)]
    return bert(vocab_size=16, num_labels=2), rows(32)


def test_the_page_of_papers_has_these():
    assert [*SECTIONS] == [
        "SAM",
        "ASAM",
        "Generalized SAM, the gradient-norm penalty",
        "LookSAM",
        "AsyncSAM",
        "Late-phase SAM",
        "SAM-ON",
        "Layer-wise SAM",
    ]
    for name, section in SECTIONS.items():
        assert re.search(r"arxiv.org/abs/\d{4}\.\d{5}", section), name
        assert "**Quoted:**" in section and "**Different here" in section, name
    assert len({repr(config) for name in SECTIONS for config in configs(name)}) == len(SECTIONS) + 2


@pytest.mark.parametrize("section", SECTIONS)
def test_the_setting_of_each_paper_trains(section, tmp_path):
    for number, config in enumerate(configs(section)):
        trained = []
        for name, setting in (("its", config), ("plain", LSAMConfig(block_selection="none"))):
            torch.manual_seed(0)
            model, data = tiny_model(config)
            args = arguments(tmp_path / f"{number}-{name}", max_steps=8, logging_steps=1)
            trainer = LSAMTrainer(model, args, train_dataset=data, lsam_config=setting)
            trainer.train()
            trained.append(weights(model))
        assert largest_difference(*trained) > 1e-6
        perturbed = [row["perturbed"] for row in block_rows(tmp_path / f"{number}-its")]
        # One pass has no gradient to begin with.
        first = int(config.ascent_gradient == "previous")
        assert perturbed == [int(step >= first and config.is_perturbed(step, 8)) for step in range(8)]


def test_late_phase_sam_is_sam_of_the_last_eighth():
    [config] = configs("Late-phase SAM")
    assert [epoch for epoch in range(200) if config.is_perturbed(epoch, 200)] == [*range(175, 200)]


@pytest.mark.parametrize("model", ["bert", "resnet", "llama", "vit"])
def test_sam_on_perturbs_the_norms_and_nothing_else(model):
    sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    models = {
        "bert": lambda: bert(),
        "resnet": lambda: CifarResNet(CifarResNetConfig(depth=8)),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **sizes)),
        "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, **sizes)),
    }
    [config] = configs("SAM-ON")
    modules = [(name, type(module).__name__) for name, module in models[model]().named_modules()]
    norms = {name for name, kind in modules if kind.endswith(("Norm", "Norm2d"))}
    assert norms == {name for name, _ in modules if re.fullmatch(config.block_pattern, name)}
    assert len(norms) >= 5
