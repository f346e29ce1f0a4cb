"""Gradients of bfloat16 and float16 parameters, added up over many segments without losing them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WideGradients:
    """Sums of the gradients of narrow parameters in float32: a thousand segments are too many for bfloat16."""

    def __init__(self, model: nn.Module):
        narrow = (torch.bfloat16, torch.float16)
        self.parameters = [p for p in model.parameters() if p.requires_grad and p.dtype in narrow]
        self.sums: list[Tensor | None] = [None] * len(self.parameters)

    def __enter__(self) -> WideGradients:
        for i, p in enumerate(self.parameters):
            if p.grad is not None:
                self.sums[i], p.grad = p.grad.float(), None
        return self

    def collect(self) -> None:
        """Takes what one segment has added."""
        for i, p in enumerate(self.parameters):
            if p.grad is not None:
                so_far = self.sums[i]
                self.sums[i] = p.grad.float() if so_far is None else so_far.add_(p.grad)
                p.grad = None

    def __exit__(self, *_: object) -> None:
        self.collect()
        for p, total in zip(self.parameters, self.sums, strict=True):
            if total is not None:
                p.grad = total.to(p.dtype)
