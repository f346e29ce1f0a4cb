"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7): features elu(x) + 1."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.baselines.base import ProjectedMixer
from experiments.baselines.kernelised import kernel_attention
from race_attention.decay import multiscale_log_decay


class LinearMixer(ProjectedMixer):
    """phi(q_i) sum_j phi(k_j) v_j^T / (phi(q_i) sum_j phi(k_j)), phi(x) = elu(x) + 1.

    Args:
        decay: "per_token" multiplies sums and counts by a number in (0, 1) before each token, one a head and token,
            as RACE's layer does and with its start: what is compared with RACE is then the feature map alone.
            Causal only; None for the published method.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool,
        max_length: int,
        seed: int = 0,
        decay: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, causal=causal, max_length=max_length, seed=seed, **options)
        if decay not in (None, "per_token") or (decay is not None and not causal):
            raise ValueError(f"decay: got {decay!r} with causal={causal}, allowed is None, and 'per_token' if causal")
        start = torch.logit(multiscale_log_decay(heads, longest=2.0**16).exp()).float()
        self.decay_logit = nn.Parameter(start) if decay else None
        self.decay_weight = nn.Parameter(torch.randn(heads, dim) * 0.02) if decay else None
        self._log_decay: Tensor | None = None

    def forward(self, x: Tensor, **keywords: Any) -> Any:
        self._log_decay = self.log_decay(x)  # for attend, which does not see x
        try:
            return super().forward(x, **keywords)
        finally:
            self._log_decay = None

    def log_decay(self, x: Tensor) -> Tensor | None:
        """[B, T, H] of x [B, T, E]; None without decay."""
        if self.decay_logit is None or self.decay_weight is None:
            return None
        with torch.autocast(x.device.type, enabled=False):
            return F.logsigmoid(self.decay_logit + F.linear(x.to(self.decay_weight.dtype), self.decay_weight))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        query, key = F.elu(query) + 1, F.elu(key) + 1
        return kernel_attention(query, key, value, causal=self.causal, key_mask=key_mask, log_decay=self._log_decay)
