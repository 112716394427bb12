"""Trainers of transformers, and a user's own: both passes are theirs, and nothing that they count is doubled."""

import inspect

import pytest
import torch
from literal import LiteralLSAM
from tiny import (
    Examples,
    Unreplayed,
    arguments,
    assert_equal,
    assert_lines_hold,
    bart,
    bert,
    blocks_of,
    largest_difference,
    out_of_reach,
    t5,
    weights,
)
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from hf_lsam import LSAMConfig, LSAMMixin, LSAMTrainer, reference
from hf_lsam.blocks import find_blocks

SEQ2SEQ = {"t5": t5, "bart": bart}


class LSAMSeq2Seq(LSAMMixin, Seq2SeqTrainer):
    pass


class LiteralSeq2Seq(LiteralLSAM, Seq2SeqTrainer):
    pass


class Full(Unreplayed, LSAMSeq2Seq):
    pass


class Calls:
    """Counts how often a block of a model really runs: its self-attention does."""

    def __init__(self, model):
        self.notes = out_of_reach(count=0)
        for block in find_blocks(model).values():
            next(
                module for name, module in block.named_modules() if name.endswith(("self_attn", "SelfAttention"))
            ).register_forward_hook(self.called)

    def called(self, *_):
        self.notes.count += 1


class Plain(TrainerCallback):
    """Notes the weights at the end of each step, and whether those that an evaluation sees are the same."""

    def __init__(self, model):
        self.model, self.after_step, self.evaluations = model, None, 0

    def on_step_end(self, *args, **kwargs):
        self.after_step = weights(self.model)

    def on_prediction_step(self, *args, **kwargs):
        self.evaluations += 1
        assert_equal(self.after_step, weights(self.model))


