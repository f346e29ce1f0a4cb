"""The specification in code: the quadratic oracle, the paper's form, input factories, error budgets.

Everything here is plain, float64 and quadratic in the length. It shares nothing with the backends: the oracle
compares tokens pair by pair and knows no chunks, ``softmax_buckets`` evaluates the softmax over corners that
the backends factorise. Shape letters are those of :mod:`race_attention.backends.call`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from race_attention.state import RaceState

#: Relative error (norm) against the float64 oracle on the same inputs that a backend may have, by the dtype of
#: its inputs: forward and backward.
BUDGETS: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"forward": 1e-12, "backward": 1e-12},
    torch.float32: {"forward": 1e-5, "backward": 1e-5},
    torch.bfloat16: {"forward": 4e-3, "backward": 1e-2},
    torch.float16: {"forward": 4e-3, "backward": 1e-2},
}


# --------------------------------------------------------------------------------------------- the oracle


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hyperplanes: Tensor,
    beta: Tensor | float,
    *,
    causal: bool = False,
    scale: float = 1.0,
    log_decay: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
    initial_state: RaceState | None = None,
    return_state: bool = False,
    readout: str = "global",
    floor: float = 2.0**-13,
) -> Any:
    """RACE Attention by comparing every query with every key, in float64.

    out_i = sum_j kappa(q_i, k_j) v_j / sum_j kappa(q_i, k_j),  kappa = (1/L) sum_l prod_p (1 + a_q a_k) / 2,
    which is Algorithms 1 and 2 of the paper after its softmax over corners is factorised. Arguments, shapes and
    meaning are those of :func:`race_attention.race_attention`; every input is upcast to float64, and autograd
    goes through the casts.

    Args:
        query: [B, Tq, H, D].
        key: [B, Tk, G, D].
        value: [B, Tk, G, Dv].
        hyperplanes: [G or 1, L, P, D].
        beta: a number, a scalar tensor or [G].
        causal: token i sees tokens j <= i.
        scale: factor of the projections.
        log_decay: [G] or [B, Tk, G], causal only.
        key_mask: [B, Tk], or [B, Tk, G] where the heads see different keys; True takes part.
        cu_seqlens: [n + 1], bounds of packed sequences.
        cu_seqlens_key: [n + 1], bounds of the keys where they differ.
        initial_state: the state before the first token; its gradients flow.
        return_state: returns the state after the last token too.
        readout: "global" or "bucket".
        floor: soft signs are (1 - floor) * tanh(...). ``floor=0`` is the paper exactly; a query whose weights
            are all 0 then gets 0, and in the bucket readout a bucket without mass counts as 0.

    Returns:
        [B, Tq, H, Dv] float64; with ``return_state`` also the RaceState after the last token, float64.
    """
    if readout not in ("global", "bucket"):
        raise ValueError(f"readout: got {readout!r}, allowed are 'global', 'bucket'")
    if log_decay is not None and not causal:
        raise ValueError("log_decay: got a tensor with causal=False, allowed with causal=True only")
    batch, keys, groups = key.shape[:3]
    planes_GLPD = (scale * hyperplanes.to(torch.float64)).expand(groups, -1, -1, -1)
    beta_G = torch.as_tensor(beta, dtype=torch.float64, device=key.device).expand(groups)
    seen_BKG = torch.ones(batch, keys, groups, dtype=torch.bool, device=key.device)
    if key_mask is not None:
        seen_BKG = seen_BKG & (key_mask if key_mask.ndim == 3 else key_mask[..., None])
    decay_BKG = torch.zeros(batch, keys, groups, dtype=torch.float64, device=key.device)
    if log_decay is not None:
        decay_BKG = decay_BKG + log_decay.to(torch.float64)

    outs, masses, sums, totals, counts = [], [], [], [], []
    for row, (queries_here, keys_here) in enumerate(_runs(cu_seqlens, cu_seqlens_key)):
        state = None
        if initial_state is not None:
            rows = slice(None) if cu_seqlens is None else slice(row, row + 1)
            state = (initial_state.mass[rows].to(torch.float64), initial_state.value_sum[rows].to(torch.float64))
        run = _Run(
            query[:, queries_here].to(torch.float64),
            key[:, keys_here].to(torch.float64),
            value[:, keys_here].to(torch.float64),
            planes_GLPD,
            beta_G,
            decay_BKG[:, keys_here],
            seen_BKG[:, keys_here],
            state,
            causal,
            floor,
        )
        outs.append(run.global_readout() if readout == "global" else run.bucket_readout())
        if return_state:
            mass, value_sum = run.final_state()
            masses.append(mass)
            sums.append(value_sum)
            totals.append(decay_BKG[:, keys_here].sum(1))
            counts.append(seen_BKG[:, keys_here].any(-1).sum(1))
    if not outs:  # no sequences at all
        outs = [query[..., :1].to(torch.float64).expand(-1, -1, -1, value.shape[3])]
    out = torch.cat(outs, dim=1)
    if not return_state:
        return out
    mass, value_sum, log_decay, tokens = (
        torch.cat(x) if x else _no_rows(name, hyperplanes, value)
        for name, x in (("mass", masses), ("value_sum", sums), ("log_decay", totals), ("tokens", counts))
    )
    if initial_state is not None:
        log_decay = log_decay + initial_state.log_decay.to(torch.float64)
        tokens = tokens + initial_state.tokens
    from race_attention.state import RaceState

    return out, RaceState(mass=mass, value_sum=value_sum, log_decay=log_decay, tokens=tokens)


class _Run:
    """One run of tokens, batch B, whose queries see its keys and the state before it, and nothing else."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hyperplanes: Tensor,
        beta: Tensor,
        log_decay: Tensor,
        seen: Tensor,
        state: tuple[Tensor, Tensor] | None,
        causal: bool,
        floor: float,
    ) -> None:
        self.share = query.shape[2] // key.shape[2]  # query heads to a key head
        self.value_BKGv = value
        self.query_side = _side_probabilities(query, hyperplanes, beta, floor)  # two of [B, Q, H, L, P]
        self.key_side = _side_probabilities(key, hyperplanes, beta, floor)  # two of [B, K, G, L, P]
        self.state = state
        self.causal = causal
        keys = key.shape[1]
        # age[i, j] = sum of log_decay over tokens j+1 .. i, summed directly: differences of long sums lose digits
        later = torch.ones(keys, keys, dtype=torch.bool, device=key.device).tril(-1)[..., None]  # [i, j, 1], i > j
        age = torch.where(later, log_decay[:, :, None], log_decay.new_zeros(())).cumsum(1)  # [B, i, j, G]
        self.since_start_BKG = log_decay.cumsum(1)
        self.total_BG = log_decay.sum(1)
        visible = seen[:, None].expand(-1, keys if causal else query.shape[1], -1, -1)
        if causal:
            past = torch.ones(keys, keys, dtype=torch.bool, device=key.device).tril()[..., None]
            self.weight_BQKG = torch.where(visible & past, age.exp(), age.new_zeros(()))
        else:
            self.weight_BQKG = visible.to(torch.float64)
        left = (self.total_BG[:, None] - self.since_start_BKG) if keys == 0 else age[:, -1]
        self.left_BKG = torch.where(seen, left.exp(), left.new_zeros(()))  # what is left of a key at the end

    def kernel(self) -> Tensor:
        """The kernel kappa [B, Q, K, H]: the mean over tables of the chance that both tokens fall into one bucket."""
        same: Tensor | None = None
        for plane in range(self.key_side[0].shape[-1]):
            (q_up, q_down), (k_up, k_down) = (
                [side[..., plane] for side in sides] for sides in (self.query_side, self.key_side)
            )
            k_up, k_down = (x.repeat_interleave(self.share, 2)[:, None] for x in (k_up, k_down))
            # [B, Q, K, H, L]: (1 + a_q a_k) / 2, without the cancellation of 1 + a_q a_k at opposite signs
            agree = q_up[:, :, None] * k_up + q_down[:, :, None] * k_down
            same = agree if same is None else same * agree
        assert isinstance(same, Tensor)
        return same.mean(-1)

    def global_readout(self) -> Tensor:
        weight = self.weight_BQKG.repeat_interleave(self.share, -1) * self.kernel()  # [B, Q, K, H]
        value = self.value_BKGv.repeat_interleave(self.share, 2)
        numerator = torch.einsum("bqkh,bkhv->bqhv", weight, value)
        denominator = weight.sum(2)
        if self.state is not None:
            mass, value_sum = self._state_per_query_head()
            phi = _buckets(*self.query_side)  # [B, Q, H, L, R]
            age = self._state_weight()  # [B, Q or 1, H]
            tables = mass.shape[2]  # kappa is a mean over tables
            numerator = numerator + age[..., None] * torch.einsum("bqhlr,bhlrv->bqhv", phi, value_sum) / tables
            denominator = denominator + age * torch.einsum("bqhlr,bhlr->bqh", phi, mass) / tables
        return _divide(numerator, denominator[..., None])

    def bucket_readout(self) -> Tensor:
        """(1/L) sum_{l,r} phi_{l,r}(q) value_sum[l,r] / mass[l,r], the states held for every query."""
        phi_key = _buckets(*self.key_side)
        mass = torch.einsum("bqkg,bkglr->bqglr", self.weight_BQKG, phi_key)
        value_sum = torch.einsum("bqkg,bkglr,bkgv->bqglrv", self.weight_BQKG, phi_key, self.value_BKGv)
        mass, value_sum = mass.repeat_interleave(self.share, 2), value_sum.repeat_interleave(self.share, 2)
        if self.state is not None:
            before_mass, before_sum = self._state_per_query_head()
            age = self._state_weight()[..., None, None]
            mass = mass + age * before_mass[:, None]
            value_sum = value_sum + age[..., None] * before_sum[:, None]
        mean = _divide(value_sum, mass[..., None])
        return torch.einsum("bqhlr,bqhlrv->bqhv", _buckets(*self.query_side), mean) / mass.shape[3]

    def final_state(self) -> tuple[Tensor, Tensor]:
        phi = _buckets(*self.key_side)
        mass = torch.einsum("bkg,bkglr->bglr", self.left_BKG, phi)
        value_sum = torch.einsum("bkg,bkglr,bkgv->bglrv", self.left_BKG, phi, self.value_BKGv)
        if self.state is not None:
            kept = self.total_BG.exp()[..., None, None]
            mass = mass + kept * self.state[0]
            value_sum = value_sum + kept[..., None] * self.state[1]
        return mass, value_sum

    def _state_per_query_head(self) -> tuple[Tensor, Tensor]:
        assert self.state is not None
        return self.state[0].repeat_interleave(self.share, 1), self.state[1].repeat_interleave(self.share, 1)

    def _state_weight(self) -> Tensor:
        age = self.since_start_BKG.exp() if self.causal else torch.ones_like(self.total_BG)[:, None]
        return age.repeat_interleave(self.share, -1)


