"""The oracle itself, against the paper's algorithms and against sums written out token by token."""

from __future__ import annotations

import math

import pytest
import torch

from race_attention import RaceState
from race_attention.testing import (
    BUDGETS,
    assert_within_budget,
    corners,
    leaves,
    make_inputs,
    oracle,
    paper_oracle,
    relative_error,
    softmax_buckets,
)
from tests.helpers import CASES, inputs_of

FLOAT64 = torch.float64


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("planes", range(1, 9))
def test_without_floor_it_is_the_paper(causal, planes):
    inputs = make_inputs(planes=planes, dim=7, value_dim=5, causal=causal, scale=0.8, dtype=FLOAT64)
    assert_within_budget(oracle(**inputs, floor=0), paper_oracle(**inputs), FLOAT64)


@pytest.mark.parametrize("causal", [False, True])
def test_floor_changes_little(causal):
    inputs = make_inputs(tokens=40, planes=4, tables=4, causal=causal, dtype=FLOAT64)
    assert 0 < relative_error(oracle(**inputs), paper_oracle(**inputs)) < 5e-4


def test_kernel_is_the_product_formula():
    """The output for one-hot values is the kernel, normalised: here from (1 + a_q a_k) / 2 as it is written."""
    inputs = make_inputs(batch=1, heads=1, tokens=6, dim=5, planes=3, tables=2, dtype=FLOAT64)
    inputs["value"] = torch.eye(6, dtype=FLOAT64)[None, :, None]
    w, beta = inputs["hyperplanes"][0], inputs["beta"][0]

    def soft_sign(x):
        return (1 - 2**-13) * torch.tanh(beta * torch.tanh(torch.einsum("td,lpd->tlp", x[0, :, 0], w)))

    a_q, a_k = soft_sign(inputs["query"]), soft_sign(inputs["key"])
    kappa = ((1 + a_q[:, None] * a_k[None]) / 2).prod(-1).mean(-1)
    assert_within_budget(oracle(**inputs)[0, :, 0], kappa / kappa.sum(1, keepdim=True), FLOAT64)


def written_out(inputs, floor=2.0**-13):
    """Every option as loops over rows, heads and pairs, in Python numbers: [Tq][H] of Dv numbers."""
    inputs = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    query, key, value, planes = (inputs[name] for name in ("query", "key", "value", "hyperplanes"))
    causal, scale = inputs.get("causal", False), inputs.get("scale", 1.0)
    batch, groups = query.shape[0], key.shape[2]
    ends = inputs.get("cu_seqlens")
    key_ends = inputs.get("cu_seqlens_key", ends)
    out = torch.zeros(*query.shape[:3], value.shape[3], dtype=FLOAT64)
    for b in range(batch):
        rows = [(b, 0, query.shape[1], 0, key.shape[1])]
        if ends is not None:
            rows = [(r, *ends[r : r + 2].tolist(), *key_ends[r : r + 2].tolist()) for r in range(len(ends) - 1)]
        for row, q0, q1, k0, k1 in rows:
            for h in range(query.shape[2]):
                g = h // (query.shape[2] // groups)
                w = planes[g if planes.shape[0] > 1 else 0].tolist()
                beta = inputs["beta"]
                beta = beta if isinstance(beta, float) else beta.expand(groups)[g].item()
                for i in range(q0, q1):
                    out[b, i, h] = _written_out_row(inputs, b, row, g, i, h, q0, k0, k1, w, beta, causal, scale, floor)
    return out


