"""What methods that form the whole matrix of weights share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def visible(length: int, causal: bool, key_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys each query sees, bool, to broadcast over [B, H, T, T]; None for all."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril() if causal else None
    if key_mask is None:
        return seen
    keys = key_mask[:, None, None, :]
    return keys if seen is None else seen & keys


def weighted_sum(weights: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
    """Weights [B, H, T, T] on values [B, T, H, D] -> [B, T, H, D]; unseen keys weigh nothing."""
    if seen is not None:
        weights = weights * seen
    return torch.einsum("bhts,bshd->bthd", weights.to(value.dtype), value)


def cosine(query: Tensor, key: Tensor) -> Tensor:
    """Cosines of the angles, [B, H, T, T], float32 or wider, kept off +-1 where the angle has no derivative."""
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query, key = (F.normalize(x.to(wide), dim=-1) for x in (query, key))
        return torch.einsum("bthd,bshd->bhts", query, key).clamp(-1 + 1e-6, 1 - 1e-6)
