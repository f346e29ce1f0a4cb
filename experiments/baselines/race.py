"""RACE attention as a mixer: :class:`race_attention.RaceAttention` under the baselines' interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.baselines.base import normed
from race_attention import RaceAttention, race_attention
from race_attention.attention import choose_backend
from race_attention.checks import check


class RaceMixer(RaceAttention):
    """The layer itself; every keyword of it is an option (``tables``, ``planes``, ``conv_size``, ``decay``...).

    What follows is not in the layer, and tried here first:

    Args:
        qk_norm: RMS norm of each head's queries and keys, after the convolution and before rotary positions.
        contrast: subtracts a part of the mean of the values seen, equally weighed, from each head's output; the part is
            learned, one number a head, from 0. Weights may then be below zero.
        wide_core: the core computes in float32 under autocast too.
    """

    recurrent = True

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool,
        max_length: int,
        seed: int = 0,
        qk_norm: bool = False,
        contrast: bool = False,
        wide_core: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, causal=causal, seed=seed, **options)
        self.max_length = max_length  # unused: the state has the same size at any length
        self.wide_core = wide_core
        self.query_norm, self.key_norm = (nn.RMSNorm(self.head_dim, eps=1e-5) if qk_norm else None for _ in range(2))
        self.contrast_bias = nn.Parameter(torch.zeros(self.num_heads, 1)) if contrast else None

    def forward(  # type: ignore[override]
        self, x: Tensor, *, key_padding_mask: Tensor | None = None, state: Any = None, return_state: bool = False
    ) -> Any:
        tried = self.wide_core or self.contrast_bias is not None
        if tried and (state is not None or return_state):
            raise ValueError("state: got one asked for or given, allowed is none with contrast or wide_core")
        return super().forward(x, key_padding_mask=key_padding_mask, state=state, return_state=return_state)

    def _convolve(self, *given: Any) -> Any:
        query, key, value, tail = super()._convolve(*given)
        if self.query_norm is not None:
            query = normed(query.unflatten(-1, (-1, self.head_dim)), self.query_norm).flatten(-2)
            key = normed(key.unflatten(-1, (-1, self.head_dim)), self.key_norm).flatten(-2)
        return query, key, value, tail

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Any:
        if self.wide_core:
            with torch.autocast(query.device.type, enabled=False):
                wide: Any = race_attention(query.float(), key.float(), value.float(), **keywords)
                return wide.to(value.dtype)
        out = super()._attend(query, key, value, **keywords)
        if self.contrast_bias is None:
            return out
        # A query of zeros lies in all buckets alike, so that it sees the keys equally, but for their decay.
        keywords |= {"hyperplanes": keywords["hyperplanes"][:, :1, :1].detach(), "beta": keywords["beta"].detach()}
        mean = super()._attend(torch.zeros_like(query), key.detach(), value, **keywords)
        return out - self.contrast_bias.to(out.dtype) * mean

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
