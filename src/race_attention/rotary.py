"""Rotary positions (Su et al., arXiv 2104.09864), applied before hashing.

The hash sees angles, so rotating queries and keys by their positions makes buckets depend on distance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import row_of_token


def rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Rotates pairs (i, i + D/2) of each head by position * base**(-2i/D).

    Args:
        x: [B, T, H, D], D even.
        position: [B, T] or [1, T] integers.
        base: of the wavelengths; 10,000 is usual.

    Returns:
        [B, T, H, D], x's dtype; angles are computed in float64 (float32 on devices without it), since at
        position 2**24 a float32 angle is off by a radian.
    """
    half = x.shape[-1] // 2
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    frequency = base ** (-torch.arange(half, dtype=wide, device=x.device) / half)
    angle = (position.to(wide).unsqueeze(-1) * frequency).unsqueeze(2)  # [B, T, 1, D / 2]
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    left, right = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


def positions(x: Tensor, valid: Tensor | None, cu_seqlens: Tensor | None, offset: Tensor | None) -> Tensor:
    """The position of each token in its own sequence, padding not counted: [B or 1, T]."""
    index = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64)
        row = row_of_token(cu_seqlens, x.shape[1])
        start = cu_seqlens[:-1] if offset is None else cu_seqlens[:-1] - offset
        return (index - start[row]).unsqueeze(0)
    position = index.unsqueeze(0) if valid is None else (valid.cumsum(1) - 1).clamp(min=0)
    return position if offset is None else position + offset.unsqueeze(1)
