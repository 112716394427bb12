"""Promise 2: in float64 without dropout every method equals its literal reference over 20 steps."""

import functools

import pytest
import torch
from tiny import MODELS, Examples, arguments, blocks_of, largest_difference, weights

from hf_lsam import LSAMConfig, LSAMTrainer, reference

STEPS, BATCH = 20, 4
HEAD = {"bert": ("bert.pooler", "classifier"), "llama": ("model.norm", "lm_head")}


def one_pass(model, name, rule, rho=0.1):
    return functools.partial(reference.one_pass_lsam_step, blocks=blocks_of(model), rho=rho, rule=rule, state={})


def looksam(model):
    state, calls = {}, iter(range(STEPS))
    step = functools.partial(reference.looksam_step, rho=0.1, interval=3, scale=0.7, state=state)
    return lambda *args: step(*args, step=next(calls))


def lsam(model, rule, **options):
    options = {"rho": 0.1, "alpha": 1.0, **options}
    return functools.partial(reference.lsam_step, blocks=blocks_of(model), rule=rule, **options)


def budget(model, name, k):
    sizes = [sum(p.numel() for p in block) for block in blocks_of(model)]
    head = sum(p.numel() for module in HEAD[name] for p in model.get_submodule(module).parameters())
    if name == "bert":
        head += sum(p.numel() for p in model.bert.embeddings.LayerNorm.parameters())
    return reference.budget(0.7, k, sizes, head)


# name: (settings, the literal step for a model and its name)
METHODS = {
    "none": (dict(block_selection="none"), lambda m, n: reference.plain_step),
    "sam": (
        dict(block_selection="all", rho=0.1),
        lambda m, n: functools.partial(reference.sam_step, rho=0.1),
    ),
    "adaptive sam": (
        dict(block_selection="all", rho=1.0, adaptive=True),
        lambda m, n: functools.partial(reference.sam_step, rho=1.0, adaptive=True),
    ),
    "generalized sam": (
        dict(block_selection="all", rho=0.1, alpha=0.7),
        lambda m, n: functools.partial(reference.generalized_sam_step, rho=0.1, alpha=0.7),
    ),
    "looksam": (
        dict(block_selection="all", rho=0.1, perturb_interval=3, reuse_correction=0.7),
        lambda m, n: looksam(m),
    ),
    "top 2": (dict(rho=0.1), lambda m, n: lsam(m, reference.top_k(2))),
    "top 1, mixed": (
        dict(rho=0.1, alpha=0.6, num_perturbed_blocks=1),
        lambda m, n: lsam(m, reference.top_k(1), alpha=0.6),
    ),
    "top 2, adaptive": (
        dict(rho=1.0, adaptive=True),
        lambda m, n: lsam(m, reference.top_k(2), rho=1.0, adaptive=True),
    ),
    "every block": (dict(rho=0.1, num_perturbed_blocks=None), lambda m, n: lsam(m, reference.top_k(4))),
    "last 2": (dict(rho=0.1, block_selection="last"), lambda m, n: lsam(m, reference.last(2))),
    "budget": (
        dict(rho=0.1, block_selection="budget", max_overhead=0.7, num_perturbed_blocks=None),
        lambda m, n: lsam(m, budget(m, n, None)),
    ),
    "budget of 1": (
        dict(rho=0.1, block_selection="budget", max_overhead=0.7, num_perturbed_blocks=1),
        lambda m, n: lsam(m, budget(m, n, 1)),
    ),
    "one pass, top 2": (
        dict(rho=0.1, ascent_gradient="previous"),
        lambda m, n: one_pass(m, n, reference.top_k(2)),
    ),
    "one pass, budget": (
        dict(
            rho=0.1,
            ascent_gradient="previous",
            block_selection="budget",
            max_overhead=0.7,
            num_perturbed_blocks=None,
        ),
        lambda m, n: one_pass(m, n, budget(m, n, None)),
    ),
}


def optimizer_for(name, model):
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05)
    # The gradient of a key's bias is zero but for rounding; AdamW divides it by little more than its eps.
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, eps=1e-6)


