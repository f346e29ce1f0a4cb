"""Bits a byte of bigram and trigram statistics: what a model of a text must beat to have learned more than them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Strengths of the back-off that are tried on text held back from the counts.
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class NgramBits:
    """Bits a byte on held-out text."""

    unigram: float
    bigram: float
    trigram: float


def ngram_bits(train: Tensor, valid: Tensor) -> NgramBits:
    """Interpolated byte n-grams with Witten-Bell smoothing (Bell, Cleary and Witten 1990; Chen and Goodman 1999).

    p(x | context) = (n(context, x) + k t p(x | shorter context)) / (n(context) + k t), t the distinct
    successors of the context; a context never seen backs off entirely. The strength k of each order (1 in
    the original) is fitted on the last twentieth of ``train``, with counts from the rest; then all of it counts.

    Args:
        train: [N] uint8.
        valid: [M] uint8, M at least 3.
    """
    cut = len(train) - max(3, len(train) // 20)
    fitted, held_back = _Counts(train[:cut]), train[cut:]
    strengths: tuple[float, ...] = ()
    for _ in range(2):  # bigrams first, as trigrams back off to them
        strengths = min(((*strengths, k) for k in STRENGTHS), key=lambda s: fitted.bits(held_back, s))
    counts = _Counts(train)
    bigram, trigram = counts.bits(valid, strengths[:1]), counts.bits(valid, strengths)
    return NgramBits(counts.bits(valid, ()), bigram, trigram)


class _Counts:
    """How often each byte, pair and triple of bytes occurs in a text."""

    def __init__(self, text: Tensor) -> None:
        x = text.cpu().long()
        pairs = x[:-1] * 256 + x[1:]
        self.tables = [
            torch.bincount(x, minlength=256),
            torch.bincount(pairs, minlength=256**2),
            torch.bincount(pairs[:-1] * 256 + x[2:], minlength=256**3),
        ]
        self.totals = [table.view(-1, 256).sum(dim=1) for table in self.tables]
        self.distinct = [(table.view(-1, 256) > 0).sum(dim=1) for table in self.tables]

    def bits(self, text: Tensor, strengths: tuple[float, ...]) -> float:
        """Mean bits of the bytes of ``text`` from the third on, with len(strengths) bytes of context."""
        x = text.cpu().long()
        target, back = x[2:], (x[1:-1], x[:-2] * 256 + x[1:-1])
        probability = (self.tables[0][target].double() + 1) / (self.totals[0].double() + 256)
        for order, k in enumerate(strengths, start=1):
            context = back[order - 1]
            weight = k * self.distinct[order][context].double()
            count = self.tables[order][context * 256 + target].double()
            total = self.totals[order][context].double()
            seen = total > 0
            mixed = (count + weight * probability) / torch.where(seen, total + weight, 1.0)
            probability = torch.where(seen, mixed, probability)
        return float(-probability.log2().mean())
