"""The checks of what :class:`race_attention.RaceAttention` is called with."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import same_shape


def check_inputs(
    x: Tensor,
    context: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    embed_dim: int,
    causal: bool,
) -> None:
    """Raises ValueError or TypeError naming the argument, what was given and what is allowed."""
    for name, tokens in (("x", x), ("context", context)):
        if tokens is None and name == "context":
            continue
        if not isinstance(tokens, Tensor):
            raise TypeError(f"{name}: got {type(tokens).__name__}, allowed is a Tensor")
        if not tokens.is_floating_point():
            raise TypeError(f"{name}: got {tokens.dtype}, allowed is a floating dtype")
        if tokens.ndim != 3 or tokens.shape[-1] != embed_dim:
            raise ValueError(f"{name}: got shape {list(tokens.shape)}, allowed is [B, T, {embed_dim}]")
    if context is not None:
        if causal or cu_seqlens is not None:
            why = "a causal layer" if causal else "cu_seqlens"
            raise ValueError(f"context: got a tensor with {why}, allowed is None there")
        if context.shape[0] != x.shape[0]:
            raise ValueError(f"context: got batch {context.shape[0]}, allowed is that of x, {x.shape[0]}")
    if key_padding_mask is None:
        return
    allowed = list((x if context is None else context).shape[:2])
    if key_padding_mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask: got {key_padding_mask.dtype}, allowed is bool (True is padding)")
    if not same_shape(key_padding_mask.shape, allowed):
        raise ValueError(f"key_padding_mask: got shape {list(key_padding_mask.shape)}, allowed is {allowed}")
    if cu_seqlens is not None:
        raise ValueError("key_padding_mask: got a mask with cu_seqlens, allowed is one of them")
