"""Costs are those of what ran: `lsam/overhead`, `max_overhead` and `total_flos` against torch's own count."""

from functools import cache

import pytest
import torch
from situations import Net, Situation, make
from tiny import Examples, bert, llama, training_lines
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput

NEAR = 0.05


def budget(max_overhead):
    return dict(block_selection="budget", max_overhead=max_overhead, num_perturbed_blocks=None, rho=0.05)


CONFIGS = {
    "last": dict(block_selection="last", num_perturbed_blocks=2, rho=0.05),
    "top_k": dict(block_selection="top_k", num_perturbed_blocks=2, rho=0.05),
    "all": dict(block_selection="all", rho=0.05),
    **{f"budget {share}": budget(share) for share in (0.1, 0.25, 0.5)},
}


class Flops(TrainerCallback):
    """The floating-point operations of the last step, all passes together."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:
            self.counter = FlopCounterMode(display=False)
            self.counter.__enter__()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:
            self.counter.__exit__(None, None, None)
            self.last = self.counter.get_total_flops()


class Large(Situation):
    """A net of twelve blocks."""

    new = staticmethod(lambda: Net(12, width=16))


class TwoForwards(Large):
    def loss(self, model, batch, items):
        one, other = model(**batch), model(**{**batch, "input_ids": batch["input_ids"].flip(1)})
        return one.loss + other.loss + (one.logits - other.logits).square().mean()


class GuessesFirst(Large):
    def loss(self, model, batch, items):
        with torch.no_grad():
            guesses = model(**batch).logits.argmax(-1)
        output = model(**batch)
        return output.loss + nn.functional.cross_entropy(output.logits, guesses)


class Towers(nn.Module):
    """Two towers, registered in the order of their names, called in either order, over inputs of any lengths."""

    order, repeats = "ab", {"a": 1, "b": 1}

    def __init__(self):
        super().__init__()
        net, other = Net(6, width=16), Net(6, width=16)
        self.embedding, self.head, self.a, self.b = net.embedding, net.head, net.blocks, other.blocks

    def forward(self, input_ids, attention_mask=None, labels=None):
        features = {}
        for tower in self.order:
            x = self.embedding(input_ids.repeat(1, self.repeats[tower]))
            for block in getattr(self, tower):
                x = block(x)
            features[tower] = x.mean(1)
        logits = self.head(features["a"] * features["b"])
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def towers(order, **repeats):
    net = type("Towers", (Towers,), {"order": order, "repeats": repeats})
    return type("TwoTowers", (Situation,), {"new": net})


class Skips(Net):
    """Every third block is never called."""

    def __init__(self):
        super().__init__(12, width=16)

    def run(self, x):
        for index, block in enumerate(self.blocks):
            x = block(x) if index % 3 else x
        return x


class Repeats(Net):
    """The later half of the blocks runs twice."""

    def __init__(self):
        super().__init__(12, width=16)

    def run(self, x):
        return super().run(x) if not self.training else self.later(self.later(super().run(x)))

    def later(self, x):
        for block in self.blocks[6:]:
            x = block(x)
        return x


def frozen(count, embedding=True):
    def new():
        net = Net(12, width=16)
        for module in [*([net.embedding] if embedding else []), *net.blocks[:count]]:
            module.requires_grad_(False)
        return net

    return type("Frozen", (Situation,), {"new": staticmethod(new)})


class Adapted(Net):
    """Low-rank adapters in the last blocks; all else is frozen, but for the head."""

    def __init__(self):
        super().__init__(12, width=16)
        self.requires_grad_(False)
        for block in self.blocks[9:]:
            block.adapter = nn.Sequential(nn.Linear(16, 2), nn.Linear(2, 16)).double()
            block.register_forward_hook(lambda block, inputs, output: output + block.adapter(inputs[0]))
        self.head.requires_grad_(True)


def with_lora():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["query", "value"], layers_to_transform=[6, 7], task_type="SEQ_CLS")
    return peft.get_peft_model(bert(8), lora)


def of(new) -> type[Situation]:
    return type("Of", (Situation,), {"new": staticmethod(new)})


SITUATIONS = {
    "as it is": Large,
    "bert": of(lambda: bert(12)),
    "two forwards": TwoForwards,
    "guesses first": GuessesFirst,
    "towers as registered": towers("ab", a=1, b=1),
    "towers in the other order": towers("ba", a=1, b=1),
    "a longer first tower": towers("ab", a=4, b=1),
    "a longer last tower": towers("ba", a=4, b=1),
    "blocks never called": of(Skips),
    "blocks called twice": of(Repeats),
    "first blocks frozen": frozen(6),
    "all but the last frozen": frozen(10),
    "first blocks frozen, embedding not": frozen(6, embedding=False),
    "adapters in the last blocks": of(Adapted),
    "lora in the last layers": of(with_lora),
}


def counted(situation, folder, config=None):
    """The operations of the last of three equal steps, so that it needs no check, and the trainer."""
    flops, same = Flops(), type("Same", (situation,), {"data": Examples(4)})
    trainer = make(same, folder, config, callbacks=[flops], max_steps=3, learning_rate=0.0)
    trainer.train()
    return flops.last, trainer


@cache
def of_a_plain_step(name, folder) -> int:
    return counted(SITUATIONS[name], folder)[0]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", SITUATIONS)
def test_overhead_is_what_pass_2_costs(name, config, tmp_path_factory):
    plain = of_a_plain_step(name, tmp_path_factory.getbasetemp() / "plain")
    try:
        both, trainer = counted(SITUATIONS[name], tmp_path_factory.mktemp("both"), CONFIGS[config])
    except ValueError as error:
        # Before training: nothing fits it.
        assert "budget" in config and "max_overhead" in str(error)
        return
    cost, lines = both / plain - 1, training_lines(trainer)
    logged = [line["lsam/overhead"] for line in lines]
    assert cost - NEAR <= logged[-1] <= cost + 2 * NEAR and max(logged) <= 1 + 1e-9
    if "budget" in config:
        assert cost <= CONFIGS[config]["max_overhead"] + NEAR and logged[-1] <= CONFIGS[config]["max_overhead"] + 1e-9
    else:
        assert lines[-1]["lsam/active"] == 1


@pytest.mark.parametrize("name", ["as it is", "bert", "towers as registered", "first blocks frozen"])
def test_a_budget_is_used(name, tmp_path):
    """What fits it is perturbed, not nothing."""
    _, trainer = counted(SITUATIONS[name], tmp_path, budget(0.5))
    assert training_lines(trainer)[-1]["lsam/active"] == 1
    assert training_lines(trainer)[-1]["lsam/overhead"] > 0.2


RUNS = {
    "last": CONFIGS["last"],
    "top_k": CONFIGS["top_k"],
    "all": CONFIGS["all"],
    "budget": budget(0.5),
    "own": {**CONFIGS["last"], "sharpness_scope": "micro_batch"},
    "one pass": {**CONFIGS["last"], "ascent_gradient": "previous"},
    "each second": {**CONFIGS["top_k"], "perturb_interval": 2},
}
# Of the second one the labels are the tokens.
MODELS = {
    "bert": of(lambda: bert(6)),
    "llama": type("Llama", (of(lambda: llama(6)),), {"data": Examples(48, language_model=True)}),
}


def flops_of(folder, situation, config, accumulation, resumed_at=None, **options):
    """The `total_flos` of a run of 6 steps, and its lines."""
    options |= dict(gradient_accumulation_steps=accumulation, max_steps=6)
    if resumed_at is not None:
        options |= dict(save_strategy="steps", save_steps=resumed_at)
    trainer = make(situation, folder, config, **options)
    trainer.train(resume_from_checkpoint=None if resumed_at is None else str(folder / f"checkpoint-{resumed_at}"))
    return trainer.state.total_flos, training_lines(trainer)


COUNTED = [*(("bert", config, 1) for config in RUNS), *(("llama", config, 2) for config in ("last", "all", "own"))]


@pytest.mark.parametrize("model, config, accumulation", COUNTED)
def test_total_flos_are_those_of_training(model, config, accumulation, tmp_path):
    """A step has those of the plain Trainer, and its overhead; the check's passes are no training."""
    plain, _ = flops_of(tmp_path / "plain", MODELS[model], None, accumulation)
    ours, lines = flops_of(tmp_path / "ours", MODELS[model], RUNS[config], accumulation)
    assert plain > 0 and len(lines) == 6
    assert ours == pytest.approx(plain / 6 * sum(1 + line["lsam/overhead"] for line in lines), rel=1e-9)


