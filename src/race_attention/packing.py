"""Packed sequences: several of them one after another in a row, told apart by their offsets."""

from __future__ import annotations

import torch
from torch import Tensor


def row_of_token(cu_seqlens: Tensor, length: int) -> Tensor:
    """The packed sequence that each token belongs to.

    Args:
        cu_seqlens: [n + 1] int64 offsets, rising from 0 to ``length``; empty sequences own no token.
        length: tokens in all.

    Returns:
        [length] int64, on the device of ``cu_seqlens``.
    """
    position = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
