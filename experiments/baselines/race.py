"""RACE attention as a mixer: :class:`race_attention.RaceAttention` under the baselines' interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from race_attention import RaceAttention
from race_attention.attention import choose_backend
from race_attention.checks import check


class RaceMixer(RaceAttention):
    """The layer itself; every keyword of it is an option (``tables``, ``planes``, ``conv_size``, ``decay``...)."""

    recurrent = True

    def __init__(self, dim: int, heads: int, *, causal: bool, max_length: int, seed: int = 0, **options: Any) -> None:
        super().__init__(dim, heads, causal=causal, seed=seed, **options)
        self.max_length = max_length  # unused: the state has the same size at any length

    def forward(  # type: ignore[override]
        self, x: Tensor, *, key_padding_mask: Tensor | None = None, state: Any = None, return_state: bool = False
    ) -> Any:
        return super().forward(x, key_padding_mask=key_padding_mask, state=state, return_state=return_state)

    @torch.no_grad()
    def backend(self, dtype: torch.dtype) -> str:
        """The library's backend that serves this layer's calls, for tokens of ``dtype``, where its parameters lie."""
        tokens = torch.zeros(1, 2, self.num_heads, self.head_dim, dtype=dtype, device=self.hyperplanes.device)
        log_decay = tokens.new_zeros(1, 2, self.num_heads, dtype=torch.float32) if self.decay is not None else None
        return choose_backend(
            check(
                tokens,
                tokens,
                tokens,
                torch.ones_like(self.hyperplanes),  # not what it learned, which may be NaN
                1.0,
                causal=self.causal,
                scale=self.scale,
                log_decay=log_decay,
                key_mask=None,
                cu_seqlens=None,
                cu_seqlens_key=None,
                initial_state=None,
                return_state=False,
                readout=self.readout,
            )
        )
