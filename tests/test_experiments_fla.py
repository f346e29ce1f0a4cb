"""Gated linear attention and RetNet, as flash-linear-attention computes them, against their recurrences written out.

That package is optional and needs a GPU; without both those tests are skipped.
"""

import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from experiments.baselines import make_mixer
from experiments.baselines.base import rotate
from experiments.baselines.fla import one_configuration

with_package = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("fla") is None,
    reason="needs a GPU and flash-linear-attention",
)
DIM, HEADS = 64, 2
LENGTHS = [40, 100]  # up to 64 tokens go another way there than more


def mixer_and_tokens(name, length, options):
    torch.manual_seed(0)
    mixer = make_mixer(name, DIM, HEADS, causal=True, max_length=length, options=options).cuda()
    return mixer, torch.randn(2, length, DIM, device="cuda", requires_grad=True)


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


def check(mixer, tokens, expected):
    """Output and the tokens' gradient of a mixer against those of an output written out in float64."""
    out = mixer(tokens)
    weights = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, tokens, weights)
    (wanted,) = torch.autograd.grad(expected, tokens, weights.double())
    for one, other in ((out, expected), (got, wanted)):
        assert float((one.double() - other).detach().norm() / other.detach().norm()) < 5e-3  # products there are TF32


@with_package
@pytest.mark.parametrize("length", LENGTHS)
def test_gated_linear_attention(length):
    mixer, tokens = mixer_and_tokens("gla", length, {})
    layer, x = mixer.layer, tokens.double()
    query, key, value = (heads(x, p.weight) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    low, high = layer.gk_proj
    logit = F.linear(F.linear(x, low.weight.double()), high.weight.double(), high.bias.double())
    decay = (F.logsigmoid(logit.unflatten(-1, (HEADS, -1))) / 16).exp()
    check(mixer, tokens, finished(layer, recurrence(query, key, value, decay), x))


@with_package
@pytest.mark.parametrize("length", LENGTHS)
def test_retnet(length):
    mixer, tokens = mixer_and_tokens("retnet", length, {"expand_v": 1.0})
    layer, x = mixer.layer, tokens.double()
    query, key, value = (heads(x, p.weight) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    query, key = rotate(query, 10_000.0), rotate(key, 10_000.0)
    decay = 1 - 2.0 ** (-5 - torch.arange(HEADS, device="cuda", dtype=torch.float64))
    decay = decay[:, None].expand(2, length, HEADS, query.shape[-1])
    check(mixer, tokens, finished(layer, recurrence(query, key, value, decay), x))


def toy_package(name, prune=None):
    """A package of one module with a kernel to tune, and how many times it was run while it was tuned."""
    triton = pytest.importorskip("triton")

    class Stub(triton.JITFunction):
        runs = 0

        def run(self, *args, **kwargs):
            Stub.runs += 1

    def kernel(x, K, BK):
        pass

    configs = [
        triton.Config({"BK": size}, num_warps=warps, num_stages=stages)
        for size in (32, 64, 128)
        for warps in (1, 4, 8)
        for stages in (2, 4)
    ]
    rules = None if prune is None else {"early_config_prune": prune}
    tuner = triton.autotune(configs, key=["K"], prune_configs_by=rules)(Stub(kernel))
    module = types.ModuleType(f"{name}.kernels")
    module.kernel = triton.heuristics({"EVEN": lambda arguments: True})(tuner)
    return module, tuner, Stub


def test_a_kernel_takes_one_configuration(monkeypatch):
    module, tuner, stub = toy_package("toy")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert one_configuration("toy") == 1
    tuner.run(torch.zeros(1), 64)
    chosen = tuner.best_config
    assert (chosen.kwargs["BK"], chosen.num_warps, chosen.num_stages) == (64, 4, 2)
    assert stub.runs <= 2  # once in place of a benchmark, which some versions leave out, and once for its own sake


def test_what_a_kernel_rules_out_stays_out(monkeypatch):
    def prune(configs, named, **kwargs):
        return [config for config in configs if config.kwargs["BK"] == 32 and config.num_warps != 4]

    module, tuner, _ = toy_package("toy", prune)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    one_configuration("toy")
    tuner.run(torch.zeros(1), 64)
    assert (tuner.best_config.kwargs["BK"], tuner.best_config.num_stages) == (32, 2)
    assert tuner.best_config.num_warps == 8  # half as far from 4 as 1 is
