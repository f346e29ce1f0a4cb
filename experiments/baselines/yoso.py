"""YOSO (Zeng et al. 2021, arXiv 2111.09714): attention by Bernoulli sampling of hash collisions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.baselines.base import ProjectedMixer
from experiments.baselines.quadratic import cosine, visible, weighted_sum


class YosoMixer(ProjectedMixer):
    """normalise(sum_j w_ij v_j), queries and keys of unit length.

    In expectation w_ij = (1 - arccos(q_i k_j) / pi)^tau (eq. 3); sampled, w_ij is the share of ``hashes`` hashes
    of tau sign bits in which q_i and k_j collide (eq. 5). The gradient of w through the scores is
    (tau / 2) w, the paper's lower bound of the derivative, which has no pole (eq. 7). Weights are formed as a whole
    matrix, so the results are YOSO's but not the speed.

    Args:
        tau: bits of a hash.
        hashes: m; 0 for the expectation.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool,
        max_length: int,
        seed: int = 0,
        tau: int = 8,
        hashes: int = 32,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, causal=causal, max_length=max_length, seed=seed, **options)
        if tau < 1 or tau > 30:
            raise ValueError(f"tau: got {tau}, allowed is 1 to 30")
        if not 0 <= hashes < 2**15:
            raise ValueError(f"hashes: got {hashes}, allowed is 0 to {2**15 - 1}")
        self.tau, self.hashes = tau, hashes

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        similarity = cosine(query, key)
        with torch.no_grad():
            weights = self.sampled(query, key) if self.hashes else self.expected(similarity)
        weights = _LowerBoundGradient.apply(similarity, weights.to(similarity.dtype), self.tau)
        seen = visible(key.shape[1], self.causal, key_mask, key.device)
        return F.normalize(weighted_sum(weights, value, seen), dim=-1)

    def expected(self, similarity: Tensor) -> Tensor:
        """Probability that all tau bits agree, of cosines."""
        return (1 - torch.acos(similarity) / math.pi) ** self.tau

    def sampled(self, query: Tensor, key: Tensor) -> Tensor:
        """Share of the hashes in which they agree, [B, H, T, T]; new hashes each call, from torch's generator."""
        planes = torch.randn(self.hashes, self.tau, self.key_dim, device=query.device, dtype=torch.float32)
        bits = 2 ** torch.arange(self.tau, device=query.device)
        codes = [
            ((x.float() @ planes.flatten(0, 1).T).unflatten(-1, planes.shape[:2]) > 0) * bits for x in (query, key)
        ]
        of_query, of_key = (  # [hashes, B * H, T]
            code.sum(-1).permute(3, 0, 2, 1).flatten(1, 2).int().contiguous() for code in codes
        )
        return shares(of_query, of_key).unflatten(0, (len(query), -1))


@torch.library.custom_op("race_experiments::shares", mutates_args=())
def shares(of_query: Tensor, of_key: Tensor) -> Tensor:
    """Share of the hashes in which two codes agree: [M, N, T] and [M, N, S] int32 -> [N, T, S] float32.

    On a GPU by a kernel, which goes over the pairs once; torch, compiled or not, does so many times.
    """
    if of_query.is_cuda:
        from experiments.baselines import collisions

        return collisions.shares(of_query, of_key)
    count = torch.zeros(*of_query.shape[1:], of_key.shape[2], dtype=torch.int16, device=of_key.device)
    for here, there in zip(of_query, of_key, strict=True):
        count += here[:, :, None] == there[:, None, :]
    return count.float() / len(of_query)


@shares.register_fake
def _(of_query: Tensor, of_key: Tensor) -> Tensor:
    return of_query.new_empty(*of_query.shape[1:], of_key.shape[2], dtype=torch.float32)


class _LowerBoundGradient(torch.autograd.Function):
    """Passes the weights on; the gradient of the similarity is (tau / 2) times weights times theirs."""

    @staticmethod
    def forward(ctx: Any, similarity: Tensor, weights: Tensor, tau: int) -> Tensor:
        ctx.save_for_backward(weights)
        ctx.tau = tau
        return weights.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (weights,) = ctx.saved_tensors
        return upstream[0] * weights * (ctx.tau / 2), None, None
