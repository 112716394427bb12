"""Settings are refused where they make no sense, with the way out."""

import dataclasses
import inspect
import re

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_lsam import LSAMConfig

REFUSED = [
    (dict(rho=-0.1), "rho .* cannot be negative"),
    (dict(rho="much"), "rho must be a number, but is 'much'"),
    (dict(rho=float("nan")), "rho must be a finite number"),
    (dict(rho=float("inf")), "rho must be a finite number"),
    (dict(rho=None), "rho must be a number"),
    (dict(alpha=1.5), r"alpha .* \[0, 1\]"),
    (dict(alpha=-0.1), r"alpha .* \[0, 1\]"),
    (dict(num_perturbed_blocks=0), "num_perturbed_blocks must be at least 1.*block_selection='none'"),
    (dict(num_perturbed_blocks=1.5), "num_perturbed_blocks must be a finite integer"),
    (dict(max_overhead=0), "max_overhead must be above 0"),
    (dict(block_selection="any"), "block_selection must be one of none, all, top_k, last, budget"),
    (dict(ascent_gradient="next"), "ascent_gradient must be one of current, previous"),
    (dict(sharpness_scope="epoch"), "sharpness_scope must be one of batch, micro_batch"),
    (dict(block_pattern="("), "block_pattern '\\(' is not a regular expression"),
    (dict(block_pattern="x", block_selection="all"), "block_pattern has no effect.*top_k"),
    (dict(perturb_interval=0), "perturb_interval .* at least 1"),
    (dict(perturb_start=0.5, perturb_end=0.5), "0 <= perturb_start < perturb_end <= 1"),
    (dict(perturb_end=1.1), "0 <= perturb_start < perturb_end <= 1"),
    (dict(ascent_gradient="previous", alpha=0.8), "alpha must be 1, but is 0.8. Set alpha=1, or ascent_gradient"),
    (dict(ascent_gradient="previous", sharpness_scope="micro_batch"), "Set sharpness_scope='batch'"),
    (dict(reuse_correction=0.7), "perturb_interval=1 leaves none. Set perturb_interval"),
    (dict(reuse_correction=-1, perturb_interval=2), "reuse_correction must be 0"),
    (dict(reuse_correction=0.7, perturb_interval=5, ascent_gradient="previous"), "needs ascent_gradient='current'"),
]


@pytest.mark.parametrize("settings, message", REFUSED, ids=lambda value: str(value)[:60])
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LSAMConfig(**settings)


def test_strings_of_a_yaml_become_numbers():
    config = LSAMConfig(rho="5e-2", perturb_interval="2", num_perturbed_blocks="3")
    assert (config.rho, config.perturb_interval, config.num_perturbed_blocks) == (0.05, 2, 3)


def test_parsed_beside_training_arguments(tmp_path):
    parser = HfArgumentParser((TrainingArguments, LSAMConfig))
    command = f"--output_dir {tmp_path} --rho 0.2 --block_selection budget --max_overhead 0.5 --adaptive"
    _, config = parser.parse_args_into_dataclasses(command.split())
    assert config == LSAMConfig(rho=0.2, block_selection="budget", max_overhead=0.5, adaptive=True)


def test_every_field_is_documented_once_and_has_a_help():
    documentation = inspect.getdoc(LSAMConfig)
    for field in dataclasses.fields(LSAMConfig):
        entries = re.findall(rf"^    {field.name} \(.*\):$", documentation, re.MULTILINE)
        assert len(entries) == 1, field.name
        assert field.metadata["help"], field.name
        if field.default is not None:
            assert str(field.default) in entries[0].replace('"', ""), field.name


@pytest.mark.parametrize("off", [dict(rho=0), dict(alpha=0), dict(block_selection="none")])
def test_off(off):
    config = LSAMConfig(**off)
    assert not config.enabled
    assert not config.is_perturbed(0, 10)


def test_when():
    config = LSAMConfig(perturb_start=0.2, perturb_end=0.8, perturb_interval=3)
    assert [step for step in range(10) if config.is_perturbed(step, 10)] == [2, 5]
    assert [step for step in range(10) if config.is_active(step, 10)] == [2, 3, 4, 5, 6, 7]
    # A start between two steps begins at the next one.
    assert [s for s in range(5) if LSAMConfig(perturb_start=0.3, perturb_interval=2).is_perturbed(s, 5)] == [2, 4]
    # 0.7 * 10 is 7.000000000000001.
    assert LSAMConfig(perturb_start=0.7).is_perturbed(7, 10)