class Collator:
    """The tokens of each example, and what a decoder reads: its labels, one place later."""

    def __init__(self, model):
        self.model = model

    def __call__(self, examples):
        batch = torch.utils.data.default_collate(examples)
        batch["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return batch


def translate(trainer_class, model, folder, config=None, **options):
    """Train a model on sequences to sequences; returns the trainer."""
    defaults = dict(optim="sgd", max_steps=5, max_grad_norm=0.0, logging_steps=1)
    trainer = trainer_class(
        model=model,
        args=arguments(folder, Seq2SeqTrainingArguments, **{**defaults, **options}),
        data_collator=Collator(model),
        train_dataset=Examples(20, language_model=True),
        eval_dataset=Examples(4, language_model=True, seed=1),
        **({} if config is None else {"lsam_config": config}),
    )
    trainer.add_callback(Plain(model))
    trainer.train()
    return trainer


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", list(SEQ2SEQ))
def test_seq2seq_equals_the_literal_method(name, smoothing, tmp_path):
    options = dict(label_smoothing_factor=smoothing)
    lsam, literal, plain = (SEQ2SEQ[name]() for _ in range(3))
    trainer = translate(LSAMSeq2Seq, lsam, tmp_path, LSAMConfig(rho=0.1), **options)
    translate(LiteralSeq2Seq, literal, tmp_path, **options)
    translate(Seq2SeqTrainer, plain, tmp_path, **options)
    assert trainer._lsam.second_pass.replays
    assert largest_difference(weights(lsam), weights(literal)) < 1e-12
    assert largest_difference(weights(lsam), weights(plain)) > 1e-6


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", list(SEQ2SEQ))
def test_seq2seq_takes_one_pass(name, tmp_path):
    """Against the reference: the gradient of the step before is climbed, in the blocks of encoder and decoder."""
    fast, slow = SEQ2SEQ[name](), SEQ2SEQ[name]()
    translate(LSAMSeq2Seq, fast, tmp_path, LSAMConfig(rho=0.1, ascent_gradient="previous"))
    blocks = blocks_of(slow)
    assert len(blocks) == 6
    examples, state = Examples(20, language_model=True), {}
    optimizer = torch.optim.SGD(slow.parameters(), lr=1e-2)
    slow.train()
    for step in range(5):
        batches = [examples.batch(step * 4, 4)]
        reference.one_pass_lsam_step(slow, batches, optimizer, blocks, 0.1, reference.top_k(2), state)
    assert largest_difference(weights(fast), weights(slow)) < 1e-12


@pytest.mark.parametrize("selection", ["encoder.*", "decoder.*"])
@pytest.mark.parametrize("name", list(SEQ2SEQ))
def test_replay_over_encoder_and_decoder_equals_a_full_pass_2(name, selection, tmp_path):
    """With dropout, bitwise; the blocks before the perturbed one are not run again."""
    ran, results = [], []
    for is_replayed in (True, False):
        model = SEQ2SEQ[name](dropout=0.1)
        pattern = rf"(model\.)?{selection[:7]}\.(block|layers)\.2"
        config = LSAMConfig(rho=0.5, block_pattern=pattern, num_perturbed_blocks=1)
        calls = Calls(model)
        trainer = translate(LSAMSeq2Seq if is_replayed else Full, model, tmp_path, config, max_steps=3)
        assert trainer._lsam.second_pass.replays == is_replayed
        ran.append(calls.notes.count)
        results.append(weights(model))
    assert_equal(*results)
    first = 2 if selection == "encoder.*" else 5
    # Three steps. At the first one, a full pass 2 is compared with pass 1, then with a replayed one. A decoder reads
    # what the encoder returned: that this is dropped is found at the second step, whose pass 2 then runs in full. (T5
    # reads it before any block of the decoder, BART within the one that runs.)
    compared = 2 * 6
    found_out = 0 if selection == "encoder.*" else first + (name == "bart")
    assert ran == [3 * 6 + 3 * (6 - first) + compared + found_out, 3 * 12 + 6]


@pytest.mark.parametrize("name", list(SEQ2SEQ))
def test_generation_in_evaluation_sees_unperturbed_weights_and_changes_nothing(name, tmp_path):
    """Training goes on as if there had been no evaluation."""
    results = []
    for strategy in ("no", "steps"):
        model = SEQ2SEQ[name]()
        options = dict(eval_strategy=strategy, eval_steps=1, predict_with_generate=True, generation_max_length=6)
        trainer = translate(
            LSAMSeq2Seq, model, tmp_path, LSAMConfig(rho=0.5), gradient_accumulation_steps=2, max_steps=2, **options
        )
        results.append(weights(model))
        evaluations = [line for line in trainer.state.log_history if "eval_loss" in line]
        assert len(evaluations) == (0 if strategy == "no" else 2)
        assert all("forward" not in vars(block) for block in find_blocks(model).values())
    assert_equal(*results)
    seen = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Plain))
    assert seen.evaluations == 2
    # Tokens, and not a logit for each word.
    assert trainer.predict(Examples(4, language_model=True)).predictions.ndim == 2


