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
        [B, T, H, D], x's dtype.
    """
    return turn(x, *cosines(position, x.shape[-1] // 2, base, x.dtype))


def cosines(position: Tensor, half: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position * base**(-i/half), the angles of tokens of ``dtype``.

    Args:
        position: [B or 1, T] integers.
        half: D / 2.
        base: as for :func:`rotate`.
        dtype: float64 gives float64, any other float32.

    Returns:
        Two of [B or 1, T, 1, D / 2]; angles are computed in float64 (float32 on devices without it), since at
        position 2**24 a float32 angle is off by a radian.
    """
    wide = dtype == torch.float64
    if torch.compiler.is_compiling():
        # A call that the compiler does not look into: otherwise it works out powers and sines in float64 for each
        # element of each head and batch, forward and backward (17.8 ms a step of six layers, 12.0 without rotation).
        found: tuple[Tensor, Tensor] = torch.ops.race_attention.rotary_cosines(position, half, base, wide)
        return found
    return _cosines(position, half, base, wide)


def _cosines(position: Tensor, half: int, base: float, wide: bool) -> tuple[Tensor, Tensor]:
    exact = torch.float32 if position.device.type == "mps" else torch.float64
    frequency = base ** (-torch.arange(half, dtype=exact, device=position.device) / half)
    angle = (position.to(exact).unsqueeze(-1) * frequency).unsqueeze(2)  # [B, T, 1, D / 2]
    dtype = torch.float64 if wide else torch.float32
    return angle.cos().to(dtype), angle.sin().to(dtype)


_library = torch.library.Library("race_attention", "FRAGMENT")
_library.define("rotary_cosines(Tensor position, int half, float base, bool wide) -> (Tensor, Tensor)")
_library.impl("rotary_cosines", _cosines, "CompositeExplicitAutograd")


@torch.library.register_fake("race_attention::rotary_cosines", lib=_library)
def _(position: Tensor, half: int, base: float, wide: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if wide else torch.float32
    cos, sin = (position.new_empty((*position.shape, 1, half), dtype=dtype) for _ in range(2))
    return cos, sin


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation of x [B, T, H, D] by angles of :func:`cosines`; computed in their dtype, or x's if that is wider."""
    dtype = torch.promote_types(x.dtype, cos.dtype)
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
