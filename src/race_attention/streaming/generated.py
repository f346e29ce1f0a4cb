"""Data for measurements, of any length, from positions alone; and a checksum of results that are never kept.

Token t of head h is a row of a pool of Gaussian vectors, drawn by a hash of (t, h, seed): the same whatever the
segments, the device or the order of reading. Drawing every number anew would take longer than the attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .segments import Indexed, Segment, segment_sizes
from .sinks import Sink

_POOL = 2**14  # vectors: 8 MiB of 128 float32 stay in a cache


def mixed(x: Tensor) -> Tensor:
    """A hash of int64 numbers, the finaliser of splitmix64 (Steele et al. 2014), with arithmetic shifts."""
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)


class GeneratedStream(Indexed):
    """Queries, keys and values of random vectors, [1, t, H, D] a segment.

    Args:
        tokens: T.
        segment: tokens a segment, or the sizes of all.
        heads, dim: H = G and D = Dv.
        dtype, device: of the segments; float16 and bfloat16 values are rounded float32 ones.
        seed: of everything.
        decay: gives segments a log_decay [1, t, H], per token, of time constants around 1000 tokens.
    """

    def __init__(
        self,
        tokens: int,
        segment: int | Sequence[int],
        *,
        heads: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        decay: bool = False,
    ):
        self.tokens, self.heads, self.dim, self.decay, self.seed = tokens, heads, dim, decay, seed
        self.bounds = [0, *accumulate(segment_sizes(tokens, segment))]
        self.count = len(self.bounds) - 1
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(seed)
        self.pool = torch.randn(_POOL, dim, generator=generator).to(device=self.device, dtype=dtype)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> Segment:
        query, key, value = (self._tensor(index, kind) for kind in range(3))
        log_decay = None
        if self.decay:
            fraction = (self._hash(index, 3) & 0xFFFF).to(torch.float32) / 2**16
            log_decay = (fraction * -2e-3).unsqueeze(0)
        return Segment(query, key, value, log_decay)

    def gradients(self) -> Indexed:
        """The gradient of the outputs for each segment, [1, t, H, D]."""
        return _Gradients(self)

    def _tensor(self, index: int, kind: int) -> Tensor:
        return F.embedding(self._hash(index, kind) & (_POOL - 1), self.pool).unsqueeze(0)

    def _hash(self, index: int, kind: int) -> Tensor:
        """[t, H] int64."""
        begin, end = self.bounds[index], self.bounds[index + 1]
        place = torch.arange(begin * self.heads, end * self.heads, device=self.device)
        return mixed(place + (self.seed * 8 + kind) * 2**44).view(-1, self.heads)


class _Gradients(Indexed):
    def __init__(self, stream: GeneratedStream):
        self.stream, self.count, self.tokens, self.device = stream, stream.count, stream.tokens, stream.device

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, index: int) -> Tensor:
        return self.stream._tensor(index, 4)


class Checksum(Sink):
    """Two float64 numbers for each array: a sum over all tokens with fixed random weights, and a norm.

    A token's numbers are multiplied with a fixed random vector; the products p_t give sum(+-p_t), which sees an
    error at any one token, and sqrt(sum(p_t**2)), which says how large such a sum is. Neither depends on the
    segments beyond rounding.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.sums: dict[str, Tensor] = {}
        self._weights: dict[int, Tensor] = {}

    def write(self, pieces: Mapping[str, Tensor], start: int) -> None:
        """Adds a segment."""
        for name, x in pieces.items():
            rows = x.transpose(0, 1).flatten(1)  # [t, B * ...]
            rows = rows if rows.dtype == torch.float64 else rows.float()
            product = torch.mv(rows, self._weight(rows)).double()
            sign = (mixed(torch.arange(start, start + len(rows), device=x.device)) & 1) * 2 - 1
            new = torch.stack(((product * sign).sum(), product.square().sum()))
            self.sums[name] = self.sums[name].to(new.device) + new if name in self.sums else new

    def state(self) -> dict[str, Tensor]:
        """The sums."""
        return dict(self.sums)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes them back."""
        self.sums = dict(state)

    def numbers(self) -> dict[str, dict[str, float]]:
        """The two numbers of each array."""
        both = {name: x.cpu().tolist() for name, x in self.sums.items()}
        return {name: {"sum": total, "norm": square**0.5} for name, (total, square) in both.items()}

    def _weight(self, rows: Tensor) -> Tensor:
        size = rows.shape[1]
        if size not in self._weights or self._weights[size].device != rows.device:
            generator = torch.Generator().manual_seed(self.seed)
            self._weights[size] = torch.randn(size, generator=generator).to(rows)
        return self._weights[size]
