"""torch's random state before a segment, so that dropout falls alike when it is computed again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Randomness:
    """The state of the CPU's generator and of one device's."""

    cpu: Tensor
    device: torch.device
    of_device: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> Randomness:
        """The state now; on the CPU, and on ``device``."""
        other = None if device.type in ("cpu", "meta") else torch.get_device_module(device).get_rng_state(device)
        return cls(torch.get_rng_state(), device, other)

    def restore(self) -> None:
        """Puts torch's generators back to it."""
        torch.set_rng_state(self.cpu)
        if self.of_device is not None:
            torch.get_device_module(self.device).set_rng_state(self.of_device, self.device)