def train(model, optimizer, config, examples, folder, **options):
    options = {"max_steps": STEPS, "max_grad_norm": 0.0, **options}
    trainer = LSAMTrainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=examples,
        lsam_config=config,
        optimizers=(optimizer, None),
    )
    # BERT's classifier takes the mean over a micro-batch, whatever number of items the Trainer tells it.
    trainer.model_accepts_loss_kwargs = examples.language_model
    trainer.train()
    return trainer


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name, optimizer", [("bert", "adamw"), ("llama", "sgd")])
@pytest.mark.parametrize("method", list(METHODS))
def test_equals_the_reference(method, name, optimizer, tmp_path):
    settings, literal = METHODS[method]
    examples = Examples(STEPS * BATCH, language_model=name == "llama")
    fast, slow = MODELS[name](), MODELS[name]()
    start = weights(fast)
    train(fast, optimizer_for(optimizer, fast), LSAMConfig(**settings), examples, tmp_path)

    literal_step, slow_optimizer = literal(slow, name), optimizer_for(optimizer, slow)
    slow.train()
    for step in range(STEPS):
        literal_step(slow, [examples.batch(step * BATCH, BATCH)], slow_optimizer)

    assert largest_difference(weights(slow), start) > 1e-3
    assert largest_difference(weights(fast), weights(slow)) < 1e-12


@pytest.mark.usefixtures("float64")
def test_methods_differ(tmp_path):
    """No two methods of the table give the same weights, so that equality with the reference means something."""
    examples = Examples(STEPS * BATCH)
    results = []
    for settings, _ in METHODS.values():
        model = MODELS["bert"]()
        train(model, optimizer_for("sgd", model), LSAMConfig(**settings), examples, tmp_path, max_steps=6)
        results.append(weights(model))
    for index, left in enumerate(results):
        for right in results[:index]:
            assert largest_difference(left, right) > 1e-9


@pytest.mark.usefixtures("float64")
def test_micro_batch_scope_equals_the_reference(tmp_path):
    examples = Examples(10 * 6)
    fast, slow = MODELS["bert"](), MODELS["bert"]()
    config = LSAMConfig(rho=0.1, alpha=0.8, sharpness_scope="micro_batch")
    options = dict(max_steps=10, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    train(fast, optimizer_for("sgd", fast), config, examples, tmp_path, **options)

    slow_optimizer = optimizer_for("sgd", slow)
    slow.train()
    for step in range(10):
        batches = [examples.batch(step * 6 + part * 2, 2) for part in range(3)]
        reference.micro_batch_lsam_step(slow, batches, slow_optimizer, blocks_of(slow), 0.1, 0.8, reference.top_k(2))
    assert largest_difference(weights(fast), weights(slow)) < 1e-12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("start, end", [(0.3, 1.0), (0.0, 0.4), (0.25, 0.75)])
def test_start_end_and_interval(start, end, tmp_path):
    examples = Examples(STEPS * BATCH)
    fast, slow = MODELS["bert"](), MODELS["bert"]()
    config = LSAMConfig(rho=0.1, perturb_start=start, perturb_end=end, perturb_interval=2)
    train(fast, optimizer_for("sgd", fast), config, examples, tmp_path)

    slow_optimizer, perturbed_step = optimizer_for("sgd", slow), lsam(slow, reference.top_k(2))
    slow.train()
    for step in range(STEPS):
        perturbed = start * STEPS <= step < end * STEPS and (step - start * STEPS) % 2 == 0
        literal_step = perturbed_step if perturbed else reference.plain_step
        literal_step(slow, [examples.batch(step * BATCH, BATCH)], slow_optimizer)
    assert largest_difference(weights(fast), weights(slow)) < 1e-12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["one pass, top 2", "looksam", "top 2"])
def test_clipping_acts_on_the_mixed_gradient_only(method, tmp_path):
    """What is climbed or reused at a later step is the gradient before clipping."""
    settings, literal = METHODS[method]
    examples = Examples(STEPS * BATCH)
    fast, slow = MODELS["bert"](), MODELS["bert"]()
    train(fast, optimizer_for("sgd", fast), LSAMConfig(**settings), examples, tmp_path, max_grad_norm=0.2)

    slow_optimizer = optimizer_for("sgd", slow)

    def clip(*_):
        torch.nn.utils.clip_grad_norm_(slow.parameters(), 0.2)

    slow_optimizer.register_step_pre_hook(clip)
    literal_step = literal(slow, "bert")
    slow.train()
    for step in range(STEPS):
        literal_step(slow, [examples.batch(step * BATCH, BATCH)], slow_optimizer)
    assert largest_difference(weights(fast), weights(slow)) < 1e-12
