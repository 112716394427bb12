"""The YAMLs of the three recipes: one setting of layer-wise SAM, which is the recommended one, and its log."""

import math

import pytest

from hf_lsam import LSAMConfig
from hf_lsam_recipes import run_clm, run_glue, run_glue_no_trainer, run_image_classification
from hf_lsam_recipes.support.settings import parse_arguments
from hf_lsam_recipes.support.shipped import shipped_yamls

RECIPES = {"glue": run_glue, "clm": run_clm, "images": run_image_classification}
# Training rows of the data on the Hub; of running text, blocks.
ROWS = {
    "cola": 8551,
    "mnli": 392_702,
    "mrpc": 3668,
    "qnli": 104_743,
    "qqp": 363_846,
    "rte": 2490,
    "rte_lora": 2490,
    "sst2": 67_349,
    "sst2_lora_decoder": 67_349,
    "stsb": 5749,
    "wnli": 635,
    "gsm8k_lora": 7473,
    "shakespeare": 500,
    "cifar100_wrn28": 45_000,
    "cifar10_resnet20": 45_000,
    "flowers102_wrn16": 1020,
    "vit": 1034,
}
PAPER = ("cifar100_wrn28", "cifar10_resnet20", "flowers102_wrn16")
YAMLS = {name: (folder, path) for folder in RECIPES for name, path in shipped_yamls(folder).items()}


def read(name: str) -> tuple:
    folder, path = YAMLS[name]
    return parse_arguments(RECIPES[folder].SETTINGS, [str(path)], "", folder)[-2:]


def test_the_sizes_of_all_data_are_known():
    assert {*ROWS} == {*YAMLS}


@pytest.mark.parametrize("name", YAMLS)
def test_a_yaml_has_the_recommended_setting_or_the_papers_and_says_which(name):
    config, text = read(name)[0], YAMLS[name][1].read_text()
    if name in PAPER:
        paper = LSAMConfig(
            num_perturbed_blocks=2 if name == "flowers102_wrn16" else 4, block_pattern=config.block_pattern
        )
        assert config == paper and config.block_selection == "top_k"
        assert "# The paper's own rule, `block_selection: top_k`" in text
    else:
        assert config == LSAMConfig(block_selection="all", perturb_interval=4, rho=0.1, perturb_start=0.1)
        assert "# The recommended setting" in text and "The paper's own\n# rule is `block_selection: top_k`." in text


@pytest.mark.parametrize("name", YAMLS)
def test_a_yaml_logs_often_enough_to_show_the_method(name):
    config, args = read(name)
    steps = math.ceil(ROWS[name] / args.per_device_train_batch_size) * int(args.num_train_epochs)
    every = math.ceil(args.logging_steps * steps) if args.logging_steps < 1 else int(args.logging_steps)
    perturbed = [step for step in range(every, steps + 1, every) if config.is_active(step - 1, steps)]
    assert steps // every >= 10 and len(perturbed) >= 10
    # Lines enough, but no more than are read; for hours of training, one in a few minutes.
    assert steps // every <= 30 or every >= 100


@pytest.mark.parametrize("name", sorted(shipped_yamls("glue")))
def test_a_yaml_without_an_adapter_is_one_of_the_loop_too(name, tmp_path):
    argv = [str(YAMLS[name][1]), "--output_dir", str(tmp_path)]
    if "lora" in name:
        with pytest.raises(ValueError, match="has unknown settings: lora_r"):
            parse_arguments(run_glue_no_trainer.SETTINGS, argv, "")
    else:
        *_, config, args = parse_arguments(run_glue_no_trainer.SETTINGS, argv, "")
        assert (config, args.logging_steps) == (read(name)[0], read(name)[1].logging_steps)


@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_logging_steps_of_the_loop(steps, tmp_path):
    with pytest.raises(
        ValueError,
        match=rf"logging_steps must be a whole number of steps, or a fraction of all steps below 1, but is {steps}",
    ):
        run_glue_no_trainer.LoopArguments(str(tmp_path), logging_steps=steps)
