"""RACE attention as a mixer: :class:`race_attention.RaceAttention` under the baselines' interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from race_attention import RaceAttention
from race_attention.attention import choose_backend
from race_attention.checks import check


class RaceMixer(RaceAttention):
    """The layer itself; every keyword of it is an option (``tables``, ``planes``, ``conv_size``, ``decay``...).

    Args:
        weigh_values: multiplies each key head's value by sigmoid of a linear function of the token, an experiment: RACE
            sees the angle of a key and not its length, so that a token cannot say how much it counts. With
            ``norm_gate``, whose norm takes the scale out again, this weighs the keys.
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
        weigh_values: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, causal=causal, seed=seed, **options)
        self.max_length = max_length  # unused: the state has the same size at any length
        self.weight_proj = nn.Linear(dim, self.num_kv_heads, bias=False) if weigh_values else None
        self._weight: Tensor | None = None

    def forward(  # type: ignore[override]
        self, x: Tensor, *, key_padding_mask: Tensor | None = None, state: Any = None, return_state: bool = False
    ) -> Any:
        if self.weight_proj is not None:
            self._weight = self.weight_proj(x).sigmoid()  # for _convolve, which does not see x
        try:
            return super().forward(x, key_padding_mask=key_padding_mask, state=state, return_state=return_state)
        finally:
            self._weight = None

    def _convolve(self, *arguments: Any) -> Any:
        query, key, value, tail = super()._convolve(*arguments)
        if self._weight is not None:
            value = (value.unflatten(-1, (self.num_kv_heads, -1)) * self._weight.unsqueeze(-1)).flatten(-2)
        return query, key, value, tail

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
