"""``scaled_dot_product_race``: RACE Attention with the call of torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import flag, number
from .attention import race_attention
from .forms import check_same_device, is_tensor, shape_of


def scaled_dot_product_race(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    hyperplanes: Tensor,
    beta: float | Tensor,
) -> Tensor:
    """:func:`race_attention` for code written around ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        query: [B, H, Tq, D].
        key: [B, G, Tk, D]; G = H, or a divisor of it with ``enable_gqa``.
        value: [B, G, Tk, Dv].
        attn_mask: bool, True takes part, broadcasting to [B, H, Tq, Tk], the same for all queries (and for
            the query heads that share a key head): which keys take part, nothing else, since there is no
            matrix of scores to mask. One with several rows for the queries must be an expanded one, or have
            equal rows, which is looked at (on a GPU that waits for it). Unlike torch, it may go with is_causal.
        dropout_p: probability with which a key is left out, mass and value together, per batch row, key head
            and token; whenever it is above 0, as in torch.
        is_causal: a query sees the keys up to its own position; Tq == Tk.
        scale: multiplies the projections on hyperplanes; None is 1, the paper's. (It does not divide by
            sqrt(D): nothing like a dot product of query and key is taken.)
        enable_gqa: allows G < H.
        hyperplanes: [G or 1, L, P, D], see :func:`sample_hyperplanes`.
        beta: in (0, 1e4]: a number, a scalar tensor or [G].

    Returns:
        [B, H, Tq, Dv] in the query's dtype.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        is_tensor(name, x)
        if x.ndim != 4:
            raise ValueError(f"{name}: got shape {shape_of(x)}, allowed is [B, heads, T, size]")
    number("dropout_p", dropout_p, 0.0, 1.0, "[]")
    flag("is_causal", is_causal)
    flag("enable_gqa", enable_gqa)
    heads, groups = query.shape[1], key.shape[1]
    if groups != heads and not enable_gqa:
        raise ValueError(f"enable_gqa: got False with {heads} query and {groups} key heads, allowed is True there")
    if min(heads, groups) < 1 or heads % groups:
        raise ValueError(f"query: got H = {heads} heads, allowed is a multiple of the key's G = {groups}, 1 or more")
    key_mask = None if attn_mask is None else _key_mask(attn_mask, query, key)
    if dropout_p > 0:
        batch, groups, length, _ = key.shape
        kept = torch.rand(batch, length, groups, device=key.device) >= dropout_p
        key_mask = kept if key_mask is None else kept & (key_mask if key_mask.ndim == 3 else key_mask.unsqueeze(-1))
    out = race_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        hyperplanes,
        beta,
        causal=is_causal,
        scale=1.0 if scale is None else scale,
        key_mask=key_mask,
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def _key_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """[B, Tk] or [B, Tk, G] from a mask that broadcasts to [B, H, Tq, Tk]."""
    is_tensor("attn_mask", mask)
    check_same_device("attn_mask", mask, query)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"attn_mask: got {mask.dtype}, allowed is torch.bool: RACE Attention has no scores to add a mask to"
        )
    batch, heads, length, _ = query.shape
    groups, length_key = key.shape[1:3]
    try:
        full = mask.expand(batch, heads, length, length_key)
    except RuntimeError:
        raise ValueError(
            f"attn_mask: got shape {shape_of(mask)}, allowed broadcasts to {[batch, heads, length, length_key]}"
        ) from None
    row = full[:, :, :1] if length else full.new_ones(batch, heads, 1, length_key)
    if length > 1 and full.stride(2) != 0 and not bool((full == row).all()):
        raise ValueError(
            "attn_mask: got a mask that differs between queries, allowed is one that says which keys take part, "
            "the same for all queries; for a causal mask pass is_causal=True"
        )
    row = row[:, :, 0]  # [B, H, Tk]
    if row.stride(1) == 0 or heads == 1:
        return row[:, 0]
    row = row.unflatten(1, (groups, heads // groups))
    if heads != groups and not bool((row == row[:, :, :1]).all()):
        raise ValueError("attn_mask: got a mask that differs between query heads of one key head, allowed is the same")
    return row[:, :, 0].transpose(1, 2)
