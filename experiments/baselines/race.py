"""RACE attention as a mixer: :class:`race_attention.RaceAttention` under the baselines' interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from race_attention import RaceAttention


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
