"""Hyperplanes and buckets: the factorised form, the kernel it estimates, the numbers drawn."""

from __future__ import annotations

import math

import pytest
import torch

from race_attention import features, sample_hyperplanes
from race_attention.features import FLOOR, bucket_weights
from race_attention.testing import assert_within_budget, corners, relative_error, softmax_buckets

FLOAT64 = torch.float64


def draw(planes, *, dim=6, groups=2, tables=3, magnitude=1.0, dtype=FLOAT64):
    generator = torch.Generator().manual_seed(planes)
    x = magnitude * torch.randn(4, 5, groups, dim, generator=generator, dtype=dtype)
    hyperplanes = sample_hyperplanes(groups, tables, planes, dim, seed=planes, dtype=dtype)
    return x, hyperplanes, 1 + torch.rand(groups, generator=generator, dtype=dtype)


@pytest.mark.parametrize("magnitude", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("planes", range(1, 9))
def test_factorised_buckets_are_the_softmax_over_corners(planes, magnitude, monkeypatch):
    monkeypatch.setattr(features, "FLOOR", 0.0)
    x, hyperplanes, beta = draw(planes, magnitude=magnitude)
    right = softmax_buckets(x, hyperplanes, beta)
    factorised = bucket_weights(x.unsqueeze(-2), hyperplanes, beta).squeeze(-3)
    assert relative_error(factorised, right) <= 1e-12
    assert ((factorised - right).abs() / right).max() <= 1e-12  # each bucket, the smallest too


@pytest.mark.parametrize("planes", range(1, 9))
def test_floored_buckets_are_the_softmax_of_floored_signs(planes):
    """With a = (1 - FLOOR) tanh(...), the buckets are the softmax over corners of atanh(a) . c_r."""
    x, hyperplanes, beta = draw(planes)
    soft_sign = torch.einsum("...gd,glpd->...glp", x, hyperplanes).tanh()
    logit = torch.atanh((1 - FLOOR) * torch.tanh(beta[:, None, None] * soft_sign))
    right = torch.softmax(logit @ corners(planes).T, dim=-1)
    assert_within_budget(bucket_weights(x.unsqueeze(-2), hyperplanes, beta).squeeze(-3), right, FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e4])
@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("planes", [1, 4, 10])
def test_buckets_are_positive_and_sum_to_one(dtype, magnitude, beta, planes):
    x, hyperplanes, _ = draw(planes, magnitude=magnitude, dtype=dtype)
    weights = bucket_weights(x.unsqueeze(-2), hyperplanes, torch.full((2,), beta, dtype=dtype))
    assert (weights > 0).all()
    assert ((weights.sum(-1) - 1).abs() < 50 * torch.finfo(dtype).eps).all()


def test_grouped_query_heads_share_a_hash():
    x, hyperplanes, beta = draw(3)
    together = bucket_weights(torch.stack((x, -x), dim=-2), hyperplanes, beta)  # [..., G, n, L, R]
    assert torch.equal(together[..., 0, :, :], bucket_weights(x.unsqueeze(-2), hyperplanes, beta)[..., 0, :, :])
    # the opposite token falls into the opposite corner
    assert_within_budget(together[..., 1, :, :], together[..., 0, :, :].flip(-1), FLOAT64)


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize("angle", [0.2, 0.9, math.pi / 2, 2.4, 3.0])
def test_mean_kernel_is_the_angular_kernel(planes, angle):
    """The mean over draws of sum_r phi_r(q) phi_r(k) is (1 - angle/pi)^P for large beta, within chance.

    The finite beta of 1e4 and the floor move the mean by at most P * 4e-4.
    """
    draws, dim = 40_000, 8
    hyperplanes = sample_hyperplanes(1, draws, planes, dim, seed=planes, dtype=FLOAT64)
    q, k = torch.zeros(2, dim, dtype=FLOAT64)
    q[0], k[0], k[1] = 5.0, 3 * math.cos(angle), 3 * math.sin(angle)
    phi = bucket_weights(torch.stack((q, k))[None, None], hyperplanes, torch.tensor([1e4], dtype=FLOAT64))
    kernel = (phi[0, 0, 0] * phi[0, 0, 1]).sum(-1)  # [draws]
    expected = (1 - angle / math.pi) ** planes
    deviation = kernel.std().item() / math.sqrt(draws)
    assert abs(kernel.mean().item() - expected) < 4 * deviation + 4e-4 * planes
    assert deviation < 0.003


