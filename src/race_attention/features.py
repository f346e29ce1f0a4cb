"""Hyperplanes, soft signs, soft buckets: everything random or nonlinear about a RACE hash.

Shape letters are those of :mod:`race_attention.backends.call`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import SEEDS, size

#: Soft signs are (1 - FLOOR) * tanh(...), so no bucket is ever empty and no denominator zero.
FLOOR = 2.0**-13


def sample_hyperplanes(
    heads: int,
    tables: int,
    planes: int,
    dim: int,
    *,
    seed: int = 0,
    orthogonal: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws the hyperplanes of a RACE hash, the same numbers on every device.

    The numbers come from torch's CPU generator in float64 and are then rounded and moved.

    Args:
        heads: G, or 1 for hyperplanes shared by all heads.
        tables: L, independent hash tables.
        planes: P, hyperplanes a table; 2**P buckets each.
        dim: D, size of a query or key.
        seed: of the generator.
        orthogonal: makes the planes of a table orthogonal (blocks of ``dim`` where P > D), each with the
            length of a Gaussian vector, drawn independently: the same distribution of every single plane,
            less variance of the estimate.
        dtype: floating dtype of the result.
        device: of the result; None is torch's default device.

    Returns:
        [heads, tables, planes, dim], each entry N(0, 1).

    Raises:
        ValueError: a size is not positive. TypeError: a size is not an integer, or dtype is not floating.
    """
    for name, given in (("heads", heads), ("tables", tables), ("planes", planes), ("dim", dim)):
        size(name, given)
    size("seed", seed, *SEEDS)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: got {dtype}, allowed is a floating dtype")
    device = torch.get_default_device() if device is None else device
    generator = torch.Generator(device="cpu").manual_seed(seed)
    gaussian = torch.randn(heads, tables, planes, dim, generator=generator, dtype=torch.float64, device="cpu")
    if not orthogonal:
        return gaussian.to(device=device, dtype=dtype)
    lengths = gaussian.norm(dim=-1, keepdim=True)
    directions = torch.randn(heads, tables, planes, dim, generator=generator, dtype=torch.float64, device="cpu")
    blocks = [_orthonormal_rows(block) for block in directions.split(dim, dim=2)]
    return (torch.cat(blocks, dim=2) * lengths).to(device=device, dtype=dtype)


def _orthonormal_rows(rows: Tensor) -> Tensor:
    """Rows [..., n, dim], n <= dim, uniformly distributed and orthonormal (QR with positive diagonal)."""
    q, r = torch.linalg.qr(rows.transpose(-1, -2))
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(rows)
    return (q * signs.unsqueeze(-2)).transpose(-1, -2)


def bucket_weights(x: Tensor, hyperplanes: Tensor, beta: Tensor) -> Tensor:
    """The buckets phi of Algorithm 1, step 3, in its factorised form: the soft bucket of every token.

    phi_{l,r}(x) = prod_p (1 + c_{r,p} a_{l,p}(x)) / 2,  a = (1 - FLOOR) tanh(beta tanh(w.x)). The paper has
    FLOOR = 0. A factor is computed as (1 - FLOOR) sigmoid(+-2 beta tanh(w.x)) + FLOOR / 2, which keeps the
    relative accuracy of small ones, where 1 - |a| would cancel.

    Args:
        x: [..., G, n, D] tokens, n tokens or query heads to each key head.
        hyperplanes: [G, L, P, D], already multiplied by scale.
        beta: [G].

    Returns:
        [..., G, n, L, R], positive, summing to 1 over R.
    """
    soft_sign = torch.einsum("...gnd,glpd->...gnlp", x, hyperplanes).tanh()
    logit = 2 * beta[:, None, None, None] * soft_sign
    negative = (1 - FLOOR) * torch.sigmoid(-logit) + FLOOR / 2  # [..., G, n, L, P], the factor of sign -1
    positive = (1 - FLOOR) * torch.sigmoid(logit) + FLOOR / 2
    weights = torch.ones_like(logit[..., :1])
    for p in range(hyperplanes.shape[2]):  # bit p of the bucket is the sign of plane p
        weights = torch.cat((weights * negative[..., p : p + 1], weights * positive[..., p : p + 1]), dim=-1)
    return weights