class Theirs(Trainer):
    """A trainer of a user's own: it pops labels, counts on itself, and logs its counts."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = 0
        self.tokens = torch.zeros((), dtype=torch.long)
        self.seen = {"train": {"confusion": torch.zeros(3, 3), "losses": []}}
        self.line_at = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.steps += 1
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.1)
        self.tokens += inputs["attention_mask"].sum()
        self.seen["train"]["confusion"][labels, outputs.logits.detach().argmax(-1)] += 1
        self.seen["train"]["losses"].append(loss.item())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            self.line_at.append(self._globalstep_last_logged)
            logs |= {"steps": self.steps, "tokens": int(self.tokens), "mean": sum(self.seen["train"]["losses"])}
        super().log(logs, *args, **kwargs)


class Beneath(LSAMMixin, Theirs):
    pass


class Above(Theirs, LSAMMixin, Trainer):
    """Both passes run inside one call of `Theirs.training_step`."""


class LiteralTheirs(LiteralLSAM, Theirs):
    pass


def classify(trainer_class, folder, config=None, model=None, **options):
    model = model or bert()
    keywords = {} if config is None else {"lsam_config": config}
    if loss := options.pop("compute_loss_func", None):
        keywords["compute_loss_func"] = loss
    defaults = dict(optim="sgd", max_grad_norm=0.0, logging_steps=1)
    args = arguments(folder, **{**defaults, **options})
    trainer = trainer_class(model=model, args=args, train_dataset=Examples(16), eval_dataset=Examples(8), **keywords)
    trainer.train()
    return trainer


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("trainer_class", [Beneath, Above])
def test_a_users_trainer_keeps_its_loss_and_counts_once(trainer_class, accumulation, tmp_path):
    options = dict(gradient_accumulation_steps=accumulation, per_device_train_batch_size=4 // accumulation)
    plain = classify(Theirs, tmp_path, **options)
    literal = classify(LiteralTheirs, tmp_path, **options)
    lsam = classify(trainer_class, tmp_path, LSAMConfig(rho=0.1), **options)
    faint = classify(trainer_class, tmp_path, LSAMConfig(rho=1e-30), **options)
    assert largest_difference(weights(lsam.model), weights(literal.model)) < 1e-12
    assert largest_difference(weights(lsam.model), weights(plain.model)) > 1e-6
    assert lsam._lsam.second_pass.replays
    assert literal.tokens == 2 * plain.tokens
    assert (faint.steps, faint.tokens, faint.line_at) == (plain.steps, plain.tokens, plain.line_at)
    assert torch.equal(faint.seen["train"]["confusion"], plain.seen["train"]["confusion"])
    assert faint.seen["train"]["losses"] == plain.seen["train"]["losses"]
    assert_lines_hold(faint, plain)


@pytest.mark.usefixtures("float64")
def test_compute_loss_func_is_the_loss_of_both_passes(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.multi_margin_loss(outputs.logits, labels, reduction="sum") / num_items_in_batch

    class Literal(LiteralLSAM, Trainer):
        pass

    options = dict(compute_loss_func=loss, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    lsam = classify(LSAMTrainer, tmp_path, LSAMConfig(rho=0.1), **options)
    literal = classify(Literal, tmp_path, **options)
    assert largest_difference(weights(lsam.model), weights(literal.model)) < 1e-12
    assert largest_difference(weights(lsam.model), weights(classify(Trainer, tmp_path, **options).model)) > 1e-6


def test_the_mixin_must_come_before_the_trainer():
    with pytest.raises(TypeError, match=r"Put it first: class Wrong\(LSAMMixin, Theirs\)"):

        class Wrong(Theirs, LSAMMixin):
            pass


class Shifting(Trainer):
    """Makes its batch anew in each pass."""

    def _prepare_inputs(self, inputs):
        return super()._prepare_inputs(inputs)


class LSAMShifting(LSAMMixin, Shifting):
    pass


class Declared(LSAMShifting):
    """Its author says that the batch is the same each time."""

    def _prepare_inputs(self, inputs):
        return super()._prepare_inputs(inputs)


@pytest.mark.parametrize("previous", [False, True])
def test_a_trainer_that_makes_its_batch_in_each_pass_is_refused(previous, tmp_path):
    config = LSAMConfig(rho=0.1, ascent_gradient="previous" if previous else "current")
    with pytest.raises(NotImplementedError, match="Shifting overrides _prepare_inputs.*block_selection='none'"):
        classify(LSAMShifting, tmp_path, config)
    off = classify(LSAMShifting, tmp_path, LSAMConfig(block_selection="none"))
    assert_equal(weights(off.model), weights(classify(Trainer, tmp_path).model))
    declared = classify(Declared, tmp_path, config)
    assert_equal(weights(declared.model), weights(classify(LSAMTrainer, tmp_path, config).model))


@pytest.mark.parametrize("base", [Trainer, Seq2SeqTrainer])
def test_an_editor_sees_the_arguments_of_the_trainer_and_the_settings(base):
    ours = LSAMTrainer if base is Trainer else type("LSAMSeq2SeqTrainer", (LSAMMixin, base), {})
    shown = dict(inspect.signature(ours).parameters)
    assert shown.pop("lsam_config").kind is inspect.Parameter.KEYWORD_ONLY
    assert list(shown.values()) == list(inspect.signature(base).parameters.values())

    class Own(ours):
        def __init__(self, folder):
            super().__init__(args=arguments(folder))

    assert list(inspect.signature(Own).parameters) == ["folder"]
    assert list(inspect.signature(type("Derived", (Own,), {})).parameters) == ["folder"]
