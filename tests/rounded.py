"""The oracle with the roundings of a narrower width: how far they alone move a result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from race_attention import testing
from race_attention.backends import reference
from race_attention.features import bucket_weights

#: Soft buckets and outputs, kept in the inputs' dtype, are off by such a part: products of factors by some roundings.
KEPT = {torch.float64: 2.0**-51, torch.float32: 2.0**-22, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
#: Likewise the numbers that a projection adds up, and soft signs.
SUMS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-18, torch.float16: 2.0**-18}


@contextlib.contextmanager
def arithmetic(dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Within it the numbers of the oracle, and of the reference in float64, are off as ``dtype`` rounds, at random.

    Soft buckets and outputs move by at most KEPT, the numbers of a projection and soft signs by SUMS. Gradients go
    back by what was rounded.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, roundoff: float) -> Tensor:
        return 1 + roundoff * (2 * torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like.device) - 1)

    def sides(x: Tensor, hyperplanes: Tensor, beta: Tensor, floor: float) -> tuple[Tensor, ...]:
        x, hyperplanes = x * noise(x, SUMS[dtype]), hyperplanes * noise(hyperplanes, SUMS[dtype])
        hyperplanes = hyperplanes.repeat_interleave(x.shape[2] // hyperplanes.shape[0], 0)
        sign = torch.einsum("bthd,hlpd->bthlp", x, hyperplanes)
        sign = _Sign.apply(sign, noise(sign, SUMS[dtype]))
        logit = 2 * beta.repeat_interleave(x.shape[2] // beta.shape[-1], -1)[..., None, None] * sign
        side = ((1 - floor) * logit.sigmoid() + floor / 2, (1 - floor) * (-logit).sigmoid() + floor / 2)
        return tuple(x * noise(x, KEPT[dtype]) for x in side)

    def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
        return _Quotient.apply(numerator, denominator, noise(numerator, KEPT[dtype]))

    def weights(*arguments: Tensor) -> Tensor:
        exact = bucket_weights(*arguments)
        return exact * noise(exact, KEPT[dtype])

    def over(numerator: Tensor, denominator: Tensor, least: Any = None) -> Tensor:
        return divide(numerator, denominator)

    with (
        mock.patch.object(reference, "bucket_weights", weights),
        mock.patch.object(reference, "_over", over),
        mock.patch.object(testing, "_side_probabilities", sides),
        mock.patch.object(testing, "_divide", divide),
    ):
        yield


class _Sign(torch.autograd.Function):
    """tanh whose derivative 1 - tanh(x)**2 goes by the rounded one: of a saturated token it has no digits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, noise: Tensor) -> Tensor:
        ctx.save_for_backward((x.tanh() * noise).clamp(-1, 1))
        return x.tanh() * noise

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * (1 - ctx.saved_tensors[0] ** 2), None


class _Quotient(torch.autograd.Function):
    """A quotient whose rounded value its own gradient goes by; 0 where the denominator is."""

    @staticmethod
    def forward(ctx: Any, numerator: Tensor, denominator: Tensor, noise: Tensor) -> Tensor:
        inverse = torch.where(denominator > 0, 1 / denominator, 0.0)
        quotient = numerator * inverse * noise
        ctx.save_for_backward(inverse, quotient)
        return quotient

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        inverse, quotient = ctx.saved_tensors
        return gradient * inverse, -(gradient * quotient).sum(-1, keepdim=True) * inverse, None
