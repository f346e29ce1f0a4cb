"""What the baselines share: projections around an attention, and rotary positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from race_attention.convolution import convolve


class ProjectedMixer(nn.Module):
    """Projects to queries, keys and values, mixes them by :meth:`attend`, and projects back.

    Args:
        dim: E.
        heads: H; E a multiple of it.
        causal: whether token i sees only tokens up to i.
        max_length: the most tokens one call sees.
        seed: of random features.
        bias: of the four projections.
        rope: base of rotary positions on queries and keys, or None.
        conv_size: taps of a causal depthwise convolution on queries, keys and values; 0 for none.
        norm_gate: RMS norm of each head's output times silu of a linear function of the token.
        qk_norm: RMS norm of each head's queries and keys, before rotary positions.
        key_dim: size of a head's queries and keys; default that of its values, E / H.

    The last four are what RACE's mixer offers, so that methods are compared with the same surroundings.
    """

    recurrent = False
    cos: Tensor | None  # [max_length, 1, D / 2] with rope
    sin: Tensor | None

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool,
        max_length: int,
        seed: int = 0,
        bias: bool = False,
        rope: float | None = None,
        conv_size: int = 0,
        norm_gate: bool = False,
        qk_norm: bool = False,
        key_dim: int | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads: got {heads}, allowed is a divisor of dim, {dim}")
        self.heads, self.head_dim = heads, dim // heads
        self.causal, self.max_length, self.seed, self.rope = causal, max_length, seed, rope
        if key_dim is not None and key_dim < 1:
            raise ValueError(f"key_dim: got {key_dim}, allowed is 1 or more")
        self.key_dim = self.head_dim if key_dim is None else key_dim
        self.widths = (heads * self.key_dim, heads * self.key_dim, dim)
        self.qkv = nn.Linear(dim, sum(self.widths), bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        if conv_size and not causal:
            raise ValueError(f"conv_size: got {conv_size} with causal=False, allowed is 0 there")
        bound = max(conv_size, 1) ** -0.5  # as nn.Conv1d
        weight = torch.empty(sum(self.widths), conv_size).uniform_(-bound, bound)
        self.conv_weight = nn.Parameter(weight) if conv_size else None
        self.head_norm = nn.RMSNorm(self.head_dim, eps=1e-5) if norm_gate else None
        self.gate = nn.Linear(dim, dim, bias=False) if norm_gate else None
        self.query_norm, self.key_norm = (nn.RMSNorm(self.key_dim, eps=1e-5) if qk_norm else None for _ in range(2))
        # Tables, as usual: compiled code would work out a sine in float64 for each element of each batch.
        cos, sin = (None, None) if rope is None else angles(self.key_dim, rope, 0, max_length, torch.device("cpu"))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def project(self, x: Tensor, offset: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys [B, T, H, key_dim], values [B, T, H, D] of x [B, T, E], from position ``offset`` on."""
        channels = self.qkv(x)
        if self.conv_weight is not None:
            before = self.conv_weight.shape[1] - 1
            channels = convolve(F.pad(channels, (0, 0, before, 0)), self.conv_weight.to(channels.dtype))
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in channels.split(self.widths, dim=-1))
        query, key = normed(query, self.query_norm), normed(key, self.key_norm)
        if self.rope is None:
            return query, key, value
        end = offset + x.shape[1]
        if self.cos is None or self.sin is None or end > len(self.cos):  # past the tables
            return rotate(query, self.rope, offset), rotate(key, self.rope, offset), value
        cos, sin = self.cos[offset:end], self.sin[offset:end]
        return turn(query, cos, sin), turn(key, cos, sin), value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        """The method itself: [B, T, H, D] each, ``key_mask`` [B, T] True where a key takes part -> [B, T, H, D]."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, *, key_padding_mask: Tensor | None = None, state: Any = None, return_state: bool = False
    ) -> Any:
        """The mixer's call, as :mod:`experiments.baselines` states it."""
        if state is not None or return_state:
            raise ValueError(f"state: {type(self).__name__} keeps none, allowed is a mixer with recurrent = True")
        query, key, value = self.project(x)
        mask = None if key_padding_mask is None else ~key_padding_mask
        return self.out(self.gated(self.attend(query, key, value, mask), x).flatten(-2))

    def gated(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Heads' outputs [B, T, H, D] after norm and gate by x [B, T, E], where the mixer has them."""
        if self.head_norm is None or self.gate is None:
            return mixed
        gate = F.silu(self.gate(x)).unflatten(-1, (self.heads, self.head_dim))
        return normed(mixed, self.head_norm) * gate


def normed(x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    """``norm`` of x in x's dtype, which torch's fused norm wants of its weight too; x without a norm."""
    return x if norm is None else F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps)


def rotate(x: Tensor, base: float, offset: int = 0) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864, eq. 34) with the halves as the two coordinates.

    Args:
        x: [B, T, H, D], D even.
        base: wavelengths run from 2 pi to 2 pi base.
        offset: position of the first token.

    Returns:
        [B, T, H, D] in x's dtype; the angles are float64, so that far positions keep their digits.
    """
    return turn(x, *angles(x.shape[-1], base, offset, x.shape[1], x.device))


def angles(dim: int, base: float, offset: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``length`` positions from ``offset`` on, [length, 1, dim / 2] float32."""
    if dim % 2:
        raise ValueError(f"rope: got head size {dim}, allowed is an even one")
    position = torch.arange(offset, offset + length, device=device, dtype=torch.float64)
    frequency = base ** (-torch.arange(dim // 2, device=device, dtype=torch.float64) / (dim // 2))
    angle = position[:, None, None] * frequency
    return angle.cos().float(), angle.sin().float()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation by given angles, [B, T, H, D] in x's dtype."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