# -------------------------------------------------------------------------------------------- hyperplanes


def test_hyperplanes_are_the_same_everywhere():
    """These numbers are part of the interface: models and states are loaded with the seed alone."""
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    drawn = sample_hyperplanes(1, 1, 2, 2, seed=0, dtype=FLOAT64)
    assert torch.equal(torch.random.get_rng_state(), before)  # torch's own generator is left alone
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(drawn, torch.randn(1, 1, 2, 2, generator=generator, dtype=FLOAT64))
    assert torch.equal(sample_hyperplanes(1, 1, 2, 2, seed=0), drawn.float())
    torch.set_default_dtype(FLOAT64)
    try:
        assert sample_hyperplanes(1, 1, 2, 2).dtype == torch.float32
        with torch.device("meta"):
            assert torch.equal(sample_hyperplanes(1, 1, 2, 2, device="cpu"), drawn.float())
            assert sample_hyperplanes(1, 1, 2, 2).device.type == "meta"  # as torch's own functions
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_hyperplanes_are_standard_normal(orthogonal):
    drawn = sample_hyperplanes(4, 500, 3, 8, seed=1, orthogonal=orthogonal, dtype=FLOAT64)
    count = drawn.numel()
    assert abs(drawn.mean().item()) < 4 / math.sqrt(count)
    assert abs(drawn.var().item() - 1) < 4 * math.sqrt(2 / count)
    assert abs(drawn.pow(4).mean().item() - 3) < 4 * math.sqrt(96 / count) * 1.2
    lengths = drawn.square().sum(-1)  # chi-squared with 8 degrees of freedom: variance 16
    assert abs(lengths.var().item() - 16) < 1.5


@pytest.mark.parametrize(("planes", "dim"), [(4, 8), (5, 5), (7, 3), (3, 1)])
def test_orthogonal_planes(planes, dim):
    drawn = sample_hyperplanes(2, 3, planes, dim, seed=2, orthogonal=True, dtype=FLOAT64)
    assert drawn.shape == (2, 3, planes, dim)
    for begin in range(0, planes, dim):
        block = drawn[:, :, begin : begin + dim]
        directions = block / block.norm(dim=-1, keepdim=True)
        gram = directions @ directions.transpose(-1, -2)
        assert_within_budget(gram, torch.eye(block.shape[2], dtype=FLOAT64).expand_as(gram), FLOAT64)


def test_seeds_heads_and_tables_differ():
    drawn = sample_hyperplanes(2, 2, 3, 4, seed=0)
    rows = drawn.flatten(0, 2)
    assert torch.unique(rows, dim=0).shape == rows.shape
    assert not torch.equal(drawn, sample_hyperplanes(2, 2, 3, 4, seed=1))
    assert torch.equal(drawn, sample_hyperplanes(2, 2, 3, 4, seed=0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"heads": 0}, ValueError, "heads: got 0, allowed is 1 or more"),
        ({"tables": -1}, ValueError, "tables: got -1, allowed is 1 or more"),
        ({"planes": 0}, ValueError, "planes: got 0, allowed is 1 or more"),
        ({"dim": 0}, ValueError, "dim: got 0, allowed is 1 or more"),
        ({"planes": 2.0}, TypeError, "planes: got 2.0, allowed is an integer"),
        ({"heads": True}, TypeError, "heads: got True, allowed is an integer"),
        ({"seed": "a"}, TypeError, "seed: got 'a', allowed is an integer"),
        ({"dtype": torch.int32}, TypeError, "dtype: got torch.int32, allowed is a floating dtype"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        sample_hyperplanes(**{"heads": 1, "tables": 1, "planes": 1, "dim": 4, **change})
