"""scaled_dot_product_race: the call of torch's scaled_dot_product_attention around the core."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

from race_attention import race_attention, scaled_dot_product_race
from race_attention.testing import assert_within_budget, make_inputs

pytestmark = pytest.mark.filterwarnings("ignore::race_attention.BackendWarning")

FLOAT64 = torch.float64


def both(**options):
    """Inputs for the core, and the same as scaled_dot_product_race takes them."""
    core = make_inputs(dtype=FLOAT64, requires_grad=True, **options)
    hash_only = {name: core[name] for name in ("hyperplanes", "beta")}
    heads_first = {name: core[name].transpose(1, 2) for name in ("query", "key", "value")}
    return core, {**heads_first, **hash_only}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_it_is_the_core_with_heads_first(causal, kv_heads):
    core, call = both(heads=4, kv_heads=kv_heads, dim=7, value_dim=5)
    out = scaled_dot_product_race(**call, is_causal=causal, enable_gqa=kv_heads < 4, scale=0.5)
    right = race_attention(**core, causal=causal, scale=0.5).transpose(1, 2)
    assert torch.equal(out, right)
    assert out.shape == (2, 4, 13, 5)
    found, expected = (torch.autograd.grad(x.square().sum(), core["key"], retain_graph=True)[0] for x in (out, right))
    assert_within_budget(found, expected, FLOAT64, "backward")


def test_arguments_are_torchs_own():
    """Name by name in torch's order, so that one call can stand for the other."""
    names = list(inspect.signature(scaled_dot_product_race).parameters)[:8]
    assert names == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    x = torch.randn(1, 2, 3, 4)
    F.scaled_dot_product_attention(x, x, x, None, 0.0, True, scale=1.0, enable_gqa=True)
    scaled_dot_product_race(x, x, x, None, 0.0, True, 1.0, True, hyperplanes=torch.randn(1, 1, 2, 4), beta=1.0)


def test_default_scale_is_the_papers():
    core, call = both()
    assert torch.equal(scaled_dot_product_race(**call), race_attention(**core).transpose(1, 2))


def keys(*shape, share=0.6):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < share


ROWS = {
    "[Tk]": (lambda: keys(13), lambda m: m.expand(2, 13)),
    "[1, Tk]": (lambda: keys(1, 13), lambda m: m.expand(2, 13)),
    "[B, 1, 1, Tk]": (lambda: keys(2, 1, 1, 13), lambda m: m[:, 0, 0]),
    "[B, H, 1, Tk]": (lambda: keys(2, 2, 1, 13), lambda m: m[:, :, 0].transpose(1, 2)),
    "[1, H, 1, Tk]": (lambda: keys(1, 2, 1, 13), lambda m: m[:, :, 0].transpose(1, 2).expand(2, 13, 2)),
    "[B, 1, Tq, Tk] expanded": (lambda: keys(2, 1, 1, 13).expand(2, 1, 9, 13), lambda m: m[:, 0, 0]),
    "[B, H, Tq, Tk] equal": (lambda: keys(2, 1, 1, 13).repeat(1, 2, 9, 1), lambda m: m[:, 0, 0]),
    "all true": (lambda: torch.ones(9, 13, dtype=torch.bool), lambda m: m[:1].expand(2, 13)),
}


@pytest.mark.parametrize("form", ROWS)
def test_masks_that_say_which_keys_take_part(form):
    make_mask, as_key_mask = ROWS[form]
    mask = make_mask()
    core, call = both(tokens=9, keys=13)
    out = scaled_dot_product_race(**call, attn_mask=mask)
    assert_within_budget(out, race_attention(**core, key_mask=as_key_mask(mask)).transpose(1, 2), FLOAT64)


def test_mask_of_grouped_heads():
    core, call = both(heads=4, kv_heads=2)
    mask = keys(2, 2, 1, 13)
    out = scaled_dot_product_race(**call, attn_mask=mask.repeat_interleave(2, dim=1), enable_gqa=True)
    right = race_attention(**core, key_mask=mask[:, :, 0].transpose(1, 2)).transpose(1, 2)
    assert_within_budget(out, right, FLOAT64)


def test_mask_together_with_is_causal():
    core, call = both()
    mask = keys(2, 1, 1, 13)
    out = scaled_dot_product_race(**call, attn_mask=mask, is_causal=True)
    assert_within_budget(out, race_attention(**core, key_mask=mask[:, 0, 0], causal=True).transpose(1, 2), FLOAT64)


