"""The methods of the benchmark, by name."""

from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "plain": {"block_selection": "none"},
    "off": {"rho": 0.0},
    "sam": {"block_selection": "all"},
    "sam-every-4th": {"block_selection": "all", "perturb_interval": 4},
    "generalized-sam": {"block_selection": "all", "alpha": 0.8},
    "looksam-5": {"block_selection": "all", "perturb_interval": 5, "reuse_correction": 0.7},
    "top-1": {"num_perturbed_blocks": 1},
    "top-2": {"num_perturbed_blocks": 2},
    "top-4": {"num_perturbed_blocks": 4},
    "last-1": {"block_selection": "last", "num_perturbed_blocks": 1},
    "last-2": {"block_selection": "last", "num_perturbed_blocks": 2},
    "last-4": {"block_selection": "last", "num_perturbed_blocks": 4},
    "budget-0.1": {"block_selection": "budget", "max_overhead": 0.1, "num_perturbed_blocks": None},
    "budget-0.2": {"block_selection": "budget", "max_overhead": 0.2, "num_perturbed_blocks": None},
    "budget-0.5": {"block_selection": "budget", "max_overhead": 0.5, "num_perturbed_blocks": None},
    "one-pass-2": {"ascent_gradient": "previous"},
    "one-pass-all": {"ascent_gradient": "previous", "block_selection": "all"},
}
