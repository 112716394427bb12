"""The settings of layer-wise SAM: a dataclass for `HfArgumentParser`, next to any `TrainingArguments`."""

import math
import re
from dataclasses import dataclass, fields

from transformers.hf_argparser import HfArg

BLOCK_SELECTIONS = ("none", "all", "top_k", "last", "budget")
ASCENT_GRADIENTS = ("current", "previous")
SHARPNESS_SCOPES = ("batch", "micro_batch")


@dataclass
class LSAMConfig:
    r"""How far, where and when [`LSAMTrainer`] perturbs the weights.

    With `alpha` = lambda / rho, the gradient that the optimizer gets for the selected blocks S, and for all others, is
    (Lee, KDD 2024, arXiv 2503.14205):

        selected i:  (1 - alpha) * grad_i L(w) + alpha * grad_i L(w + eps)
        others:      grad_i L(w)
        eps_i = rho * grad_i L(w) / ||grad_S L(w)||   for i in S, 0 elsewhere

    Args:
        rho (`float`, *optional*, defaults to `0.05`):
            Length of the perturbation: the Euclidean norm of `eps` over all selected weights; 0 is off. Default: SAM's
            (Foret et al., ICLR 2021), with which every run on two blocks trained (`docs/evidence.md`). A few blocks
            need a `rho` 3 to 10 times larger than all parameters do.
        alpha (`float`, *optional*, defaults to `1.0`):
            Share of the perturbed gradient in the mixed one, from 0 (plain training) to 1 (SAM). Default: SAM's.
        adaptive (`bool`, *optional*, defaults to `False`):
            ASAM's element-wise scaling (Kwon et al., ICML 2021): `eps = rho * w^2 g / || |w| g ||`. Blocks are then
            selected by the norm of `|w| g`, too. Needs a `rho` about 10 times larger.
        block_selection (`str`, *optional*, defaults to `"top_k"`):
            `"top_k"`: the blocks with the largest gradient norm (the paper). `"last"`: the last ones. `"budget"`: of
            all sets whose cost is within `max_overhead`, the one with the largest sum of squared gradient norms.
            `"all"`: every trainable parameter, embeddings and head included (SAM). `"none"`: plain training.
        num_perturbed_blocks (`int`, *optional*, defaults to `2`):
            Number of selected blocks; for `"budget"`, the maximum. `None`: all. Default: ours (the paper: 2 or 4).
        block_pattern (`str`, *optional*):
            Regular expression. The modules whose whole name it matches (`re.fullmatch`, names as in
            `model.named_modules()`) are the blocks to select from, instead of the transformer blocks.
        max_overhead (`float`, *optional*):
            The price: the most that second passes may cost in plain steps, on average over all steps of the training.
            Each step that may be perturbed pays an equal part of it into an account. A step is perturbed if the
            account holds what the last perturbation cost, and pays what its own second pass really cost. With
            `"all"` and 0.2, every 5th step is perturbed. `None`: no limit. `"budget"` has no account: each of its
            second passes is within the limit, by default 0.25 (ours).
        ascent_gradient (`str`, *optional*, defaults to `"current"`):
            `"current"`: that of the same batch, from a first pass. `"previous"`: that of the step before (AsyncSAM,
            arXiv 2503.11147, with tau = 1). A step is then a single pass at the perturbed weights, and its loss is the
            one that is logged. Needs `alpha=1`.
        sharpness_scope (`str`, *optional*, defaults to `"batch"`):
            `"batch"`: one perturbation for the whole optimizer step, over accumulation and ranks. `"micro_batch"`:
            each micro-batch is perturbed by its own gradient (m-sharpness).
        perturb_interval (`int`, *optional*, defaults to `1`):
            Perturb every n-th step. SAM at every 4th step, with `rho=0.1`, is the setting that we recommend
            (`docs/evidence.md`).
        reuse_correction (`float`, *optional*, defaults to `0.0`):
            LookSAM (Liu et al., CVPR 2022): at the steps between two perturbed ones, add the part of the last
            perturbed gradient that is orthogonal to the plain one, scaled to this share of the plain gradient's norm.
            The paper uses 0.7; 0 is off. Needs `perturb_interval > 1`.
        perturb_start (`float`, *optional*, defaults to `0.0`):
            Share of the training steps before the first perturbed one. Perturbation during warm-up hurts adaptive
            optimizers, and may keep a model with a new head at its initial loss; try 0.1 to 0.3.
        perturb_end (`float`, *optional*, defaults to `1.0`):
            Share of the training steps after which no step is perturbed.

    Raises:
        ValueError: for a setting that is out of range or conflicts with another; the message says how to resolve it.
    """

    rho: float = HfArg(default=0.05, help="Length of the perturbation; 0 is off.")
    alpha: float = HfArg(default=1.0, help="Share of the perturbed gradient, 0 (plain) to 1 (SAM).")
    num_perturbed_blocks: int | None = HfArg(default=2, help="Blocks perturbed per step; null in a YAML means all.")
    block_selection: str = HfArg(default="top_k", help="Selection rule.", metadata={"choices": BLOCK_SELECTIONS})
    block_pattern: str | None = HfArg(default=None, help="Regular expression of modules to select from, not blocks.")
    max_overhead: float | None = HfArg(
        default=None, help="Maximum cost of second passes in plain steps, on average over all steps."
    )
    ascent_gradient: str = HfArg(
        default="current", help="Gradient of this or of the previous step.", metadata={"choices": ASCENT_GRADIENTS}
    )
    sharpness_scope: str = HfArg(
        default="batch", help="One perturbation per step or per micro-batch.", metadata={"choices": SHARPNESS_SCOPES}
    )
    perturb_interval: int = HfArg(default=1, help="Perturb every n-th step.")
    reuse_correction: float = HfArg(default=0.0, help="LookSAM's scale of the reused gradient; 0 is off.")
    perturb_start: float = HfArg(default=0.0, help="Share of the training before the first perturbed step.")
    perturb_end: float = HfArg(default=1.0, help="Share of the training after which no step is perturbed.")
    adaptive: bool = HfArg(default=False, help="ASAM: scale the perturbation by the size of the weights.")

    def __post_init__(self):
        for name in ("rho", "alpha", "reuse_correction", "perturb_start", "perturb_end"):
            setattr(self, name, _number(name, getattr(self, name), float))
        self.perturb_interval = _number("perturb_interval", self.perturb_interval, int)
        if self.num_perturbed_blocks is not None:
            self.num_perturbed_blocks = _number("num_perturbed_blocks", self.num_perturbed_blocks, int)
        if self.max_overhead is not None:
            self.max_overhead = _number("max_overhead", self.max_overhead, float)
        self._check_ranges()
        self._check_combinations()

    @property
    def enabled(self) -> bool:
        """Whether any step may be perturbed; if not, training is bit-identical to the plain Trainer's."""
        return self.rho > 0 and self.alpha > 0 and self.block_selection != "none"

    @property
    def is_priced(self) -> bool:
        """Whether `max_overhead` decides which of the `perturbed_steps` are perturbed."""
        return self.max_overhead is not None and self.block_selection != "budget"

    @property
    def budget(self) -> float:
        """`max_overhead`; where it is not set, 0.25, which is what `block_selection="budget"` then keeps within."""
        return 0.25 if self.max_overhead is None else self.max_overhead

    def perturbed_steps(self, max_steps: int) -> range:
        """The optimizer steps (0-based) of `max_steps` that are perturbed, at a price as many as it pays for."""
        first, end = _steps(self.perturb_start, max_steps), _steps(self.perturb_end, max_steps)
        return range(first, end if self.enabled else first, self.perturb_interval)

    def is_perturbed(self, step: int, max_steps: int) -> bool:
        """Whether optimizer step `step` (0-based) of `max_steps` is perturbed, if the price allows it."""
        return step in self.perturbed_steps(max_steps)

    def is_active(self, step: int, max_steps: int) -> bool:
        """Whether optimizer step `step` (0-based) of `max_steps` lies between `perturb_start` and `perturb_end`."""
        return self.enabled and _steps(self.perturb_start, max_steps) <= step < _steps(self.perturb_end, max_steps)

    def _check_ranges(self):
        blocks, no_blocks = self.num_perturbed_blocks, "(block_selection='none' perturbs nothing, null means all)"
        for name, is_in_range, rule in (
            ("rho", self.rho >= 0, "is the length of the perturbation and cannot be negative"),
            ("alpha", 0 <= self.alpha <= 1, "mixes two gradients and must lie in [0, 1]"),
            ("max_overhead", self.budget > 0, "must be above 0 (in plain steps; null means no limit)"),
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
        if (pattern := self.block_pattern) is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"block_pattern {pattern!r} is not a regular expression: {error}.") from error

    def _check_combinations(self):
        is_one_pass, is_per_micro_batch = self.ascent_gradient == "previous", self.sharpness_scope == "micro_batch"
        # With alpha = 0, training is plain whatever else is set, so there is no conflict.
        if is_one_pass and 0 < self.alpha < 1:
            raise ValueError(
                "ascent_gradient='previous' computes no plain gradient to mix with the perturbed one, so alpha must "
                f"be 1, but is {self.alpha}. Set alpha=1, or ascent_gradient='current'."
            )
        if is_one_pass and is_per_micro_batch:
            raise ValueError(
                "ascent_gradient='previous' perturbs along the gradient of the whole previous step, which "
                "sharpness_scope='micro_batch' contradicts. Set sharpness_scope='batch'."
            )
        if is_one_pass and self.is_priced:
            raise ValueError(
                "ascent_gradient='previous' has no second pass, so max_overhead has nothing to limit. Set "
                "max_overhead=None, or ascent_gradient='current'."
            )
        if self.reuse_correction > 0 and self.perturb_interval == 1 and not self.is_priced:
            raise ValueError(
                "reuse_correction acts at the steps between two perturbed ones, and perturb_interval=1 leaves none. "
                "Set perturb_interval to 2 or more (LookSAM: 5), or reuse_correction=0."
            )
        if self.reuse_correction > 0 and (is_one_pass or is_per_micro_batch):
            raise ValueError(
                "reuse_correction needs ascent_gradient='current' and sharpness_scope='batch', with which both "
                "gradients of a whole step are computed. Set both, or reuse_correction=0."
            )
        if self.block_pattern is not None and self.block_selection == "all":
            raise ValueError(
                "block_selection='all' perturbs every trainable parameter, so block_pattern has no effect. To perturb "
                "every module that it matches, set block_selection='top_k' and num_perturbed_blocks=None."
            )


def _steps(share: float, max_steps: int) -> int:
    """`share` of the steps, rounded up, except for floating-point error (0.7 * 10 exceeds 7)."""
    return math.ceil(share * max_steps - 1e-9)


def _number(name: str, value, kind: type):
    """`value` as a finite `kind`; a YAML parser returns `5e-2` as a string."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, but is {value!r}.") from None
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise ValueError(f"{name} must be a finite {'integer' if kind is int else 'number'}, but is {value!r}.")
    return kind(number)