def test_queries_that_see_nothing_get_zero():
    _, call = both()
    assert not scaled_dot_product_race(**call, attn_mask=torch.zeros(13, dtype=torch.bool)).any()


@pytest.mark.parametrize(("tokens", "keys"), [(0, 5), (5, 0), (1, 5)])
def test_masks_at_the_edges(tokens, keys):
    _, call = both(tokens=tokens, keys=keys)
    mask = torch.ones(2, 1, tokens, keys, dtype=torch.bool)
    assert scaled_dot_product_race(**call, attn_mask=mask).shape == (2, 2, tokens, 8)


REFUSED = [
    ({"attn_mask": torch.zeros(13, 13)}, TypeError, r"attn_mask: got torch.float32, allowed is torch.bool"),
    ({"attn_mask": torch.ones(13, 13).tril().bool()}, ValueError, r"attn_mask: got .*between queries.*is_causal"),
    ({"attn_mask": torch.ones(12).bool()}, ValueError, r"attn_mask: got shape \[12\], allowed broadcasts to \[2, 4"),
    ({"attn_mask": keys(1, 4, 1, 13)}, ValueError, r"attn_mask: got .*query heads of one key head, allowed is"),
    ({"attn_mask": True}, TypeError, r"attn_mask: got bool, allowed is a Tensor"),
    ({"dropout_p": 1.5}, ValueError, r"dropout_p: got 1.5, allowed is in \[0, 1\]"),
    ({"dropout_p": -0.5}, ValueError, r"dropout_p: got -0.5, allowed is in \[0, 1\]"),
    ({"dropout_p": "0"}, TypeError, r"dropout_p: got '0', allowed is a number"),
    ({"enable_gqa": False}, ValueError, r"enable_gqa: got False with 4 query and 2 key heads, allowed is True"),
    ({"enable_gqa": 1}, TypeError, r"enable_gqa: got 1, allowed is a bool"),
    ({"is_causal": 1}, TypeError, r"is_causal: got 1, allowed is a bool"),
    ({"attn_mask": keys(13).to("meta")}, ValueError, r"attn_mask: got a tensor on meta, allowed is .* device, cpu"),
    ({"query": torch.zeros(2, 3, 13, 8), "attn_mask": keys(2, 3, 1, 13)}, ValueError, r"query: got H = 3 .* G = 2"),
    ({"query": torch.zeros(2, 0, 13, 8)}, ValueError, r"query: got H = 0 .* G = 2"),
    ({"key": torch.zeros(2, 0, 13, 8)}, ValueError, r"query: got H = 4 .* G = 0"),
    ({"query": torch.zeros(2, 13, 8)}, ValueError, r"query: got shape \[2, 13, 8\], allowed is \[B, heads, T, size\]"),
    ({"value": None}, TypeError, r"value: got NoneType, allowed is a Tensor"),
    ({"scale": 0.0}, ValueError, r"scale: got 0.0, allowed is finite and positive"),
    ({"beta": float("nan")}, ValueError, r"beta: got nan, allowed is a number in \(0, 10000\]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_anything_else_is_refused(change, error, message):
    _, call = both(heads=4, kv_heads=2)
    with pytest.raises(error, match=message):
        scaled_dot_product_race(**{**call, "enable_gqa": True, **change})


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_dropout_drops_keys(share):
    """One-hot values show which keys were seen: each row and head drops its own, the rest keeps its proportions."""
    _, call = both(batch=3, tokens=60, value_dim=60)
    call["value"] = torch.eye(60, dtype=FLOAT64).expand(3, 2, 60, 60)
    full = scaled_dot_product_race(**call)
    out = scaled_dot_product_race(**call, dropout_p=share)
    seen = out > 0
    assert (seen == seen[:, :, :1]).all()  # a key is dropped for all queries
    kept = seen[:, :, 0]
    assert abs(kept.double().mean().item() - (1 - share)) < 4.5 * (share * (1 - share) / kept.numel()) ** 0.5
    assert len({tuple(row.tolist()) for row in kept.flatten(0, 1)}) == 6
    rest = full * seen
    assert_within_budget(out, rest / rest.sum(-1, keepdim=True), FLOAT64)


def test_dropout_at_its_ends():
    _, call = both()
    assert torch.equal(scaled_dot_product_race(**call, dropout_p=0.0), scaled_dot_product_race(**call))
    assert not scaled_dot_product_race(**call, dropout_p=1.0).any()
    masked = scaled_dot_product_race(**call, dropout_p=0.5, attn_mask=keys(2, 1, 1, 13))
    assert masked.isfinite().all()
