"""Losses that do more than a model's own: pass 2 is right with them, or one clear error says what is wrong."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny import Examples, Unreplayed, arguments, bert, largest_difference, out_of_reach, training_lines, weights
from tiny_runs import LAST, distance_to_plain, run
from transformers import Trainer, TrainerCallback, Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from hf_lsam import LSAMConfig, LSAMMixin, LSAMTrainer
from hf_lsam.passes import Backward


class ReadsAnEarlyBlockLater:
    """From the second step on the loss also reads what an early block returned."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs, output_hidden_states=True)
        loss = output.loss
        if self.state.global_step >= 1:
            loss = loss + 0.1 * (output.hidden_states[-1] - output.hidden_states[2]).square().mean()
        return (loss, output) if return_outputs else loss


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_loss_that_begins_to_read_what_was_dropped_gets_a_full_pass_2(alpha, tmp_path):
    kind = type("Replayed", (ReadsAnEarlyBlockLater, LSAMTrainer), {})
    config = {**LAST, "alpha": alpha, "rho": 0.1}
    replayed = run(kind, tmp_path, config=config)
    full = run(type("Full", (Unreplayed, kind), {}), tmp_path, config=config)
    assert largest_difference(weights(replayed.model), weights(full.model)) < 1e-12
    assert all(line["lsam/skipped"] == 0 for line in training_lines(replayed))
    assert replayed._lsam.second_pass.replays and not replayed._lsam.second_pass.drops


class Sounds(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"input_values": torch.randn(400, generator=generator), "labels": index % 3}


def test_a_micro_batch_that_leaves_out_all_selected_blocks(tmp_path):
    """LayerDrop leaves out blocks at random; of two micro-batches one may then depend on no selected weight."""
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(4, 4),
        conv_kernel=(8, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        num_labels=3,
        layerdrop=0.4,
        mask_time_prob=0.0,
    )
    model = Wav2Vec2ForSequenceClassification(config)
    trainer = run(LSAMTrainer, tmp_path, model, data=Sounds(), max_steps=8, gradient_accumulation_steps=2)
    assert trainer.state.global_step == 8
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_backward_that_someone_else_has_put_in_place_is_there_again():
    accelerator = Accelerator(cpu=True)
    own, backward = accelerator.backward, Backward(accelerator, show=print)
    with backward.in_pass_2():
        assert accelerator.backward(torch.tensor(1.0)) is None
    assert accelerator.backward == own and "backward" not in vars(accelerator)
    losses = []
    accelerator.backward = losses.append
    with backward.in_pass_2():
        accelerator.backward(torch.tensor(1.0))
        accelerator.backward(torch.tensor(2.0, requires_grad=True))
    accelerator.backward("after")
    assert losses == [2.0, "after"]


class Logs:
    """Logs a figure in the loss, and counts its calls on the state of the training."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.state.calls = getattr(self.state, "calls", 0) + 1
        self.log({"own": float(loss.detach())})
        return (loss, output) if return_outputs else loss


class WeightsAtLog(TrainerCallback):
    """Notes how far the weights are, at each line, from where the step began."""

    def __init__(self):
        self.start, self.moves = {}, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.start = weights(model)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if "own" in logs:
            self.moves.append(largest_difference(self.start, weights(model)))


def test_what_a_loss_logs_and_counts_is_that_of_pass_1(tmp_path):
    lines, calls = [], []
    for base in (Trainer, LSAMTrainer):
        seen = WeightsAtLog()
        own = {"lsam_config": LSAMConfig(rho=0.5)} if base is LSAMTrainer else {}
        kind = type("Logging", (Logs, base), {})
        trainer = kind(bert(), arguments(tmp_path), train_dataset=Examples(32), callbacks=[seen], **own)
        trainer.train()
        lines.append([line["step"] for line in trainer.state.log_history if "own" in line])
        calls.append(trainer.state.calls)
        assert len(seen.moves) == len(lines[-1]) and max(seen.moves) == 0
    assert lines[0] == lines[1] == [0, 1, 2, 3]
    assert calls == [4, 4]


class ReadsUnseen(ReadsAnEarlyBlockLater):
    """The same, as an extension in C++ would: nothing is raised."""

    def compute_loss(self, *args, **kwargs):
        with torch._C.DisableTorchFunctionSubclass():
            return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_what_is_read_unseen_does_no_harm(alpha, tmp_path):
    """Pass 2 is not a number then, the plain gradient is used, and the log says so."""
    kind = type("Unseen", (ReadsUnseen, LSAMTrainer), {})
    trainer = run(kind, tmp_path, config={**LAST, "alpha": alpha}, logging_steps=1)
    assert [line["lsam/skipped"] for line in training_lines(trainer)] == [0, 1, 1, 1]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


class GradientPenalty:
    """Adds the squared gradient with respect to weights that are never selected."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        weight = model.get_input_embeddings().weight
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        loss = loss + gradient.square().sum()
        return (loss, output) if return_outputs else loss


def test_a_loss_that_differentiates_by_weights_that_are_not_selected(tmp_path):
    def model():
        return bert(blocks=6, attn_implementation="eager").double()

    distance, perturbed = distance_to_plain(GradientPenalty, tmp_path, model)
    assert distance < 1e-6
    assert not perturbed._lsam.second_pass.replays and not perturbed._lsam.second_pass.narrow
    assert perturbed._lsam.overhead == 1.0


NOTES = out_of_reach(generator=np.random.default_rng(0))


class Mixup:
    """Draws from a generator of a library."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss * NOTES.generator.uniform()
        return (loss, output) if return_outputs else loss


def test_a_loss_that_pass_2_cannot_repeat_is_told(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("hf_lsam.second_pass.logger.warning_once", messages.append)
    trainer = run(type("Drawing", (Mixup, LSAMTrainer), {}), tmp_path)
    assert not trainer._lsam.second_pass.replays
    message = messages[0]
    assert message.startswith("Pass 2 does not repeat pass 1 of Bert") and "generator of its own" in message


class AttacksEmbeddings(Trainer):
    """FGM as it is commonly written: a second backward pass at embeddings that are moved along their gradient."""

    attacks = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, dict(inputs), num_items_in_batch)
        weight = model.get_input_embeddings().weight
        if weight.requires_grad and weight.grad is not None:
            self.attacks += 1
            own = weight.data.clone()
            weight.data.add_(weight.grad / weight.grad.norm())
            super().training_step(model, dict(inputs), num_items_in_batch)
            weight.data = own
        return loss


def test_an_attack_on_the_embeddings_is_made_in_both_passes_and_counts_once(tmp_path):
    plain = run(AttacksEmbeddings, tmp_path / "plain")
    perturbed = run(type("Attacking", (LSAMMixin, AttacksEmbeddings), {}), tmp_path, config={**LAST, "rho": 0.0})
    assert plain.attacks == perturbed.attacks == 4
    perturbed = run(type("Attacking", (LSAMMixin, AttacksEmbeddings), {}), tmp_path, config=LAST)
    assert perturbed.attacks == 4