def _side_probabilities(x: Tensor, hyperplanes: Tensor, beta: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """(1 + a) / 2 and (1 - a) / 2 of every token and plane, [B, T, heads, L, P]: its chance of either side.

    ``beta`` is [heads], or one for each token, [B, T, heads].
    """
    share = x.shape[2] // hyperplanes.shape[0]
    projection = torch.einsum("bthd,hlpd->bthlp", x, hyperplanes.repeat_interleave(share, 0))
    logit = 2 * beta.repeat_interleave(share, -1)[..., None, None] * projection.tanh()  # (1 + tanh z)/2 = sigmoid(2z)
    return (1 - floor) * logit.sigmoid() + floor / 2, (1 - floor) * (-logit).sigmoid() + floor / 2


def _buckets(positive: Tensor, negative: Tensor) -> Tensor:
    """prod_p (1 + c_{r,p} a_p) / 2 for every corner r: [..., P] twice -> [..., R]."""
    corner = corners(positive.shape[-1]).to(positive.device) > 0  # [R, P]
    weights = torch.ones_like(positive[..., :1])
    for plane in range(positive.shape[-1]):
        side = torch.where(corner[:, plane], positive[..., plane, None], negative[..., plane, None])
        weights = weights * side
    return weights


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 with zero gradients where the denominator is 0."""
    positive = denominator > 0
    quotient = numerator / torch.where(positive, denominator, torch.ones_like(denominator))
    return torch.where(positive, quotient, torch.zeros_like(quotient))


def _runs(cu_seqlens: Tensor | None, cu_seqlens_key: Tensor | None) -> list[tuple[slice, slice]]:
    if cu_seqlens is None:
        return [(slice(None), slice(None))]
    bounds = cu_seqlens.tolist()
    key_bounds = bounds if cu_seqlens_key is None else cu_seqlens_key.tolist()
    pairs = zip(itertools.pairwise(bounds), itertools.pairwise(key_bounds), strict=True)
    return [(slice(*ends), slice(*key_ends)) for ends, key_ends in pairs]


def _no_rows(name: str, hyperplanes: Tensor, value: Tensor) -> Tensor:
    """A field of the state of no sequences."""
    tables, planes = hyperplanes.shape[1:3]
    groups, value_dim = value.shape[2:]
    shape = {"mass": (0, groups, tables, 2**planes), "log_decay": (0, groups), "tokens": (0,)}
    shape["value_sum"] = (*shape["mass"], value_dim)
    return value.new_zeros(shape[name], dtype=torch.int64 if name == "tokens" else torch.float64)


# ---------------------------------------------------------------------------------------- the paper's form


def corners(planes: int) -> Tensor:
    """The corners c_r of {-1, +1}^P, [R, P] float64; bit p of r is the sign of plane p."""
    index = torch.arange(2**planes)
    bits = (index[:, None] >> torch.arange(planes)) & 1
    return 2.0 * bits.to(torch.float64) - 1.0


def softmax_buckets(x: Tensor, hyperplanes: Tensor, beta: Tensor | float, scale: float = 1.0) -> Tensor:
    """The soft buckets as Algorithm 1, step 3 writes them: softmax over r of beta * tanh(scale w.x) . c_r.

    Args:
        x: [..., G, D].
        hyperplanes: [G or 1, L, P, D].
        beta: a number, a scalar tensor or [G].
        scale: factor of the projections; the paper has 1.

    Returns:
        [..., G, L, R] float64.
    """
    groups = x.shape[-2]
    planes = (scale * hyperplanes.to(torch.float64)).expand(groups, -1, -1, -1)
    soft_sign = torch.einsum("...gd,glpd->...glp", x.to(torch.float64), planes).tanh()
    logits = torch.einsum("...glp,rp->...glr", soft_sign, corners(planes.shape[2]).to(x.device))
    sharpness = torch.as_tensor(beta, dtype=torch.float64, device=x.device).expand(groups)
    return torch.softmax(sharpness[:, None, None] * logits, dim=-1)


def paper_oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hyperplanes: Tensor,
    beta: Tensor | float,
    *,
    causal: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Algorithm 1 (non-causal) and Algorithm 2 (causal) of the paper, step by step, in float64.

    It has neither masks nor grouped queries (H == G), no floor and no decay.

    Returns:
        [B, Tq, H, Dv] float64.
    """
    phi_query = softmax_buckets(query, hyperplanes, beta, scale)  # [B, Tq, H, L, R]
    phi_key = softmax_buckets(key, hyperplanes, beta, scale)  # [B, Tk, H, L, R]
    value = value.to(torch.float64)
    if not causal:
        mass = phi_key.sum(1)  # [B, H, L, R]
        value_sum = torch.einsum("bkhlr,bkhv->bhlrv", phi_key, value)
        numerator = torch.einsum("bqhlr,bhlrv->bqhv", phi_query, value_sum)
        return numerator / torch.einsum("bqhlr,bhlr->bqh", phi_query, mass)[..., None]
    mass = torch.zeros_like(phi_key[:, 0]) if key.shape[1] else phi_key.sum(1)
    value_sum = mass[..., None] * value.new_zeros(value.shape[-1])
    outs = []
    for token in range(key.shape[1]):  # the running sums of Algorithm 2
        mass = mass + phi_key[:, token]
        value_sum = value_sum + phi_key[:, token, ..., None] * value[:, token, :, None, None]
        numerator = torch.einsum("bhlr,bhlrv->bhv", phi_query[:, token], value_sum)
        outs.append(numerator / torch.einsum("bhlr,bhlr->bh", phi_query[:, token], mass)[..., None])
    return torch.stack(outs, dim=1) if outs else value.new_zeros(*query.shape[:3], value.shape[-1])


# ------------------------------------------------------------------------------------------------- inputs


def make_inputs(
    *,
    batch: int = 2,
    tokens: int = 13,
    keys: int | None = None,
    heads: int = 2,
    kv_heads: int | None = None,
    dim: int = 8,
    value_dim: int | None = None,
    tables: int = 2,
    planes: int = 2,
    shared_hyperplanes: bool = False,
    beta: float | Literal["heads", "scalar"] = "heads",
    causal: bool = False,
    scale: float = 1.0,
    decay: Literal["head", "token"] | None = None,
    masked: float = 0.0,
    mask_per_head: bool = False,
    lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
    initial_state: bool = False,
    return_state: bool = False,
    readout: str = "global",
    strides: Literal["contiguous", "transposed", "expanded", "sliced"] = "contiguous",
    magnitude: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    requires_grad: bool = False,
) -> dict[str, Any]:
    """Seeded arguments of race_attention, as keywords: ``race_attention(**make_inputs(...))``.

    The numbers do not depend on dtype, device or strides (beyond rounding). Defaults of race_attention are
    left out of the result.

    Args:
        batch: B.
        tokens: Tq.
        keys: Tk; ``tokens`` where not given.
        heads: H.
        kv_heads: G; ``heads`` where not given.
        dim: D.
        value_dim: Dv; ``dim`` where not given.
        tables: L.
        planes: P.
        shared_hyperplanes: [1, L, P, D] instead of [G, L, P, D].
        beta: a number, or a tensor ("heads" [G], "scalar" []) near 1.5.
        causal: passed on, as are ``scale``, ``return_state`` and ``readout``.
        scale: passed on.
        decay: "head" gives log_decay [G], "token" [B, Tk, G]; the first head has none.
        masked: share of the keys that key_mask removes.
        mask_per_head: makes key_mask [B, Tk, G].
        lengths: of packed sequences; batch is then 1 and ``tokens`` their sum.
        key_lengths: of the packed keys, where they differ.
        initial_state: a float64 state as 20 tokens would leave it.
        return_state: passed on.
        readout: passed on.
        strides: of query, key and value. "transposed" views [B, heads, T, D]; "sliced" is cut from a larger
            tensor with a gap after every token; "expanded" has every row of the batch the same (stride 0).
        magnitude: factor of query, key and value.
        dtype: of query, key and value; hyperplanes, beta and log_decay are float32, or float64 with float64.
        device: of every tensor.
        seed: of the generator.
        requires_grad: every floating tensor becomes a leaf that requires gradients.
    """
    if lengths is not None:
        batch, tokens = 1, sum(lengths)
        keys = tokens if key_lengths is None else sum(key_lengths)
    keys = tokens if keys is None else keys
    groups = heads if kv_heads is None else kv_heads
    value_dim = dim if value_dim is None else value_dim
    rows = batch if lengths is None else len(lengths)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    parameters = torch.float64 if dtype == torch.float64 else torch.float32

    def leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(device=device, dtype=dtype).requires_grad_(requires_grad)

    inputs: dict[str, Any] = {}
    for name, shape in (
        ("query", (batch, tokens, heads, dim)),
        ("key", (batch, keys, groups, dim)),
        ("value", (batch, keys, groups, value_dim)),
    ):
        moved = (magnitude * normal(*shape)).to(device=device, dtype=dtype)
        inputs[name] = _with_strides(moved, strides).detach().requires_grad_(requires_grad)
    inputs["hyperplanes"] = leaf(normal(1 if shared_hyperplanes else groups, tables, planes, dim), parameters)
    sharpness = 1.0 + uniform(groups)
    if isinstance(beta, str):
        inputs["beta"] = leaf(sharpness[0] if beta == "scalar" else sharpness, parameters)
    else:
        inputs["beta"] = beta
    rates = -torch.arange(groups, dtype=torch.float64) / max(groups, 2)  # the first head has no decay
    by_token = uniform(batch, keys, groups)
    if decay is not None:
        inputs["log_decay"] = leaf(rates if decay == "head" else 1.5 * rates * by_token - 0.05 * by_token, parameters)
    drawn = uniform(batch, keys, groups)
    if masked > 0:
        inputs["key_mask"] = ((drawn if mask_per_head else drawn[..., 0]) >= masked).to(device)
    for name, counts in (("cu_seqlens", lengths), ("cu_seqlens_key", key_lengths)):
        if counts is not None:
            inputs[name] = torch.tensor([0, *counts]).cumsum(0).to(device)
    mass = 20 * uniform(rows, groups, tables, 2**planes) / 2**planes
    value_sum = mass[..., None] * normal(rows, groups, tables, 2**planes, value_dim)
    if initial_state:
        inputs["initial_state"] = _make_state(leaf(mass, torch.float64), leaf(value_sum, torch.float64))
    options = (("causal", causal, False), ("scale", scale, 1.0), ("return_state", return_state, False))
    inputs.update({name: given for name, given, default in options if given != default})
    if readout != "global":
        inputs["readout"] = readout
    return inputs


def _make_state(mass: Tensor, value_sum: Tensor) -> RaceState:
    from race_attention.state import RaceState

    log_decay = torch.zeros(mass.shape[:2], dtype=torch.float64, device=mass.device)
    tokens = torch.full(mass.shape[:1], 20, dtype=torch.int64, device=mass.device)
    return RaceState(mass=mass, value_sum=value_sum, log_decay=log_decay, tokens=tokens)


def _with_strides(x: Tensor, strides: str) -> Tensor:
    if strides == "contiguous":
        return x.contiguous()
    if strides == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "expanded":
        return x[:1].contiguous().expand_as(x) if x.shape[0] else x
    if strides == "sliced":
        padded = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
        padded[..., 1:-2] = x
        return padded[..., 1:-2]
    raise ValueError(f"strides: got {strides!r}, allowed are 'contiguous', 'transposed', 'expanded', 'sliced'")


def leaves(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among the inputs that require gradients, the state's as "initial_state.mass" and so on."""
    found: dict[str, Tensor] = {}
    for name, given in inputs.items():
        if name == "initial_state" and given is not None:
            found.update({f"{name}.{part}": getattr(given, part) for part in ("mass", "value_sum")})
        elif isinstance(given, Tensor):
            found[name] = given
    return {name: x for name, x in found.items() if x.requires_grad}


# ------------------------------------------------------------------------------------------ error budgets


def relative_error(actual: Tensor, expected: Tensor, *, scale: float = 0.0) -> float:
    """||actual - expected|| / max(||expected||, scale), in float64; infinite where either is not finite.

    Args:
        actual: what was computed.
        expected: what is right; the same shape.
        scale: size of the terms that add up to ``expected``, for sums that cancel.

    Returns:
        A number; 0 for two zeros or two empty tensors. Where ``expected`` is 0 and ``actual`` is not, the norm of
        ``actual``.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"actual: got shape {tuple(actual.shape)}, expected has {tuple(expected.shape)}")
    difference = (actual.detach().double().cpu() - expected.detach().double().cpu()).norm().item()
    size = max(expected.detach().double().cpu().norm().item(), scale)
    if not (difference < float("inf") and size < float("inf")):
        return float("inf")
    return difference / size if size > 0 else difference


def assert_within_budget(
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    direction: Literal["forward", "backward"] = "forward",
    *,
    scale: float = 0.0,
    name: str = "output",
) -> None:
    """Raises AssertionError unless the relative error is within the budget of ``dtype``. NaN never passes.

    Args:
        actual: what was computed.
        expected: what is right; the same shape.
        dtype: of the inputs, which sets the budget (:data:`BUDGETS`).
        direction: "forward" for outputs and states, "backward" for gradients.
        scale: as for :func:`relative_error`.
        name: of what is compared, for the message.
    """
    budget = BUDGETS[dtype][direction]
    error = relative_error(actual, expected, scale=scale)
    if not error <= budget:
        bad = int((~torch.isfinite(actual.detach())).sum())
        raise AssertionError(
            f"{name} {tuple(actual.shape)}: relative error {error:.3g} in {direction}, allowed for {dtype} is "
            f"{budget:.0e}; norms {actual.detach().double().norm().item():.6g} (actual), "
            f"{expected.detach().double().norm().item():.6g} (expected); {bad} entries not finite"
        )


# ----------------------------------------------------------------------------------------------- backends


def runnable_backends() -> dict[str, tuple[str, ...]]:
    """The devices on which each backend can serve a plain float32 call on this machine: name -> device types.

    The reference is asked on every device, a native backend on its own; one that says why not is left out.
    """
    from race_attention import backends
    from race_attention.backends.call import Call

    found: dict[str, tuple[str, ...]] = {}
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        x = torch.zeros(1, 4, 1, 16, device=device)
        call = Call(x, x, x, torch.zeros(1, 2, 2, 16, device=device), torch.ones(1, device=device))
        for backend in ("reference", backends.NATIVE[device]):
            if backends.why_not(backend, call) is None:
                found[backend] = (*found.get(backend, ()), device)
    return found
