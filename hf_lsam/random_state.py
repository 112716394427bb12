"""The random state that a forward pass draws from: kept, and put back."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TorchRandomState:
    """States of torch's generators, on the CPU and on the model's device, at one moment."""

    cpu: Tensor
    accelerator: Tensor | None
    device: torch.device

    @classmethod
    def capture(cls, device: torch.device) -> "TorchRandomState":
        """The states now; `device` is where the model lives."""
        accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(torch.get_rng_state(), accelerator, device)

    def restore(self) -> None:
        """Set torch's generators to the captured state."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)


@dataclass(frozen=True)
class RandomState:
    """
    Torch's states and those of Python and NumPy.

    SpecAugment and BigBird's random attention draw from NumPy inside the forward pass. Reading those two takes about
    50 microseconds, torch's one: hence the two classes.
    """

    tensors: TorchRandomState
    python: tuple
    numpy: Any

    @classmethod
    def capture(cls, device: torch.device) -> "RandomState":
        """The states now; `device` is where the model lives."""
        return cls(TorchRandomState.capture(device), random.getstate(), np.random.get_state())

    def restore(self) -> None:
        """Set every generator to the captured state."""
        self.tensors.restore()
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def same_host_state(self, other: "RandomState") -> bool:
        """Whether Python's and NumPy's generators stand where they stood at `other`."""
        mine, theirs = self.numpy, other.numpy
        return (
            self.python == other.python
            and mine[2:] == theirs[2:]
            and bool(np.array_equal(mine[1], theirs[1]))
            and mine[0] == theirs[0]
        )
