"""Gated linear attention and RetNet, as flash-linear-attention computes them, against their recurrences written out.

That package is optional and needs a GPU; without both these tests are skipped.
"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from experiments.baselines import make_mixer
from experiments.baselines.base import rotate

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("fla") is None,
    reason="needs a GPU and flash-linear-attention",
)
DIM, HEADS = 64, 2
LENGTHS = [40, 100]  # up to 64 tokens go another way there than more


def mixer_and_tokens(name, length, options):
    torch.manual_seed(0)
    mixer = make_mixer(name, DIM, HEADS, causal=True, max_length=length, options=options).cuda()
    return mixer, torch.randn(2, length, DIM, device="cuda")


def recurrence(query, key, value, decay):
    """S_t = diag(decay_t) S_{t-1} + k_t v_t^T, o_t = q_t S_t / sqrt(D): [B, T, H, Dv] of [B, T, H, D]."""
    state = query.new_zeros(*query.shape[:1], *query.shape[2:], value.shape[-1])
    out = []
    for t in range(query.shape[1]):
        state = decay[:, t].unsqueeze(-1) * state + key[:, t].unsqueeze(-1) * value[:, t].unsqueeze(-2)
        out.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state) * query.shape[-1] ** -0.5)
    return torch.stack(out, dim=1)


def heads(x, weight):
    return F.linear(x, weight.double()).unflatten(-1, (HEADS, -1))


def finished(layer, out, x):
    """Norm of each head, gate, output projection."""
    norm = layer.g_norm_swish_gate
    out = F.rms_norm(out, out.shape[-1:], norm.weight.double(), norm.eps)
    out = out * F.silu(heads(x, layer.g_proj.weight))
    return F.linear(out.flatten(-2), layer.o_proj.weight.double())


def close(got, expected):
    return float((got.double() - expected).norm() / expected.norm()) < 5e-3  # products there are TF32


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_gated_linear_attention(length):
    mixer, tokens = mixer_and_tokens("gla", length, {})
    layer, x = mixer.layer, tokens.double()
    query, key, value = (heads(x, p.weight) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    low, high = layer.gk_proj
    logit = F.linear(F.linear(x, low.weight.double()), high.weight.double(), high.bias.double())
    decay = (F.logsigmoid(logit.unflatten(-1, (HEADS, -1))) / 16).exp()
    assert close(mixer(tokens), finished(layer, recurrence(query, key, value, decay), x))


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_retnet(length):
    mixer, tokens = mixer_and_tokens("retnet", length, {"expand_v": 1.0})
    layer, x = mixer.layer, tokens.double()
    query, key, value = (heads(x, p.weight) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    query, key = rotate(query, 10_000.0), rotate(key, 10_000.0)
    decay = 1 - 2.0 ** (-5 - torch.arange(HEADS, device="cuda", dtype=torch.float64))
    decay = decay[:, None].expand(2, length, HEADS, query.shape[-1])
    assert close(mixer(tokens), finished(layer, recurrence(query, key, value, decay), x))
