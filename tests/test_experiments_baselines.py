"""Every baseline against its published formula, stated independently with loops or other identities."""

import itertools
import math
import sys
import types

import pytest
import torch

from experiments.baselines import MIXERS, make_mixer
from experiments.baselines.base import rotate
from experiments.baselines.kernelised import kernel_attention
from experiments.baselines.performer import orthogonal_gaussian
from experiments.config import ConfigError

OPTIONS = {
    "race": {"tables": 2, "planes": 2, "conv_size": 3},
    "softmax": {"rope": 100.0},
    "performer": {"features": 16},
    "linformer": {"rank": 3},
    "yoso": {"hashes": 0},
}
OPTIONAL = ("gla", "retnet")  # of another package
HERE = [name for name in MIXERS if name not in OPTIONAL]
CAUSAL = [name for name in HERE if name != "linformer"]
LENGTH = 13


def mixer_of(name, causal, **options):
    torch.manual_seed(0)
    options = OPTIONS.get(name, {}) | options
    return make_mixer(name, 8, 2, causal=causal, max_length=2 * LENGTH, seed=4, options=options).double()


def tokens(batch=2, length=LENGTH, seed=1):
    return torch.randn(batch, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def heads(mixer, x):
    """Lists of query, key, value vectors by row, head, token."""
    return mixer.project(x)


def expected(mixer, weight, x, normalise=True, finish=None):
    """out_i = sum_j w(q_i, k_j) v_j, over all keys or the past, written with loops."""
    query, key, value = heads(mixer, x)
    out = torch.zeros_like(value)
    for b in range(x.shape[0]):
        for h in range(2):
            for i in range(x.shape[1]):
                keys = range(i + 1) if mixer.causal else range(x.shape[1])
                weights = torch.stack([weight(query[b, i, h], key[b, j, h]) for j in keys])
                if normalise:
                    weights = weights / weights.sum()
                total = sum(w * value[b, j, h] for w, j in zip(weights, keys, strict=True))
                out[b, i, h] = total if finish is None else finish(total)
    return mixer.out(out.flatten(-2))


def angle(q, k):
    return torch.acos(torch.dot(q, k) / q.norm() / k.norm())


def elu1(x):
    return torch.where(x > 0, x + 1, x.exp())


FORMULAS = {
    "softmax": ({"rope": None}, lambda q, k: (torch.dot(q, k) / 2).exp(), {}),  # D = 4
    "linear": ({}, lambda q, k: torch.dot(elu1(q), elu1(k)), {}),
    "angular": ({"gamma": 3.0}, lambda q, k: (1 - angle(q, k) / math.pi) ** 3, {}),
    "yoso": (
        {"tau": 5, "hashes": 0},
        lambda q, k: (1 - angle(q, k) / math.pi) ** 5,
        {"normalise": False, "finish": lambda v: v / v.norm()},
    ),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name, causal):
    options, weight, how = FORMULAS[name]
    mixer = mixer_of(name, causal, **options)
    x = tokens()
    torch.testing.assert_close(mixer(x), expected(mixer, weight, x, **how), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_sigmoid_formula(causal):
    mixer = mixer_of("sigmoid", causal)
    n = 2 * LENGTH if causal else LENGTH
    x = tokens()
    want = expected(mixer, lambda q, k: 1 / (1 + n * (-torch.dot(q, k) / 2).exp()), x, normalise=False)
    torch.testing.assert_close(mixer(x), want)


@pytest.mark.parametrize("share", [False, True])
def test_linformer_is_softmax_over_projected_keys(share):
    mixer = mixer_of("linformer", False, share=share)
    x = tokens()
    query, key, value = heads(mixer, x)
    e = mixer.key_projection[:, :LENGTH]
    f = e if share else mixer.value_projection[:, :LENGTH]
    out = torch.zeros_like(value)
    for b in range(2):
        for h in range(2):
            weights = (query[b, :, h] @ (e @ key[b, :, h]).T / 2).softmax(-1)
            out[b, :, h] = weights @ (f @ value[b, :, h])
    torch.testing.assert_close(mixer(x), mixer.out(out.flatten(-2)))
    with pytest.raises(ValueError, match=f"max_length = {2 * LENGTH}"):
        mixer(tokens(length=2 * LENGTH + 1))


@pytest.mark.parametrize("causal", [False, True])
def test_performer_formula(causal):
    mixer = mixer_of("performer", causal, eps=0.0)

    def features(x):
        x = x / 4**0.25  # D = 4
        return torch.stack([(torch.dot(w, x) - torch.dot(x, x) / 2).exp() for w in mixer.projection.double()])

    x = tokens()
    torch.testing.assert_close(mixer(x), expected(mixer, lambda q, k: torch.dot(features(q), features(k)), x))


def test_performer_kernel_is_unbiased():
    q, k = (torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (8, 9))
    draws = []
    for seed in range(300):
        w = orthogonal_gaussian(16, 4, seed).double() / 4**0.25
        phi_q, phi_k = ((w @ x - x @ x / 4).exp() / 4 for x in (q, k))
        draws.append(phi_q @ phi_k)
    found = torch.stack(draws)
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - (q @ k / 2).exp()) < 4 * error
    assert error < 0.1 * found.mean()


def test_performer_projections_are_orthogonal_and_gaussian():
    w = orthogonal_gaussian(10, 4, seed=0)
    assert w.shape == (10, 4)
    for block in w.split(4):
        gram = block @ block.T
        torch.testing.assert_close(gram, gram.diagonal().diag(), atol=1e-5, rtol=0)
    many = torch.cat([orthogonal_gaussian(4, 4, seed=i) for i in range(4000)])
    torch.testing.assert_close(many.T @ many / len(many), torch.eye(4), atol=0.05, rtol=0)
    torch.testing.assert_close(many.square().sum(1).mean(), torch.tensor(4.0), atol=0.1, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_yoso_sampled_tends_to_its_expectation_and_has_its_gradient(causal):
    sampled, mean = mixer_of("yoso", causal, hashes=4000, tau=3), mixer_of("yoso", causal, hashes=0, tau=3)
    mean.load_state_dict(sampled.state_dict())
    x = tokens()
    torch.manual_seed(0)
    torch.testing.assert_close(sampled(x), mean(x), atol=0.05, rtol=0.05)
    # d w / d cosine = tau / 2 * w: equation 7's bound, against the true derivative
    similarity = torch.tensor([[[[0.3, -0.6]]]], dtype=torch.float64, requires_grad=True)
    weights = mean.expected(similarity)
    true = torch.autograd.grad(weights.sum(), similarity)[0]
    from experiments.baselines.yoso import _LowerBoundGradient

    passed = _LowerBoundGradient.apply(similarity, weights.detach(), 3)
    torch.testing.assert_close(passed, weights)
    bound = torch.autograd.grad(passed.sum(), similarity)[0]
    torch.testing.assert_close(bound, 1.5 * weights.detach())
    assert (bound <= true).all()


@pytest.mark.parametrize("hashes", [1, 8, 19])
def test_yoso_counts_the_hashes_in_which_all_signs_agree(hashes):
    mixer = mixer_of("yoso", False, hashes=hashes, tau=3)
    query, key = (torch.randn(2, length, 2, mixer.key_dim) for length in (5, 7))
    torch.manual_seed(1)
    found = mixer.sampled(query, key)
    torch.manual_seed(1)
    planes = torch.randn(hashes, 3, mixer.key_dim)
    for batch, i, j, head in itertools.product(range(2), range(5), range(7), range(2)):
        sides = [[plane @ x > 0 for plane in planes] for x in (query[batch, i, head], key[batch, j, head])]
        agree = [bool((mine == other).all()) for mine, other in zip(*sides, strict=True)]
        assert float(found[batch, head, i, j]) == pytest.approx(sum(agree) / hashes)


@pytest.mark.parametrize("length", [0, 1, 127, 128, 129, 300])
def test_chunked_causal_sums_equal_the_masked_matrix(length):
    generator = torch.Generator().manual_seed(length)
    query, key = (torch.rand(2, length, 3, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    value = torch.randn(2, length, 3, 4, dtype=torch.float64, generator=generator)
    mask = torch.rand(2, length, generator=generator) < 0.8
    found = kernel_attention(query, key, value, causal=True, key_mask=mask, eps=0.1)
    scores = torch.einsum("bthr,bshr->bhts", query, key).tril() * mask[:, None, None]
    want = torch.einsum("bhts,bshd->bthd", scores, value) / (scores.sum(-1).transpose(1, 2)[..., None] + 0.1)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_mixers_do_not_see_the_future(name):
    mixer = mixer_of(name, True)
    x = tokens()
    changed = x.clone()
    changed[:, 7:] += 1.0
    torch.testing.assert_close(mixer(changed)[:, :7], mixer(x)[:, :7], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(mixer(changed)[:, 7], mixer(x)[:, 7])


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("causal", [False, True])
def test_padding_has_no_effect(name, causal):
    if causal and name not in CAUSAL:
        with pytest.raises(ValueError, match="causal: got True"):
            mixer_of(name, True)
        return
    mixer = mixer_of(name, causal)
    x = tokens()
    padded = torch.cat((x, 9 * tokens(length=5, seed=3)), dim=1)
    padding = torch.zeros(2, LENGTH + 5, dtype=torch.bool)
    padding[:, LENGTH:] = True
    torch.testing.assert_close(mixer(padded, key_padding_mask=padding)[:, :LENGTH], mixer(x), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", HERE)
def test_gradients_are_finite_where_query_and_key_are_equal(name):
    mixer = mixer_of(name, name in CAUSAL)
    x = tokens()[:, :1].expand(-1, LENGTH, -1).clone().requires_grad_()
    mixer(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("name", HERE)
def test_mixers_without_a_state_say_so(name):
    mixer = mixer_of(name, name in CAUSAL)
    if mixer.recurrent:
        out, state = mixer(tokens(), return_state=True)
        assert out.shape == (2, LENGTH, 8)
        assert state is not None
    else:
        with pytest.raises(ValueError, match="keeps none"):
            mixer(tokens(), return_state=True)


def test_rotary_products_depend_on_the_distance_alone():
    q, k = (torch.randn(1, 1, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2))

    def product(i, j):
        return float((rotate(q, 100.0, i) * rotate(k, 100.0, j)).sum())

    assert product(5, 3) == pytest.approx(product(1002, 1000))
    assert product(5, 3) != pytest.approx(product(5, 4))
    first, second = q[0, 0, 0, :3], q[0, 0, 0, 3:]
    turned = rotate(q, 100.0, 7)[0, 0, 0]
    for i in range(3):  # each pair as one complex number
        z = complex(first[i], second[i]) * complex(math.cos(7 * 100 ** (-i / 3)), math.sin(7 * 100 ** (-i / 3)))
        assert complex(turned[i], turned[i + 3]) == pytest.approx(z)
    with pytest.raises(ValueError, match="rope: got head size 5"):
        rotate(torch.zeros(1, 1, 1, 5), 100.0)


class Layer(torch.nn.Module):
    """Stands for a layer of flash-linear-attention: doubles its input and keeps its arguments."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, hidden_states, attention_mask=None):
        self.mask = attention_mask
        return 2 * hidden_states, None, None


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_package_is_named_where_it_is_missing_and_called_where_it_is_not(name, monkeypatch):
    def make(causal=True):
        return make_mixer(name, 8, 2, causal=causal, max_length=9, options={"expand_v": 1.0})

    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setitem(sys.modules, "fla.layers", None)
    with pytest.raises(ConfigError, match="pip install flash-linear-attention"):
        make()
    with pytest.raises(ConfigError, match="causal: got False"):
        make(causal=False)
    layers = types.ModuleType("fla.layers")
    layers.GatedLinearAttention = layers.MultiScaleRetention = Layer
    monkeypatch.setitem(sys.modules, "fla.layers", layers)
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    mixer = make()
    assert mixer.layer.options == {"hidden_size": 8, "num_heads": 2, "expand_v": 1.0}
    x = tokens()
    assert torch.equal(mixer(x), 2 * x)
    padding = torch.arange(LENGTH).expand(2, -1) >= 9
    mixer(x, key_padding_mask=padding)
    assert torch.equal(mixer.layer.mask, (~padding).double())
    with pytest.raises(ValueError, match="keeps none"):
        mixer(x, return_state=True)


@pytest.mark.parametrize("length", [1, LENGTH, 300])
def test_linear_with_decay_is_a_recurrence(length):
    mixer = mixer_of("linear", True, decay="per_token")
    torch.nn.init.normal_(mixer.decay_weight)
    x = tokens(length=length)
    query, key, value = heads(mixer, x)
    decay = mixer.log_decay(x).exp().double()
    out = torch.zeros_like(value)
    for b in range(2):
        for h in range(2):
            total, count = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
            for t in range(length):
                k = elu1(key[b, t, h])
                total = decay[b, t, h] * total + torch.outer(k, value[b, t, h])
                count = decay[b, t, h] * count + k
                q = elu1(query[b, t, h])
                out[b, t, h] = q @ total / (q @ count)
    torch.testing.assert_close(mixer(x), mixer.out(out.flatten(-2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "linear"])
def test_convolution_and_gate_around_a_baseline(name):
    mixer = mixer_of(name, True, conv_size=3, norm_gate=True)
    bare = mixer_of(name, True)
    x = tokens()
    channels = torch.nn.functional.pad(mixer.qkv(x).transpose(1, 2), (2, 0))
    channels = torch.nn.functional.conv1d(channels, mixer.conv_weight.unsqueeze(1), groups=24).transpose(1, 2)
    bare.qkv, bare.out = torch.nn.Identity(), torch.nn.Identity()
    mixed = bare(channels).unflatten(-1, (2, 4))
    mixed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.head_norm.weight
    gate = mixer.gate(x)
    want = mixer.out(mixed.flatten(-2) * gate * gate.sigmoid())
    torch.testing.assert_close(mixer(x), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "causal", "options", "message"),
    [
        ("softmax", False, {"conv_size": 3}, "conv_size: got 3 with causal=False"),
        ("linear", False, {"decay": "per_token"}, "decay: got 'per_token' with causal=False"),
        ("linear", True, {"decay": "fast"}, "decay: got 'fast'"),
    ],
)
def test_options_that_a_baseline_refuses(name, causal, options, message):
    with pytest.raises(ConfigError, match=message):
        mixer_of(name, causal, **options)


def test_softmax_with_a_gate_keeps_its_state_and_with_a_convolution_none():
    mixer, x = mixer_of("softmax", True, norm_gate=True), tokens()
    first, state = mixer(x[:, :5], return_state=True)
    second, _ = mixer(x[:, 5:], state=state, return_state=True)
    torch.testing.assert_close(torch.cat((first, second), dim=1), mixer(x))
    with pytest.raises(ValueError, match="with conv_size"):
        mixer_of("softmax", True, conv_size=2)(x, return_state=True)


@pytest.mark.parametrize("name", ["softmax", "linear", "performer", "sigmoid", "yoso", "angular"])
def test_keys_of_another_size_than_values(name):
    options = {"key_dim": 6, "rope": 100.0, "conv_size": 3, "qk_norm": True, "norm_gate": True}
    mixer = make_mixer(name, 32, 2, causal=True, max_length=LENGTH, options=options)
    x = torch.randn(2, LENGTH, 32)
    query, key, value = mixer.project(x)
    assert query.shape == key.shape == (2, LENGTH, 2, 6)
    assert value.shape == (2, LENGTH, 2, 16)
    assert torch.allclose(query.square().mean(-1), torch.ones(()), atol=1e-3)
    assert mixer(x).shape == x.shape
    with pytest.raises(ConfigError, match="key_dim: got 0"):
        make_mixer(name, 32, 2, causal=True, max_length=LENGTH, options={"key_dim": 0})


def test_what_is_tried_around_the_core_of_race():
    def make(**options):
        torch.manual_seed(1)
        return make_mixer("race", 32, 2, causal=True, max_length=LENGTH, options={"tables": 2, "planes": 2} | options)

    x = torch.randn(2, LENGTH, 32)
    plain, contrast = make(), make(contrast=True)
    assert torch.equal(make(wide_core=True)(x), plain(x))
    assert not torch.allclose(make(qk_norm=True)(x), plain(x), atol=1e-3)
    assert torch.equal(contrast(x), plain(x))  # nothing is taken off at first
    torch.nn.init.ones_(contrast.contrast_bias)
    mean = plain.v_proj(x).cumsum(1) / torch.arange(1, LENGTH + 1)[:, None]  # of the values seen
    assert torch.allclose(contrast(x), plain(x) - plain.out_proj(mean), atol=1e-5)
    with pytest.raises(ValueError, match="state: got one asked for"):
        contrast(x, return_state=True)
