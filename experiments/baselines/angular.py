"""Angular attention, exactly: what RACE estimates (arXiv 2510.04008, section 3)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from experiments.baselines.base import ProjectedMixer
from experiments.baselines.quadratic import cosine, visible, weighted_sum


class AngularMixer(ProjectedMixer):
    """sum_j w_ij v_j / sum_j w_ij, w_ij = (1 - angle(q_i, k_j) / pi)^gamma. Quadratic.

    Args:
        gamma: the exponent, RACE's P.
    """

    def __init__(
        self, dim: int, heads: int, *, causal: bool, max_length: int, seed: int = 0, gamma: float = 8.0, **options: Any
    ) -> None:
        super().__init__(dim, heads, causal=causal, max_length=max_length, seed=seed, **options)
        if not gamma > 0:
            raise ValueError(f"gamma: got {gamma}, allowed is above 0")
        self.gamma = gamma

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        weights = (1 - torch.acos(cosine(query, key)) / math.pi) ** self.gamma
        seen = visible(key.shape[1], self.causal, key_mask, key.device)
        if seen is not None:
            weights = weights * seen
        # eps only where a query sees no key at all
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return weighted_sum(weights, value, None)
