"""Linformer (Wang et al. 2020, arXiv 2006.04768): keys and values projected along the length."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.baselines.base import ProjectedMixer


class LinformerMixer(ProjectedMixer):
    """softmax(q (E K)^T / sqrt(D)) (F V), E and F [k, max_length], shared by the heads (eq. 7, headwise sharing).

    Not causal: a projected key mixes all positions. Shorter texts use the first columns; padding is projected
    as zeros.

    Args:
        rank: k.
        share: uses E for the values too (key-value sharing).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool,
        max_length: int,
        seed: int = 0,
        rank: int = 64,
        share: bool = False,
        **options: Any,
    ) -> None:
        if causal:
            raise ValueError("causal: got True, allowed is False: a projected key mixes all positions")
        super().__init__(dim, heads, causal=causal, max_length=max_length, seed=seed, **options)
        if not 1 <= rank <= max_length:
            raise ValueError(f"rank: got {rank}, allowed is 1 to max_length, {max_length}")
        self.key_projection = nn.Parameter(torch.randn(rank, max_length) * max_length**-0.5)
        self.value_projection = None if share else nn.Parameter(torch.randn(rank, max_length) * max_length**-0.5)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        length = key.shape[1]
        if length > self.max_length:
            raise ValueError(f"x: got {length} tokens, allowed are max_length = {self.max_length}")
        if key_mask is not None:
            key, value = (x * key_mask[:, :, None, None] for x in (key, value))
        by_key = self.key_projection
        by_value = by_key if self.value_projection is None else self.value_projection
        keys = torch.einsum("kt,bthd->bhkd", by_key[:, :length].to(key.dtype), key)
        values = torch.einsum("kt,bthd->bhkd", by_value[:, :length].to(value.dtype), value)
        return F.scaled_dot_product_attention(query.transpose(1, 2), keys, values).transpose(1, 2)
