"""The short depthwise convolution over tokens in front of the core, and its state: the last few tokens.

A convolution never reaches across the border of a sequence, and padding does not exist for it: rows are
compacted first and spread again after, whatever the pattern of the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .packing import row_of_token

_BLOCK = 1 << 18  # numbers a block on a CPU: one megabyte of float32, which stays in a core's cache


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution without padding.

    Args:
        x: [B, W - 1 + T, C].
        weight: [C, W], the last tap for the token itself, those before for earlier tokens.

    Returns:
        [B, T, C].
    """
    if torch.compiler.is_compiling():  # fuses the plain form, and would unroll a loop over blocks
        return _taps(x, weight)
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return _taps(x, weight)  # torch.func and forward mode look into plain operations alone
    out: Tensor = _Convolution.apply(x, weight)
    return out


def _taps(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution in plain operations, whose derivative fills a tensor with zeros for every tap."""
    length = x.shape[1] - weight.shape[1] + 1
    out = x[:, :length] * weight[:, 0]
    for tap in range(1, weight.shape[1]):
        out = torch.addcmul(out, x[:, tap : tap + length], weight[:, tap])
    return out


class _Convolution(torch.autograd.Function):
    """:func:`_taps` in blocks of tokens; three times as fast as it, forward and backward, at 65,536 tokens."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        length = x.shape[1] - weight.shape[1] + 1
        out = x.new_empty(x.shape[0], length, x.shape[2])
        for start, end in _blocks(out):
            block = torch.mul(x[:, start:end], weight[:, 0], out=out[:, start:end])
            for tap in range(1, weight.shape[1]):
                block.addcmul_(x[:, start + tap : end + tap], weight[:, tap])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,), (x, weight) = upstream, ctx.saved_tensors
        taps, into_x, into_weight = weight.shape[1], None, None
        if ctx.needs_input_grad[0]:  # each token reaches those after it: the same convolution, backwards
            into_x = convolve(F.pad(grad, (0, 0, taps - 1, taps - 1)), weight.flip(1))
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(weight.dtype, torch.float32)
            sums = torch.zeros(taps, weight.shape[0], dtype=wide, device=x.device)
            for start, end in _blocks(grad):
                products = [x[:, start + tap : end + tap] * grad[:, start:end] for tap in range(taps)]
                sums = sums + torch.stack([product.sum((0, 1), dtype=wide) for product in products])
            into_weight = sums.T.to(weight.dtype)
        return into_x, into_weight


def _blocks(x: Tensor) -> Iterator[tuple[int, int]]:
    """(first, end) of the blocks of tokens that [B, T, C] is worked through in."""
    batch, length, channels = x.shape
    size = max(16, _BLOCK // max(1, batch * channels)) if x.device.type == "cpu" else max(1, length)
    return ((start, min(length, start + size)) for start in range(0, length, size))


def centred(x: Tensor, weight: Tensor, valid: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Each token with its neighbours on both sides (one more before it where W is even): [B, T, C]."""
    taps = weight.shape[1]
    after = (taps - 1) // 2
    if cu_seqlens is not None:
        spread = _Gaps(cu_seqlens, x.shape[1], taps - 1)
        wide = spread.insert(x, None)
        wide = F.pad(wide, (0, 0, 0, after))
        return convolve(wide, weight)[:, spread.token - (taps - 1) + after]
    pad = (0, 0, taps - 1 - after, after)
    if valid is None:
        return convolve(F.pad(x, pad), weight)
    order = _compaction(valid)
    x = _take(x.masked_fill(~valid.unsqueeze(-1), 0), order)
    return _take(convolve(F.pad(x, pad), weight), order.argsort(dim=1))


def causal(
    x: Tensor, weight: Tensor, tail: Tensor | None, valid: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Each token with those before it, and the tail that a continuation needs.

    Args:
        x: [B, T, C]; B = 1 with cu_seqlens.
        weight: [C, W].
        tail: [rows, W - 1, C], the tokens before; None for none (zeros).
        valid: [B, T] bool, False for padding, or None.
        cu_seqlens: [rows + 1] offsets of packed sequences, or None.

    Returns:
        [B, T, C] and the new tail [rows, W - 1, C].
    """
    before = weight.shape[1] - 1
    if cu_seqlens is not None:
        spread = _Gaps(cu_seqlens, x.shape[1], before)
        wide = spread.insert(x, tail)
        return convolve(wide, weight)[:, spread.token - before], wide[0, spread.tail]
    if tail is None:
        tail = x.new_zeros(x.shape[0], before, x.shape[2])
    if valid is None:
        wide = torch.cat((tail.to(x.dtype), x), dim=1)
        return convolve(wide, weight), wide[:, wide.shape[1] - before :]
    order = _compaction(valid)
    wide = torch.cat((tail.to(x.dtype), _take(x.masked_fill(~valid.unsqueeze(-1), 0), order)), dim=1)
    last = valid.sum(1, keepdim=True) + torch.arange(before, device=x.device)
    return _take(convolve(wide, weight), order.argsort(dim=1)), _take(wide, last)


def _compaction(valid: Tensor) -> Tensor:
    """The order that moves a row's tokens before its padding and keeps theirs: [B, T]."""
    return (~valid).to(torch.uint8).argsort(dim=1, stable=True)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, t]]: [B, T, C]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


class _Gaps:
    """Packed sequences with room for ``size`` tokens before each: places in the widened row."""

    def __init__(self, cu_seqlens: Tensor, length: int, size: int):
        cu_seqlens = cu_seqlens.to(torch.int64)
        self.rows, self.size, self.length = cu_seqlens.shape[0] - 1, size, length
        position = torch.arange(length, device=cu_seqlens.device)
        row = row_of_token(cu_seqlens, length)
        self.token = position + size * (row + 1)  # [T]
        gap = torch.arange(size, device=cu_seqlens.device)
        shift = size * torch.arange(self.rows, device=cu_seqlens.device)
        self.gap = (cu_seqlens[:-1] + shift).unsqueeze(-1) + gap  # [rows, size]
        self.tail = (cu_seqlens[1:] + shift).unsqueeze(-1) + gap  # the last `size` places of each sequence

    def insert(self, x: Tensor, tail: Tensor | None) -> Tensor:
        wide = x.new_zeros(self.length + self.rows * self.size, x.shape[2])
        wide = wide.index_copy(0, self.token, x[0])
        if tail is not None:
            wide = wide.index_copy(0, self.gap.flatten(), tail.flatten(0, 1).to(x.dtype))
        return wide.unsqueeze(0)
