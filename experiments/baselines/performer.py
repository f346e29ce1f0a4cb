"""Performer (Choromanski et al. 2021, arXiv 2009.14794): FAVOR+, positive orthogonal random features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from experiments.baselines.base import ProjectedMixer
from experiments.baselines.kernelised import kernel_attention


class PerformerMixer(ProjectedMixer):
    """phi(x) = exp(w x' - |x'|^2 / 2) / sqrt(m), x' = x / D^(1/4), so that E phi(q) phi(k) = exp(q k / sqrt(D)).

    Lemma 1 and section 2.4 of the paper; the w are drawn orthogonal in blocks of D, with the lengths of Gaussian
    vectors (section 2.3), once from the seed, one draw for all heads. As in the authors' code, a maximum is
    subtracted in the exponent, which the normalisation cancels, and ``eps`` is added to the features.

    Args:
        features: m.
        eps: added to each feature.
    """

    projection: Tensor  # [m, D]

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool,
        max_length: int,
        seed: int = 0,
        features: int = 64,
        eps: float = 1e-4,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, causal=causal, max_length=max_length, seed=seed, **options)
        if features < 1:
            raise ValueError(f"features: got {features}, allowed is 1 or more")
        self.eps = eps
        self.register_buffer("projection", orthogonal_gaussian(features, self.key_dim, seed))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        query_features = self.features(query, over=(-1,))
        # One maximum for all keys of a head, so that it is a common factor; a causal model may not look for it
        # among later keys. It needs none: the exponent is at most |w|^2 / 2, about D / 2.
        key_features = self.features(key, over=None if self.causal else (-3, -1), mask=key_mask)
        # the subtracted maxima make true sums tiny: nothing but rows without any key needs an eps
        return kernel_attention(query_features, key_features, value, causal=self.causal, key_mask=key_mask, eps=1e-30)

    def features(self, x: Tensor, over: tuple[int, ...] | None, mask: Tensor | None = None) -> Tensor:
        """[B, T, H, D] -> [B, T, H, m], up to a factor that is constant over the dimensions ``over``, if any."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32)) * self.key_dim**-0.25
            exponent = x @ self.projection.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2
            if over is not None:
                seen = exponent if mask is None else exponent.masked_fill(~mask[:, :, None, None], -1e30)
                exponent = exponent - seen.detach().amax(dim=over, keepdim=True)
            return (exponent.clamp(max=80.0).exp() + self.eps) * self.projection.shape[0] ** -0.5


def orthogonal_gaussian(rows: int, dim: int, seed: int) -> Tensor:
    """[rows, dim], each row distributed as N(0, I), the rows of each block of ``dim`` orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-rows // dim)):
        q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
        blocks.append((q * r.diagonal().sign()).T)
    directions = torch.cat(blocks)[:rows]
    lengths = torch.randn(rows, dim, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (directions * lengths).float()
