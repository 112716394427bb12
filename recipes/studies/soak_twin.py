"""The twin of the soak: repeats the steps of the trainer with the reference."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_lsam import LSAMConfig, reference
from hf_lsam_recipes.studies.soak_stretch import BLOCKS, Stretch


class Seeded(nn.Module):
    """Wraps the model so that every pass over a micro-batch starts from the random state of its first pass."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Any], state: Tensor) -> Any:
        """The model's outputs."""
        torch.set_rng_state(state)
        return self.model(**inputs)


class Twin(TrainerCallback):
    """Repeats each step of the trainer with the reference, on a separate model."""

    def __init__(self, model: nn.Module, stretch: Stretch, optimizer: torch.optim.Optimizer):
        self.model, self.stretch, self.optimizer = Seeded(model).train(), stretch, optimizer
        self.blocks = [list(block.parameters()) for block in model.layers]  # type: ignore[union-attr]
        self.config = LSAMConfig(**stretch.config)
        self.rule = self._rule()
        self.kept: dict[str, Any] = {}
        self.faults = 0
        self.trainer: Any = None
        if stretch.clipping > 0:
            optimizer.register_step_pre_hook(self._clip)

    def _clip(self, *args: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.stretch.clipping)

    def _rule(self) -> reference.Rule:
        config = self.config
        k = config.num_perturbed_blocks
        if config.block_selection == "all":
            self.blocks = [reference.trainable(self.model)]
            return lambda norms: [0]
        if config.block_selection == "budget":
            sizes = [sum(p.numel() for p in block) for block in self.blocks]
            inside = {p for block in self.blocks for p in block}
            head = sum(
                p.numel()
                for module in self.model.modules()
                if not isinstance(module, nn.Embedding)
                for p in module.parameters(recurse=False)
                if p not in inside
            )
            return reference.budget(config.budget, k, sizes, head)
        return (reference.last if config.block_selection == "last" else reference.top_k)(k or BLOCKS)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Repeat the step of the trainer, and restore the random state."""
        soak = self.trainer.soak
        window, soak.window = soak.window, []
        self.faults += soak.fault != "none"
        random_state = torch.get_rng_state()
        self._step(state.global_step - 1, window, soak.fault)
        torch.set_rng_state(random_state)

    def _perturbs(self, step: int) -> bool:
        config, steps = self.config, self.stretch.steps
        first = config.perturb_start * steps
        inside = config.enabled and first <= step < config.perturb_end * steps
        return inside and (step - first) % config.perturb_interval == 0

    def _step(self, step: int, window: list[dict[str, Any]], fault: str) -> None:
        config, model, optimizer = self.config, self.model, self.optimizer
        if fault == "zero":
            # With a zero gradient there is no ascent, and the optimizer makes a plain step with it.
            gradients = {p: torch.zeros_like(g) for p, g in reference.gradient(model, window).items()}
            if config.ascent_gradient == "previous":
                self.kept.clear()
            reference.update(model, gradients, optimizer)
        elif config.ascent_gradient == "previous" and config.enabled:
            if not self._perturbs(step):
                self.kept.pop("selected", None)
            args = (self.blocks, config.rho, self.rule, self.kept)
            reference.one_pass_lsam_step(model, window, optimizer, *args)
        elif config.reuse_correction > 0:
            self._looksam(step, window, fault)
        elif not self._perturbs(step):
            reference.plain_step(model, window, optimizer)
        else:
            parts = [window] if config.sharpness_scope == "batch" else [[micro_batch] for micro_batch in window]
            perturbed = [self._gradient(part) for part in (parts if fault == "none" else parts[:-1])]
            # Where pass 2 fails, the plain gradient is used.
            plain = [] if fault == "none" else [reference.gradient(self.model, parts[-1])]
            mean = {
                p: torch.stack([g.get(p, torch.zeros_like(p)) for g in perturbed + plain]).mean(0)
                for p in reference.trainable(model)
                if any(p in g for g in perturbed + plain)
            }
            reference.update(model, mean, optimizer)

    def _gradient(self, batches: reference.Batches) -> dict[nn.Parameter, Tensor]:
        config = self.config
        settings = (self.blocks, config.rho, config.alpha, self.rule, config.adaptive)
        return reference.lsam_gradient(self.model, batches, *settings)

    def _looksam(self, step: int, window: list[dict[str, Any]], fault: str) -> None:
        config = self.config
        if self._perturbs(step):
            if fault != "none":
                # Where pass 2 fails, nothing is reused.
                self.kept.clear()
                reference.plain_step(self.model, window, self.optimizer)
                return
        elif not self.kept or not self.config.is_active(step, self.stretch.steps):
            reference.plain_step(self.model, window, self.optimizer)
            return
        args = (config.rho, config.perturb_interval, config.reuse_correction, step, self.kept)
        reference.looksam_step(self.model, window, self.optimizer, *args)