RESUMED = [*((config, 2, 2) for config in (None, "last", "top_k", "budget", "all")), ("budget", 4, 1)]
RESUMED += [("own", 2, 2), ("one pass", 2, 1), ("each second", 4, 1)]


@pytest.mark.parametrize("config, step, accumulation", RESUMED)
def test_total_flos_of_a_resumed_run(config, accumulation, step, tmp_path):
    """They are those of the run without an interruption."""
    settings = RUNS[config] if config else None
    trainer = make(
        MODELS["bert"],
        tmp_path,
        settings,
        max_steps=6,
        gradient_accumulation_steps=accumulation,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    resumed, _ = flops_of(tmp_path, MODELS["bert"], settings, accumulation, resumed_at=step)
    assert resumed == pytest.approx(trainer.state.total_flos, rel=1e-12) and resumed > 0


@pytest.mark.parametrize("config", ["last", "top_k", "all"])
def test_a_pass_that_is_given_up_costs_what_it_then_costs(config, tmp_path):
    """A loss that reads what blocks leave behind gets a whole pass 2, and the log says so."""

    class Reads(Large):
        def attach(self, model):
            self.captured = {}
            for index, block in enumerate(model.blocks):
                block.up.register_forward_hook(lambda m, i, output, index=index: self.captured.update({index: output}))

        def loss(self, model, batch, items):
            self.captured.clear()
            loss = model(**batch).loss
            return loss + sum(self.captured[index].square().mean() for index in range(12))

    plain, _ = counted(Reads, tmp_path / "plain")
    both, trainer = counted(Reads, tmp_path / "both", CONFIGS[config])
    assert training_lines(trainer)[-1]["lsam/overhead"] == pytest.approx(both / plain - 1, abs=NEAR)
