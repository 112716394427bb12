"""The account of `max_overhead`: steps pay into it, and perturbations are paid from it."""

from bisect import bisect_left
from dataclasses import dataclass, replace

from .config import LSAMConfig


@dataclass(frozen=True)
class Account:
    """What has been spent on second passes, in plain steps, and what the next one is expected to cost.

    Of `max_steps` steps, those from `opened` on pay in: `max_overhead * (max_steps - opened)` in all, in equal parts
    from each step that may be perturbed. A step is perturbed if the account holds `expected`. So the whole training
    costs at most what was paid in, except for the amount by which the last second pass cost more than expected.
    """

    terms: tuple[float, ...]  # the settings of the price that it was opened for
    opened: int
    expected: float
    spent: float = 0.0

    @staticmethod
    def terms_of(config: LSAMConfig) -> tuple[float, ...]:
        """The settings that say how much is paid in, and when."""
        return config.budget, config.perturb_start, config.perturb_end, config.perturb_interval

    def affords(self, step: int, config: LSAMConfig, max_steps: int) -> bool:
        """Whether the account holds enough for optimizer step `step`, one that may be perturbed."""
        steps = config.perturbed_steps(max_steps)
        steps = steps[bisect_left(steps, self.opened) :]
        paid_in = config.budget * (max_steps - self.opened) * (steps.index(step) + 1) / len(steps)
        return self.spent + self.expected <= paid_in + 1e-9  # sums of rounded numbers

    def after(self, cost: float) -> "Account":
        """The account after a step with a second pass of this `cost` (0: it was skipped)."""
        return replace(self, spent=self.spent + cost, expected=cost or self.expected)
