"""Layers with options nobody chose: whole, packed, padded, in segments and steps the same numbers, and from files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from race_attention import RaceAttention, RaceAttentionState
from race_attention.testing import relative_error

pytestmark = pytest.mark.filterwarnings("ignore::race_attention.BackendWarning")
EMBED = 12


def drawn(rng: random.Random) -> RaceAttention:
    """A float64 layer of any options, away from its starting values."""
    causal, groups, head_dim = rng.random() < 0.7, rng.choice([1, 2, 3]), rng.choice([2, 4, 6, 10])
    options: dict[str, Any] = {
        "num_kv_heads": groups,
        "head_dim": head_dim,
        "value_dim": rng.choice([1, 3, head_dim]),
        "tables": rng.choice([1, 2, 3]),
        "planes": rng.choice([1, 2, 3]),
        "beta": rng.choice([0.5, 2.0, 30.0]),
        "scale": rng.choice([None, 1.0]),
        "causal": causal,
        "conv_size": rng.choice([0, 0, 1, 2, 4, 7]),
        "decay": rng.choice([None, 0.9, 1.0, "multiscale", "learned", "per_token"]) if causal else None,
        "rope": rng.choice([None, 100.0]),
        "readout": rng.choice(["global"] * 4 + ["bucket"]),
        "seed": rng.randrange(1000),
    }
    for name in ("learn_beta", "learn_hyperplanes", "hyperplanes_per_head", "orthogonal", "norm_gate", "bias"):
        options[name] = rng.random() < 0.5
    layer = RaceAttention(EMBED, groups * rng.choice([1, 2, 3]), **options, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def packed(layer: RaceAttention, x: Tensor) -> Tensor:
    """All rows one after another."""
    batch, length, _ = x.shape
    return layer(x.flatten(0, 1)[None], cu_seqlens=torch.arange(batch + 1) * length).view_as(x)


def padded(layer: RaceAttention, x: Tensor, rng: random.Random) -> Tensor:
    """Padding anywhere between."""
    batch, length, _ = x.shape
    wide = length + rng.choice([1, 3, 8])
    places = torch.tensor([sorted(rng.sample(range(wide), length)) for _ in range(batch)])
    places = places.unsqueeze(-1)
    tokens = torch.randn(batch, wide, EMBED, dtype=x.dtype).scatter(1, places.expand_as(x), x)
    padding = torch.ones(batch, wide, dtype=torch.bool).scatter(1, places[..., 0], False)
    return layer(tokens, key_padding_mask=padding).gather(1, places.expand_as(x))


def carried_on(layer: RaceAttention, x: Tensor, rng: random.Random, path: Path) -> Tensor:
    """Segments and steps, the state between some of them from a file."""
    state, outs, begin = None, [], 0
    while begin < x.shape[1]:
        size = rng.choice([1, 1, 2, 9])
        if size == 1 and rng.random() < 0.5:
            out, state = layer.step(x[:, begin], state)
            out = out.unsqueeze(1)
        else:
            out, state = layer(x[:, begin : begin + size], state=state, return_state=True)
        outs.append(out)
        begin += out.shape[1]
    state.save(path, **layer.hash())
    again = RaceAttentionState.load(path, **layer.hash())
    assert relative_error(layer.step(x[:, 0], again)[0], layer.step(x[:, 0], state)[0]) == 0
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("seed", range(40))
def test_every_way_gives_the_same(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    layer = drawn(rng)
    x = torch.randn(rng.choice([1, 2, 3]), rng.choice([1, 2, 5, 17, 40]), EMBED, dtype=torch.float64)
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def gradients(out: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out.square().sum(), parameters, allow_unused=True, materialize_grads=True))

    whole = layer(x)
    right = gradients(whole)
    ways = {"packed": packed(layer, x), "padded": padded(layer, x, rng)}
    if layer.causal:
        ways["carried on"] = carried_on(layer, x, rng, tmp_path / "state.safetensors")
    for name, out in ways.items():
        assert relative_error(out, whole) < 1e-11, name
        for ours, gradient in zip(gradients(out), right, strict=True):
            assert relative_error(ours, gradient, scale=1e-3) < 1e-9, name
