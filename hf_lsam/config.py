"""The settings of layer-wise SAM, one dataclass that `HfArgumentParser` reads beside any `TrainingArguments`."""

import math
import re
from dataclasses import dataclass, field

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

    > Parameters that control the perturbation

    Args:
        rho (`float`, *optional*, defaults to `0.05`):
            Length of the perturbation in weight space (Euclidean norm over all selected weights). 0 turns the method
            off. Default: SAM's (Foret et al., ICLR 2021); no run with two blocks was kept at its start by it
            (`docs/evidence.md`). Not comparable between selections: few blocks want 3 to 10 times what all the
            parameters want.
        alpha (`float`, *optional*, defaults to `1.0`):
            Share of the perturbed gradient in the mixed one, between 0 (plain training) and 1 (SAM). Default: SAM's.
        adaptive (`bool`, *optional*, defaults to `False`):
            ASAM's element-wise scaling (Kwon et al., ICML 2021): `eps = rho * w^2 g / || |w| g ||`. Every norm, that
            of the selection included, is then the norm of `|w| g`. Wants a `rho` about 10 times larger.

    > Parameters that control which blocks are perturbed

    Args:
        block_selection (`str`, *optional*, defaults to `"top_k"`):
            `"top_k"`: the blocks with the largest gradient norm (the paper). `"last"`: the last ones. `"budget"`: of
            all sets within `max_overhead`, the one that holds the most squared gradient norm. `"all"`: every trainable
            parameter, embeddings and head included (SAM). `"none"`: plain training.
        num_perturbed_blocks (`int`, *optional*, defaults to `2`):
            How many blocks `"top_k"` and `"last"` select, and the most that `"budget"` may. `None`: no limit. Default:
            ours; the paper uses 2 and 4.
        block_pattern (`str`, *optional*):
            Regular expression; the modules whose whole name it matches (`re.fullmatch`, names as in
            `model.named_modules()`) are the candidates instead of the transformer blocks.
        max_overhead (`float`, *optional*, defaults to `0.25`):
            For `"budget"`: the most that the second pass may cost, in plain training steps. Default: ours.

    > Parameters that control when, and on what, the ascent gradient is taken

    Args:
        ascent_gradient (`str`, *optional*, defaults to `"current"`):
            `"current"`: from the same batch, in a first pass. `"previous"`: the gradient of the step before (AsyncSAM,
            arXiv 2503.11147, with tau = 1): one pass, no extra cost, needs `alpha=1`. The reported loss is then the
            loss at the perturbed weights.
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

    rho: float = field(default=0.05, metadata={"help": "Length of the perturbation; 0 is off."})
    alpha: float = field(default=1.0, metadata={"help": "Share of the perturbed gradient, 0 (plain) to 1 (SAM)."})
    num_perturbed_blocks: int | None = field(
        default=2, metadata={"help": "Blocks that are perturbed in a step; null in a YAML is no limit."}
    )
    block_selection: str = field(
        default="top_k", metadata={"help": "Which blocks are perturbed.", "choices": list(BLOCK_SELECTIONS)}
    )
    block_pattern: str | None = field(
        default=None, metadata={"help": "Regular expression of the module names that are candidates, not the blocks."}
    )
    max_overhead: float = field(
        default=0.25, metadata={"help": "For 'budget': the most that pass 2 may cost, in plain steps."}
    )
    ascent_gradient: str = field(
        default="current",
        metadata={
            "help": "Gradient to climb: of this batch (two passes) or of the step before (one pass).",
            "choices": list(ASCENT_GRADIENTS),
        },
    )
    sharpness_scope: str = field(
        default="batch",
        metadata={
            "help": "What one perturbation is for: an optimizer step or a micro-batch.",
            "choices": list(SHARPNESS_SCOPES),
        },
    )
    perturb_interval: int = field(default=1, metadata={"help": "Perturb at every n-th step."})
    reuse_correction: float = field(
        default=0.0,
        metadata={"help": "LookSAM's scale of the gradient part reused between perturbed steps; 0 is off."},
    )
    perturb_start: float = field(
        default=0.0, metadata={"help": "Share of the training before the first perturbation."}
    )
    perturb_end: float = field(default=1.0, metadata={"help": "Share of the training after which none is perturbed."})
    adaptive: bool = field(default=False, metadata={"help": "ASAM: scale the perturbation by the weights' size."})

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
        if self.rho < 0:
            raise ValueError(f"rho is the length of the perturbation and cannot be negative, but is {self.rho}.")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha mixes two gradients and must lie in [0, 1], but is {self.alpha}.")
        if self.max_overhead <= 0:
            raise ValueError(f"max_overhead must be above 0 (a share of a plain step), but is {self.max_overhead}.")
        if self.num_perturbed_blocks is not None and self.num_perturbed_blocks < 1:
            raise ValueError(
                f"num_perturbed_blocks must be at least 1, but is {self.num_perturbed_blocks}. "
                "Use block_selection='none' to perturb nothing, or null for no limit."
            )
        if self.perturb_interval < 1:
            raise ValueError(f"perturb_interval counts steps and must be at least 1, but is {self.perturb_interval}.")
        if self.reuse_correction < 0:
            raise ValueError(f"reuse_correction must be 0 (off) or above, but is {self.reuse_correction}.")
        if not 0 <= self.perturb_start < self.perturb_end <= 1:
            raise ValueError(
                "perturb_start and perturb_end are shares of the training with 0 <= perturb_start < perturb_end <= 1, "
                f"but are {self.perturb_start} and {self.perturb_end}."
            )
        for name, allowed in (
            ("block_selection", BLOCK_SELECTIONS),
            ("ascent_gradient", ASCENT_GRADIENTS),
            ("sharpness_scope", SHARPNESS_SCOPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, but is {getattr(self, name)!r}.")
        if self.block_pattern is not None:
            try:
                re.compile(self.block_pattern)
            except re.error as error:
                raise ValueError(f"block_pattern {self.block_pattern!r} is no regular expression: {error}.") from error

    def _check_combinations(self):
        if self.ascent_gradient == "previous":
            # alpha = 0 is plain training whatever else is set, so it is no conflict.
            if 0 < self.alpha < 1:
                raise ValueError(
                    "ascent_gradient='previous' takes one gradient a step, at the perturbed weights: there is no "
                    f"plain gradient to mix it with, so alpha must be 1, but is {self.alpha}. Set alpha=1, or "
                    "ascent_gradient='current'."
                )
            if self.sharpness_scope == "micro_batch":
                raise ValueError(
                    "ascent_gradient='previous' climbs the gradient of the whole step before, so "
                    "sharpness_scope='micro_batch' has no meaning with it. Set sharpness_scope='batch'."
                )
        if self.reuse_correction > 0:
            if self.perturb_interval == 1:
                raise ValueError(
                    "reuse_correction acts at the steps between two perturbed ones, but perturb_interval=1 leaves "
                    "none. Set perturb_interval to 2 or more (LookSAM: 5), or reuse_correction=0."
                )
            if self.ascent_gradient == "previous" or self.sharpness_scope == "micro_batch":
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