def _written_out_row(inputs, b, row, g, i, h, q0, k0, k1, w, beta, causal, scale, floor):
    def soft_signs(x):
        return [
            [
                (1 - floor) * math.tanh(beta * math.tanh(scale * sum(u * v for u, v in zip(p, x, strict=True))))
                for p in t
            ]
            for t in w
        ]

    def decay(begin, end):  # log_decay of tokens begin .. end - 1
        given = inputs.get("log_decay")
        if given is None:
            return 0.0
        return sum(given[g].item() if given.ndim == 1 else given[b, t, g].item() for t in range(begin, end))

    a_q = soft_signs(inputs["query"][b, i, h].tolist())
    total, weights = torch.zeros(inputs["value"].shape[3], dtype=FLOAT64), 0.0
    for j in range(k0, min(k1, k0 + i - q0 + 1) if causal else k1):
        mask = inputs.get("key_mask")
        if mask is not None and not (mask[b, j] if mask.ndim == 2 else mask[b, j, g]):
            continue
        a_k = soft_signs(inputs["key"][b, j, g].tolist())
        tables = [math.prod((1 + x * y) / 2 for x, y in zip(p, q, strict=True)) for p, q in zip(a_q, a_k, strict=True)]
        weight = sum(tables) / len(tables) * math.exp(decay(j + 1, k0 + i - q0 + 1) if causal else 0.0)
        total += weight * inputs["value"][b, j, g]
        weights += weight
    state = inputs.get("initial_state")
    if state is not None:
        left = math.exp(decay(k0, k0 + i - q0 + 1)) if causal else 1.0
        for t, signs in enumerate(a_q):
            for r in range(2 ** len(signs)):
                phi = math.prod((1 + (1 if r >> p & 1 else -1) * a) / 2 for p, a in enumerate(signs))
                weights += left * phi * state.mass[row, g, t, r].item() / len(a_q)
                total += left * phi * state.value_sum[row, g, t, r].detach() / len(a_q)
    return total / weights if weights > 0 else total


@pytest.mark.parametrize("case", [name for name, options in CASES.items() if options.get("readout") != "bucket"])
def test_every_option_written_out(case):
    inputs = inputs_of(case, FLOAT64)
    assert_within_budget(oracle(**inputs), written_out(inputs), FLOAT64)


@pytest.mark.parametrize("causal", [False, True])
def test_state_and_bucket_readout_are_running_sums(causal):
    """Algorithm 2's sums, decayed, and the mean of each bucket, from buckets by the softmax over corners."""
    decay = "token" if causal else None
    inputs = make_inputs(tokens=7, planes=3, decay=decay, causal=causal, initial_state=True, masked=0.3, dtype=FLOAT64)
    phi_q, phi_k = (
        softmax_buckets(inputs[name], inputs["hyperplanes"], inputs["beta"]) for name in ("query", "key")
    )  # the paper's: floor=0 below
    state, mask = inputs["initial_state"], inputs["key_mask"]
    mass, value_sum, outs = state.mass, state.value_sum, []

    def read(t):
        return torch.einsum("bglr,bglrv->bgv", phi_q[:, t], value_sum / mass[..., None]) / mass.shape[2]

    for t in range(7):
        left = inputs["log_decay"][:, t].exp()[..., None, None] if causal else 1.0
        phi = phi_k[:, t] * mask[:, t, None, None, None]
        mass = left * mass + phi
        value_sum = left * value_sum.movedim(-1, 0) + phi * inputs["value"][:, t].movedim(-1, 0)[..., None, None]
        value_sum = value_sum.movedim(0, -1)
        outs.append(read(t))
    out = torch.stack(outs if causal else [read(t) for t in range(7)], dim=1)
    actual, final = oracle(**inputs, readout="bucket", floor=0, return_state=True)
    assert_within_budget(actual, out, FLOAT64)
    assert_within_budget(final.mass, mass, FLOAT64)
    assert_within_budget(final.value_sum, value_sum, FLOAT64)
    assert torch.equal(final.tokens, 20 + mask.sum(1))


def test_query_without_keys_gets_zero():
    inputs = make_inputs(causal=True, dtype=FLOAT64, requires_grad=True)
    inputs["key_mask"] = torch.zeros(2, 13, dtype=torch.bool)
    inputs["key_mask"][:, 4] = True
    out = oracle(**inputs)
    assert torch.equal(out[:, :4], torch.zeros_like(out[:, :4]))
    assert_within_budget(out[:, 4], inputs["value"][:, 4], FLOAT64)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves(inputs).values())
    assert not inputs["query"].grad[:, :4].any()


