"""Layer-wise SAM written out on top of any Trainer: the oracle for Trainers that are not `transformers.Trainer`."""

from transformers import Trainer

from hf_lsam import reference
from hf_lsam.blocks import find_blocks


class LiteralLSAM(Trainer):
    """
    For classes such as `class Literal(LiteralLSAM, SFTTrainer)`: the two blocks with the largest gradient norm are
    perturbed, once for all micro-batches of a step. Nothing is replayed, and whatever counts, counts twice.
    """

    rho = 0.1
    alpha = 1.0
    window = ()

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, dict(inputs), num_items_in_batch)
        self.window = [*self.window, inputs]
        if not self.accelerator.sync_gradients:
            return loss
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        plain = {p: p.grad for p in trained}
        blocks = [[p for p in block.parameters() if p in plain] for block in find_blocks(self.model).values()]
        norms = [reference.norm([plain[p] for p in block]) for block in blocks]
        selected = [p for index in reference.top_k(2)(norms) for p in blocks[index]]
        length = reference.norm([plain[p] for p in selected])
        weights = {p: p.detach().clone() for p in selected}
        for p in trained:
            p.grad = None
        for p in selected:
            p.data.add_(plain[p], alpha=self.rho / length)
        for micro_batch in self.window:
            super().training_step(model, dict(micro_batch), num_items_in_batch)
        self.window = ()
        perturbed = {p: p.grad for p in selected}
        for p in selected:
            p.data.copy_(weights[p])
        for p in trained:
            p.grad = plain[p]
        for p in selected:
            p.grad = (1 - self.alpha) * plain[p] + self.alpha * perturbed[p]
        return loss
