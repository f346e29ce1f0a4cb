"""The checks of what :class:`race_attention.RaceAttention` is called with, before anything is computed of it.

The core checks its own arguments again; but the layer's convolution and rotation come before it, and take offsets and
states as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import same_shape
from .checks import check_offset_values, values_wanted
from .forms import check_offsets, check_same_device, is_tensor
from .layer_state import RaceAttentionState


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
    given = {"x": x} if context is None else {"x": x, "context": context}
    for name, tokens in given.items():
        is_tensor(name, tokens)
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
        check_same_device("context", context, x, "x")
    _check_padding(key_padding_mask, x if context is None else context, packed=cu_seqlens is not None)
    _check_packing(cu_seqlens, x)


def _check_padding(mask: Tensor | None, tokens: Tensor, *, packed: bool) -> None:
    if mask is None:
        return
    is_tensor("key_padding_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask: got {mask.dtype}, allowed is bool (True is padding)")
    allowed = list(tokens.shape[:2])
    if not same_shape(mask.shape, allowed):
        raise ValueError(f"key_padding_mask: got shape {list(mask.shape)}, allowed is {allowed}")
    if packed:
        raise ValueError("key_padding_mask: got a mask with cu_seqlens, allowed is one of them")
    check_same_device("key_padding_mask", mask, tokens, "x")


def _check_packing(cu_seqlens: Tensor | None, x: Tensor) -> None:
    if cu_seqlens is None:
        return
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens: got x of batch {x.shape[0]}, allowed is 1: packed sequences share a row")
    check_offsets("cu_seqlens", cu_seqlens, x, "x")
    if values_wanted(x.device):
        check_offset_values("cu_seqlens", cu_seqlens, x)


def check_state(state: RaceAttentionState | None, x: Tensor, rows: int, *, conv_size: int, channels: int) -> None:
    """Checks what a layer with ``channels`` of queries, keys and values goes on from.

    Args:
        state: the state, or None.
        x: [B, T, embed_dim], the tokens after it.
        rows: B, or the number of packed sequences.
        conv_size: taps of the layer's convolution, 0 for none.
        channels: of the convolution.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
    """
    if state is None:
        return
    if not isinstance(state, RaceAttentionState):
        raise TypeError(f"state: got {type(state).__name__}, allowed is RaceAttentionState")
    check_same_device("state", state.core.mass, x, "x")
    if state.core.batch != rows:
        raise ValueError(f"state: got a state of {state.core.batch} rows, allowed is {rows}")
    given = None if state.conv is None else list(state.conv.shape)
    if not conv_size and given is not None:
        raise ValueError(f"state: got conv {given}, of another layer, allowed is None: this one has no convolution")
    allowed = [rows, conv_size - 1, channels]
    if conv_size > 1 and (given is None or not same_shape(given, allowed)):
        raise ValueError(f"state: got conv {given}, allowed is {allowed}")
