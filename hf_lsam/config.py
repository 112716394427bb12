"""The settings of layer-wise SAM, one dataclass that `HfArgumentParser` reads beside any `TrainingArguments`."""

import math
import re
from dataclasses import dataclass, fields

from transformers.hf_argparser import HfArg

BLOCK_SELECTIONS = ("none", "all", "top_k", "last", "budget")
ASCENT_GRADIENTS = ("current", "previous")
SHARPNESS_SCOPES = ("batch", "micro_batch")


@dataclass
class LSAMConfig:
    r"""
    How far, where and when [`LSAMTrainer`] perturbs the weights before it takes the gradient.

    The gradient that the optimizer gets is, for the selected blocks S and for all the others (Lee, KDD 2024, arXiv
    2503.14205, with `alpha` = lambda / rho):

        selected i:  (1 - alpha) * grad_i L(w) + alpha * grad_i L(w + eps)
        others:      grad_i L(w)
        eps_i = rho * grad_i L(w) / ||grad_S L(w)||   for i in S, 0 elsewhere

    Args:
        rho (`float`, *optional*, defaults to `0.05`):
            Length of the perturbation in weight space (Euclidean norm over all selected weights); 0 is off. Default:
            SAM's (Foret et al., ICLR 2021), by which no run with two blocks was kept at its start
            (`docs/evidence.md`). Few blocks want 3 to 10 times what all the parameters want.
        alpha (`float`, *optional*, defaults to `1.0`):
            Share of the perturbed gradient in the mixed one, between 0 (plain training) and 1 (SAM). Default: SAM's.
        adaptive (`bool`, *optional*, defaults to `False`):
            ASAM's element-wise scaling (Kwon et al., ICML 2021): `eps = rho * w^2 g / || |w| g ||`. Every norm, that
            of the selection included, is then that of `|w| g`. Wants a `rho` about 10 times larger.
        block_selection (`str`, *optional*, defaults to `"top_k"`):
            `"top_k"`: the blocks with the largest gradient norm (the paper). `"last"`: the last ones. `"budget"`: of
            all sets within `max_overhead`, the one that holds the most squared gradient norm. `"all"`: every trainable
            parameter, embeddings and head included (SAM). `"none"`: plain training.
        num_perturbed_blocks (`int`, *optional*, defaults to `2`):
            How many blocks are selected, with `"budget"` at most. `None`: no limit. Default: ours; the paper's: 2, 4.
        block_pattern (`str`, *optional*):
            Regular expression; the modules whose whole name it matches (`re.fullmatch`, names as in
            `model.named_modules()`) are the candidates instead of the transformer blocks.
        max_overhead (`float`, *optional*, defaults to `0.25`):
            For `"budget"`: the most that the second pass may cost, in plain training steps. Default: ours.
        ascent_gradient (`str`, *optional*, defaults to `"current"`):
            `"current"`: from the same batch, in a first pass. `"previous"`: the gradient of the step before (AsyncSAM,
            arXiv 2503.11147, with tau = 1), in a single pass at the perturbed weights, whose loss is the reported one.
            Needs `alpha=1`.
        sharpness_scope (`str`, *optional*, defaults to `"batch"`):
            `"batch"`: one perturbation for the whole optimizer step, over accumulation and ranks. `"micro_batch"`:
            each micro-batch is perturbed by its own gradient (m-sharpness).
        perturb_interval (`int`, *optional*, defaults to `1`):
            Perturb at every n-th step.
        reuse_correction (`float`, *optional*, defaults to `0.0`):
            LookSAM (Liu et al., CVPR 2022): at the steps between two perturbed ones, add the part of the last
            perturbed gradient that is orthogonal to the plain one, scaled to this share of the plain gradient's norm.
            The paper uses 0.7; 0 is off. Needs `perturb_interval > 1`.
        perturb_start (`float`, *optional*, defaults to `0.0`):
            Share of the training steps before the first perturbed one. SAM during warm-up hurts adaptive optimizers,
            and can keep a run with a fresh head at its starting point for good: 0.1 to 0.3 is a good start.
        perturb_end (`float`, *optional*, defaults to `1.0`):
            Share of the training steps after which none is perturbed any more.

    Raises:
        ValueError: for a setting out of its range or at odds with another; the message names the way out.
    """

    rho: float = HfArg(default=0.05, help="Length of the perturbation; 0 is off.")
    alpha: float = HfArg(default=1.0, help="Share of the perturbed gradient, 0 (plain) to 1 (SAM).")
    num_perturbed_blocks: int | None = HfArg(default=2, help="Blocks perturbed in a step; null in a YAML is no limit.")
    block_selection: str = HfArg(default="top_k", help="Which are perturbed.", metadata={"choices": BLOCK_SELECTIONS})
    block_pattern: str | None = HfArg(default=None, help="Regular expression of modules to choose from, not blocks.")
    max_overhead: float = HfArg(default=0.25, help="For 'budget': the most that pass 2 may cost, in plain steps.")
    ascent_gradient: str = HfArg(
        default="current", help="Gradient to climb: this or the last step's.", metadata={"choices": ASCENT_GRADIENTS}
    )
    sharpness_scope: str = HfArg(
        default="batch", help="Perturb once for a step, or for a micro-batch.", metadata={"choices": SHARPNESS_SCOPES}
    )
    perturb_interval: int = HfArg(default=1, help="Perturb at every n-th step.")
    reuse_correction: float = HfArg(default=0.0, help="LookSAM's scale of the gradient that is reused; 0 is off.")
    perturb_start: float = HfArg(default=0.0, help="Share of the training before the first perturbation.")
    perturb_end: float = HfArg(default=1.0, help="Share of the training after which none is perturbed.")
    adaptive: bool = HfArg(default=False, help="ASAM: scale the perturbation by the weights' size.")

    def __post_init__(self):
        for name in ("rho", "alpha", "max_overhead", "reuse_correction", "perturb_start", "perturb_end"):
            setattr(self, name, _number(name, getattr(self, name), float))
        self.perturb_interval = _number("perturb_interval", self.perturb_interval, int)
        if self.num_perturbed_blocks is not None:
            self.num_perturbed_blocks = _number("num_perturbed_blocks", self.num_perturbed_blocks, int)
        self._check_ranges()
        self._check_combinations()

    @property
    def enabled(self) -> bool:
        """Whether any step is perturbed at all; if not, training is the plain Trainer's, bit for bit."""
        return self.rho > 0 and self.alpha > 0 and self.block_selection != "none"

    def is_active(self, step: int, max_steps: int) -> bool:
        """Whether optimizer step `step` (0-based) of `max_steps` lies between `perturb_start` and `perturb_end`."""
        first, end = _steps(self.perturb_start, max_steps), _steps(self.perturb_end, max_steps)
        return self.enabled and first <= step < end

    def is_perturbed(self, step: int, max_steps: int) -> bool:
        """Whether optimizer step `step` is perturbed: active, and a multiple of `perturb_interval` after the start."""
        first = _steps(self.perturb_start, max_steps)
        return self.is_active(step, max_steps) and (step - first) % self.perturb_interval == 0

    def _check_ranges(self):
        blocks, no_blocks = self.num_perturbed_blocks, "(block_selection='none' perturbs nothing, null is no limit)"
        for name, is_in_range, rule in (
            ("rho", self.rho >= 0, "is the length of the perturbation and cannot be negative"),
            ("alpha", 0 <= self.alpha <= 1, "mixes two gradients and must lie in [0, 1]"),
            ("max_overhead", self.max_overhead > 0, "must be above 0 (a share of a plain step)"),
            ("num_perturbed_blocks", blocks is None or blocks >= 1, f"must be at least 1 {no_blocks}"),
            ("perturb_interval", self.perturb_interval >= 1, "counts steps and must be at least 1"),
            ("reuse_correction", self.reuse_correction >= 0, "must be 0 (off) or above"),
        ):
            if not is_in_range:
                raise ValueError(f"{name} {rule}, but is {getattr(self, name)}.")
        if not 0 <= self.perturb_start < self.perturb_end <= 1:
            raise ValueError(
                "perturb_start and perturb_end are shares of the training with 0 <= perturb_start < perturb_end <= 1, "
                f"but are {self.perturb_start} and {self.perturb_end}."
            )
        for setting in fields(LSAMConfig):
            value, allowed = getattr(self, setting.name), setting.metadata.get("choices")
            if allowed is not None and value not in allowed:
                raise ValueError(f"{setting.name} must be one of {', '.join(allowed)}, but is {value!r}.")
        if self.block_pattern is not None:
            try:
                re.compile(self.block_pattern)
            except re.error as error:
                raise ValueError(f"block_pattern {self.block_pattern!r} is no regular expression: {error}.") from error

    def _check_combinations(self):
        is_one_pass, is_per_micro_batch = self.ascent_gradient == "previous", self.sharpness_scope == "micro_batch"
        # alpha = 0 is plain training whatever else is set, so it is no conflict.
        if is_one_pass and 0 < self.alpha < 1:
            raise ValueError(
                "ascent_gradient='previous' takes no plain gradient that could be mixed with the perturbed one, so "
                f"alpha must be 1, but is {self.alpha}. Set alpha=1, or ascent_gradient='current'."
            )
        if is_one_pass and is_per_micro_batch:
            raise ValueError(
                "ascent_gradient='previous' climbs the gradient of the whole step before, so "
                "sharpness_scope='micro_batch' has no meaning with it. Set sharpness_scope='batch'."
            )
        if self.reuse_correction > 0 and self.perturb_interval == 1:
            raise ValueError(
                "reuse_correction acts at the steps between two perturbed ones, but perturb_interval=1 leaves "
                "none. Set perturb_interval to 2 or more (LookSAM: 5), or reuse_correction=0."
            )
        if self.reuse_correction > 0 and (is_one_pass or is_per_micro_batch):
            raise ValueError(
                "reuse_correction keeps the difference between two gradients of one whole step: it needs "
                "ascent_gradient='current' and sharpness_scope='batch'. Set both, or reuse_correction=0."
            )
        if self.block_pattern is not None and self.block_selection == "all":
            raise ValueError(
                "block_selection='all' perturbs every trainable parameter, so block_pattern would do nothing. For "
                "every module that the pattern names, use block_selection='top_k' with num_perturbed_blocks=None."
            )


def _steps(share: float, max_steps: int) -> int:
    """`share` of the steps, rounded up, but for what only the float adds (0.7 * 10 is more than 7)."""
    return math.ceil(share * max_steps - 1e-9)


def _number(name: str, value, kind: type):
    """`value` as a finite `kind`; YAML hands over `5e-2` as a string."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, but is {value!r}.") from None
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise ValueError(f"{name} must be a finite {'integer' if kind is int else 'number'}, but is {value!r}.")
    return kind(number)
