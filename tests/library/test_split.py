"""Promise 4: how a batch is split over micro-batches changes nothing but rounding."""

import pytest
import torch
from test_right import optimizer_for, train
from tiny import Examples, bert, largest_difference, llama, weights

from hf_lsam import LSAMConfig

METHODS = {
    "top 2": dict(rho=0.1, alpha=0.7),
    "sam": dict(rho=0.1, block_selection="all"),
    "looksam": dict(rho=0.1, block_selection="all", perturb_interval=3, reuse_correction=0.7),
    "budget": dict(rho=0.1, block_selection="budget", max_overhead=0.7, num_perturbed_blocks=None),
    "one pass": dict(rho=0.1, ascent_gradient="previous"),
    "priced": dict(rho=0.1, max_overhead=0.4),
}


class Ragged(Examples):
    """A language-model set in which the number of labels differs from row to row."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        labels = row["labels"].clone()
        labels[: index % 6] = -100
        return {**row, "labels": labels}


def final_weights(build, examples, config, folder, size, accumulation):
    model = build()
    train(
        model,
        optimizer_for("sgd", model),
        config,
        examples,
        folder,
        max_steps=6,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=1.0,
    )
    return weights(model)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("build", [bert, llama])
def test_split_over_micro_batches(build, method, tmp_path):
    examples = Ragged(48, language_model=True) if build is llama else Examples(48)
    config = LSAMConfig(**METHODS[method])
    whole = final_weights(build, examples, config, tmp_path, 8, 1)
    for size, accumulation in ((4, 2), (2, 4)):
        split = final_weights(build, examples, config, tmp_path, size, accumulation)
        assert largest_difference(whole, split) < 1e-12


@pytest.mark.usefixtures("float64")
def test_a_last_window_with_fewer_micro_batches(tmp_path):
    """An epoch of 5 micro-batches in windows of 2: the last window has one, and the next epoch begins anew."""
    examples = Ragged(10, language_model=True)
    config = LSAMConfig(rho=0.1, alpha=0.7)
    split = final_weights(llama, examples, config, tmp_path, 2, 2)
    whole = llama()
    optimizer = optimizer_for("sgd", whole)
    order = [range(4), range(4, 8), range(8, 10)] * 2
    rows = [torch.utils.data.Subset(examples, list(part)) for part in order]
    for step, part in enumerate(rows):
        part.language_model = True
        one_step = dict(max_steps=1, per_device_train_batch_size=len(part), max_grad_norm=1.0)
        train(whole, optimizer, config, part, tmp_path / str(step), **one_step)
    assert largest_difference(split, weights(whole)) < 1e-12


def test_micro_batch_scope_depends_on_the_split(tmp_path):
    examples = Examples(48)
    config = LSAMConfig(rho=0.5, sharpness_scope="micro_batch")
    whole = final_weights(bert, examples, config, tmp_path, 8, 1)
    split = final_weights(bert, examples, config, tmp_path, 2, 4)
    assert largest_difference(whole, split) > 1e-6
