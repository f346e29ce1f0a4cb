"""How fast keys fade in a causal :class:`race_attention.RaceAttention` layer: kinds of decay and where they start."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import number

KINDS = ("multiscale", "learned", "per_token")


def check_decay(decay: float | str | None, causal: bool) -> float | str | None:
    """A layer's ``decay``: None, a number in (0, 1], or one of KINDS; None where the layer is not causal."""
    if decay is None:
        return None
    if not causal:
        raise ValueError(f"decay: got {decay!r} with causal=False, allowed is None there: without order nothing decays")
    if isinstance(decay, str):
        if decay not in KINDS:
            raise ValueError(f"decay: got {decay!r}, allowed is None, a number in (0, 1], or one of {KINDS}")
        return decay
    return number("decay", decay, 0.0, 1.0)


def multiscale_log_decay(heads: int, shortest: float = 16.0, longest: float | None = None) -> Tensor:
    """log_decay [heads] of time constants log-spaced from ``shortest`` to 2048 tokens.

    The last quarter of the heads (none of a single head) do not decay, or have the time constant ``longest``.
    """
    steady = max(1, heads // 4) if heads > 1 else 0
    fading = heads - steady
    exponent = torch.linspace(math.log2(shortest), 11.0, fading, dtype=torch.float64)
    last = torch.full((steady,), 0.0 if longest is None else -1.0 / longest, dtype=torch.float64)
    return torch.cat((-(2.0**-exponent), last))
