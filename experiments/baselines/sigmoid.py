"""Sigmoid attention (Ramapuram et al. 2024, arXiv 2409.04431)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experiments.baselines.base import ProjectedMixer
from experiments.baselines.quadratic import visible, weighted_sum


class SigmoidMixer(ProjectedMixer):
    """sigmoid(q k^T / sqrt(D) + b) v, not normalised, with b = -log(n) (eqs. 3 and 4).

    n is the number of keys of the row. A causal model takes ``max_length`` for it, so that no output depends on
    how much text follows.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        scores = torch.einsum("bthd,bshd->bhts", query, key) * self.key_dim**-0.5
        if self.causal:
            scores = scores - math.log(self.max_length)
        elif key_mask is None:
            scores = scores - math.log(max(1, key.shape[1]))
        else:
            scores = scores - key_mask.sum(-1).clamp(min=1).log()[:, None, None, None]
        seen = visible(key.shape[1], self.causal, key_mask, key.device)
        return weighted_sum(scores.sigmoid(), value, seen)
