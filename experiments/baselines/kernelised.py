"""Attention with a feature map: sums of features in place of a softmax, in linear time.

out_i = phi(q_i) sum_j phi(k_j) v_j^T / (phi(q_i) sum_j phi(k_j) + eps), the sums over all keys or over j <= i
(Katharopoulos et al. 2020, arXiv 2006.16236, eqs. 5 and 9).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Tokens that the causal form handles with masked scores before it moves on with sums.
CHUNK = 128


def kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
    log_decay: Tensor | None = None,
) -> Tensor:
    """Normalised linear attention of features.

    Args:
        query, key: [B, T, H, R] features, not negative.
        value: [B, T, H, D].
        causal: sums over j <= i.
        key_mask: [B, T] bool, True where a key takes part.
        eps: added to the denominator.
        log_decay: [B, T, H], at most 0; the sums are multiplied by exp(log_decay_t) before token t. Causal only.

    Returns:
        [B, T, H, D] in value's dtype; sums are float32 (float64 for float64 features).
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if key_mask is not None:
        key = key * key_mask[:, :, None, None]
    with torch.autocast(query.device.type, enabled=False):
        query, key, values = query.to(dtype), key.to(dtype), value.to(dtype)
        values = F.pad(values, (0, 1), value=1.0)  # the last column counts: the denominator
        if log_decay is not None:
            sums = _fading(query, key, values, log_decay.to(dtype))
        else:
            sums = _causal(query, key, values) if causal else _all(query, key, values)
        return (sums[..., :-1] / (sums[..., -1:] + eps)).to(value.dtype)


def _all(query: Tensor, key: Tensor, values: Tensor) -> Tensor:
    state = torch.einsum("bthr,bthd->bhrd", key, values)
    return torch.einsum("bthr,bhrd->bthd", query, state)


def _causal(query: Tensor, key: Tensor, values: Tensor) -> Tensor:
    length = query.shape[1]
    chunks = -(-length // CHUNK)
    if chunks == 0:
        return values.new_zeros(values.shape)
    pad = chunks * CHUNK - length
    query, key, values = (F.pad(x, (0, 0, 0, 0, 0, pad)).unflatten(1, (chunks, CHUNK)) for x in (query, key, values))
    states = torch.einsum("bnthr,bnthd->bnhrd", key, values)
    before = _exclusive(states)
    scores = torch.einsum("bnthr,bnshr->bnhts", query, key).tril()
    out = torch.einsum("bnhts,bnshd->bnthd", scores, values) + torch.einsum("bnthr,bnhrd->bnthd", query, before)
    return out.flatten(1, 2)[:, :length]


def _exclusive(states: Tensor) -> Tensor:
    """Sums of the chunks before each, without subtracting: that would cancel."""
    return F.pad(states.cumsum(dim=1)[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))


def _fading(query: Tensor, key: Tensor, values: Tensor, log_decay: Tensor) -> Tensor:
    """As :func:`_causal`; token j counts at token i with weight exp of the decays after j up to i."""
    length = query.shape[1]
    chunks = -(-length // CHUNK)
    if chunks == 0:
        return values.new_zeros(values.shape)
    pad = chunks * CHUNK - length
    query, key, values = (F.pad(x, (0, 0, 0, 0, 0, pad)).unflatten(1, (chunks, CHUNK)) for x in (query, key, values))
    run = F.pad(log_decay, (0, 0, 0, pad)).unflatten(1, (chunks, CHUNK)).cumsum(dim=2)  # [B, N, C, H]
    total = run[:, :, -1:]
    states = torch.einsum("bnthr,bnthd->bnhrd", key * (total - run).exp().unsqueeze(-1), values)
    before = _faded_sums(states, total[:, :, 0])
    between = run.movedim(-1, 2)  # [B, N, H, C]
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=query.device).triu(1)
    weight = (between.unsqueeze(-1) - between.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
    scores = torch.einsum("bnthr,bnshr->bnhts", query, key) * weight
    out = torch.einsum("bnhts,bnshd->bnthd", scores, values)
    faded = query * run.exp().unsqueeze(-1)
    out = out + torch.einsum("bnthr,bnhrd->bnthd", faded, before)
    return out.flatten(1, 2)[:, :length]


def _faded_sums(states: Tensor, total: Tensor) -> Tensor:
    """What is left of earlier chunks before each: [B, N, H, R, D] of states and log decays of whole chunks [B, N, H].

    As one product: a loop over chunks is unrolled by the compiler, which then takes minutes for long texts.
    """
    run = total.double().cumsum(dim=1).movedim(1, -1)  # [B, H, N], in float64 since differences are taken
    before = F.pad(run, (1, 0))[..., :-1]
    earlier = torch.ones(run.shape[-1], run.shape[-1], dtype=torch.bool, device=run.device).tril(-1)
    weight = (before.unsqueeze(-1) - run.unsqueeze(-2)).masked_fill(~earlier, -torch.inf).exp().to(states.dtype)
    return torch.einsum("bhnm,bmhrd->bnhrd", weight, states)