def test_bad_options():
    inputs = make_inputs(decay="head")
    with pytest.raises(ValueError, match=r"log_decay.*causal"):
        oracle(**inputs)
    with pytest.raises(ValueError, match=r"readout.*'mean'.*'global', 'bucket'"):
        oracle(**make_inputs(), readout="mean")


def test_corners_hold_the_sign_of_plane_p_in_bit_p():
    assert corners(2).tolist() == [[-1, -1], [1, -1], [-1, 1], [1, 1]]


# ------------------------------------------------------------------------------- factories and budgets


@pytest.mark.parametrize("strides", ["transposed", "sliced", "expanded"])
def test_strides_change_no_number(strides):
    plain, other = make_inputs(batch=1), make_inputs(batch=1, strides=strides)
    for name in ("query", "key", "value"):
        assert torch.equal(plain[name], other[name])
        assert strides == "expanded" or other[name].stride() != plain[name].stride()
    if strides == "expanded":
        assert make_inputs(strides=strides)["key"].stride(0) == 0


def test_inputs_are_seeded_and_ignore_the_global_generator():
    first = make_inputs(seed=3, decay="token", causal=True)
    torch.manual_seed(77)
    second, other = make_inputs(seed=3, decay="token", causal=True), make_inputs(seed=4)
    assert all(torch.equal(x, second[name]) for name, x in first.items() if isinstance(x, torch.Tensor))
    assert not torch.equal(first["query"], other["query"])


def test_dtypes_of_inputs():
    half = make_inputs(dtype=torch.bfloat16, decay="head", causal=True)
    assert half["query"].dtype == torch.bfloat16
    assert {half[name].dtype for name in ("hyperplanes", "beta", "log_decay")} == {torch.float32}
    assert make_inputs(dtype=FLOAT64)["beta"].dtype == FLOAT64


def test_leaves_names_all_that_wants_gradients():
    inputs = make_inputs(decay="head", causal=True, initial_state=True, requires_grad=True, masked=0.5)
    assert set(leaves(inputs)) == {
        "query", "key", "value", "hyperplanes", "beta", "log_decay", "initial_state.mass", "initial_state.value_sum",
    }  # fmt: skip
    assert not leaves(make_inputs(initial_state=True))
    assert isinstance(inputs["initial_state"], RaceState)


@pytest.mark.parametrize(("dtype", "direction"), [(d, way) for d, budget in BUDGETS.items() for way in budget])
def test_budget_is_kept_and_enforced(dtype, direction):
    right = torch.arange(1.0, 9.0, dtype=FLOAT64)
    budget = BUDGETS[dtype][direction]
    assert_within_budget(right * (1 + 0.9 * budget), right, dtype, direction)
    with pytest.raises(AssertionError, match=r"weights.*relative error.*allowed"):
        assert_within_budget(right * (1 + 1.1 * budget), right, dtype, direction, name="weights")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_never_passes(bad):
    right = torch.ones(4)
    wrong = torch.tensor([1.0, bad, 1.0, 1.0])
    for pair in ((wrong, right), (right, wrong), (wrong, wrong)):
        with pytest.raises(AssertionError, match="not finite"):
            assert_within_budget(*pair, torch.bfloat16)


def test_relative_error_of_zeros_scales_and_shapes():
    zero, one = torch.zeros(3), torch.ones(3)
    assert relative_error(zero, zero) == 0
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0
    assert relative_error(one, zero) == pytest.approx(3**0.5)
    assert relative_error(one, zero, scale=10) == pytest.approx(3**0.5 / 10)
    with pytest.raises(ValueError, match=r"actual: got shape \(3,\), expected has \(3, 1\)"):
        relative_error(zero, torch.zeros(3, 1))
