"""NaN and infinity: what depends on them is NaN, what does not is as it is without them, and padding may hold both."""

from __future__ import annotations

import pytest
import torch

from race_attention.testing import make_inputs
from tests.helpers import FLOAT32, FLOAT64, backend_params, evaluate, skip_unless_runnable, whole

NAN, INF = float("nan"), float("inf")
BACKENDS = pytest.mark.parametrize(("backend", "dtype"), backend_params(dtypes=[FLOAT64, FLOAT32]))
TOKENS, AT = 600, 300
NEAR = 256  # tokens before the poison that its chunk may hold: there 0 times NaN is NaN, in any product of matrices


def poisoned(name, value, causal, dtype, device, masked=False, tokens=TOKENS, at=AT):
    """Inputs of two heads, the first of which has ``value`` in token ``at`` of ``name``."""
    options = {"causal": causal, "batch": 1, "heads": 2, "dim": 16, "value_dim": 8, "planes": 2, "beta": 1.0}
    inputs = make_inputs(**options, tokens=tokens, dtype=dtype, device=device, requires_grad=True)
    inputs["key_mask"] = torch.ones(1, tokens, dtype=torch.bool, device=device)
    inputs["key_mask"][0, at] = not masked
    with torch.no_grad():
        inputs[name][0, at, 0, 3] = value
    return inputs


def bad_tokens(x):
    """[T] of the first head: whether anything of a token is not finite; the second head is finite throughout."""
    assert bool(x[:, :, 1].isfinite().all())
    return ~x[0, :, 0].isfinite().all(-1)


@BACKENDS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_reaches_what_depends_on_it_and_no_other_head(backend, dtype, name, causal):
    skip_unless_runnable(backend)
    results = evaluate(whole, poisoned(name, NAN, causal, dtype, backend.device), backend=backend.name)
    bad = bad_tokens(results["out"])
    if name == "query":
        assert bad.nonzero().flatten().tolist() == [AT]
        assert bool(results["mass"].isfinite().all() and results["value_sum"].isfinite().all())
        sees = bad_tokens(results["gradient of key"])  # the keys that the query sees
        assert bool(sees[: AT + 1].all())
        assert causal is False or not bool(sees[AT + NEAR :].any())
    else:
        assert bool(bad[AT:].all())
        assert bool(bad.all()) or (causal and not bool(bad[: AT - NEAR].any()))
        assert bool(results["value_sum"][:, 0].isnan().any())
        assert bool(results["mass"][:, 0].isfinite().all()) is (name == "value")
    assert bool(bad_tokens(results[f"gradient of {name}"])[AT]) or name == "value"
    assert bool(results["gradient of hyperplanes"][0].isnan().any())


@BACKENDS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["key", "value"])
def test_what_is_masked_may_hold_anything(backend, dtype, name, value, causal):
    skip_unless_runnable(backend)
    poison = evaluate(whole, poisoned(name, value, causal, dtype, backend.device, masked=True), backend=backend.name)
    clean = evaluate(whole, poisoned(name, 0.5, causal, dtype, backend.device, masked=True), backend=backend.name)
    for result, right in clean.items():
        assert torch.equal(poison[result], right), result


@BACKENDS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_infinite_query_or_key_has_the_sign_of_a_large_one(backend, dtype, sign, causal):
    """tanh of infinity is 1: outputs are finite."""
    skip_unless_runnable(backend)
    if backend.name == "triton":
        pytest.skip("answers NaN: hyperplanes are padded with zeros and split in two parts, and both meet infinity")
    for name in ("query", "key"):
        infinite = evaluate(whole, poisoned(name, sign * INF, causal, dtype, backend.device), backend=backend.name)
        large = evaluate(whole, poisoned(name, sign * 1e6, causal, dtype, backend.device), backend=backend.name)
        assert torch.allclose(infinite["out"], large["out"], rtol=1e-5, atol=1e-6)
