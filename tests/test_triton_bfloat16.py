"""The 16-bit kernels with a GPU's roundings, on a machine without one: what only these show."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from race_attention import race_attention
from race_attention.testing import make_inputs
from tests.helpers import assert_decay_gradient, assert_equal_results, by_oracle, evaluate, no_tokens, whole
from tests.interpreter import INTERPRETED

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
DTYPES = (torch.float16, torch.bfloat16)
_PACKED: dict[str, Any] = {"lengths": (63, 1, 64, 0, 15, 16, 17), "heads": 4, "kv_heads": 2, "decay": "head", "dim": 6}
CASES: dict[str, dict[str, Any]] = {
    "causal": {"tokens": 150, "heads": 4, "kv_heads": 2, "planes": 3, "tables": 3, "decay": "token", "masked": 0.2},
    "causal-64": {"tokens": 150, "planes": 4, "tables": 4},
    "packed": {**_PACKED, "planes": 4, "tables": 4, "masked": 0.2},
    "causal-wide": {"tokens": 90, "heads": 2, "kv_heads": 1, "planes": 3, "tables": 9, "decay": "head", "masked": 0.2},
    "full": {"causal": False, "tokens": 90, "keys": 70, "planes": 4, "tables": 4, "masked": 0.2},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle(case: str, dtype: torch.dtype) -> None:
    from tests.bfloat16 import as_on_a_gpu

    given = {"causal": True, "batch": 1, "heads": 1, "dim": 16, "seed": 4} | CASES[case]
    inputs = make_inputs(**given, dtype=dtype, requires_grad=True)
    right = by_oracle(inputs, lambda results, x: (results[0], no_tokens(x)))
    with as_on_a_gpu():
        results = evaluate(lambda x, **how: (race_attention(**x, **how), no_tokens(x)), inputs, backend="triton")
    assert_equal_results(results, right, dtype)
    assert (results["out"].double() - right["out"]).norm() > 1e-4 * right["out"].norm()  # it rounds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("one_run")
def test_decay_gradient_of_a_long_run(dtype: torch.dtype) -> None:
    """Queries and keys round a pair differently, and what that leaves of a query's own sum adds up along a run."""
    from tests.bfloat16 import as_on_a_gpu

    inputs = make_inputs(
        causal=True, batch=1, tokens=700, heads=1, dim=16, scale=0.25, decay="head", dtype=dtype, seed=1,
        requires_grad=True,
    )  # fmt: skip
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -0.1).requires_grad_()
    right = by_oracle(inputs)
    with as_on_a_gpu():
        results = evaluate(whole, inputs, backend="triton")
    assert_equal_results(results, right, dtype)


@pytest.mark.parametrize(("planes", "tables", "tokens"), [(6, 2, 700), (4, 5, 900)])
@pytest.mark.usefixtures("one_run")
def test_decay_gradient_of_several_sub_runs(
    planes: int, tables: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the keys before a sub-run are worth is rounded alike for them and for its queries."""
    from race_attention.backends.triton import plan
    from tests.bfloat16 import as_on_a_gpu

    monkeypatch.setattr(plan, "SUB_RUN", 128)
    inputs = make_inputs(
        causal=True, batch=1, tokens=tokens, heads=1, dim=64, scale=0.125, planes=planes, tables=tables, decay="head",
        dtype=torch.bfloat16, seed=1, requires_grad=True,
    )  # fmt: skip
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -1.0).requires_grad_()
    right = by_oracle(inputs, lambda results, x: (results[0], no_tokens(x)))
    with as_on_a_gpu():
        results = evaluate(lambda x, **how: (race_attention(**x, **how), no_tokens(x)), inputs, backend="triton")
    assert_equal_results(results, right, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("planes", "decay", "mean"), [(2, -0.01, 3.0), (6, -2.0, 0.0)])
def test_decay_gradient_of_out_alone(planes: int, decay: float, mean: float, dtype: torch.dtype) -> None:
    """What values' mean gives cancels, and a token's own weight, of which all others are a part, is left out."""
    from tests.bfloat16 import as_on_a_gpu

    inputs = make_inputs(
        causal=True, batch=1, tokens=150, heads=1, dim=16, planes=planes, tables=2, decay="token", dtype=dtype, seed=1,
        requires_grad=True,
    )  # fmt: skip
    with torch.no_grad():
        inputs["value"] += mean
        inputs["log_decay"] *= decay / inputs["log_decay"].mean()
    with as_on_a_gpu():
        assert_decay_gradient(inputs, dtype)


@pytest.mark.parametrize(
    ("planes", "heads", "dtype"),
    [*((planes, heads, dtype) for planes in (2, 3) for heads in (1, 2) for dtype in DTYPES), (4, 1, torch.float16)],
    ids=str,
)
def test_decay_gradient_of_values_of_a_mean(planes: int, heads: int, dtype: torch.dtype, one_run: None) -> None:
    """Gradients of value sums are rounded where a run has chunks, and a mean of three deviations takes part in it."""
    from tests.bfloat16 import as_on_a_gpu

    inputs = make_inputs(
        causal=True, batch=1, tokens=700, heads=heads, kv_heads=1, dim=16, planes=planes, tables=planes, scale=0.25,
        decay="token", dtype=dtype, seed=1, requires_grad=True,
    )  # fmt: skip
    with torch.no_grad():
        inputs["value"] += 3.0
        inputs["log_decay"] *= -0.005 / inputs["log_decay"].mean()
    with as_on_a_gpu():
        assert_decay_gradient(inputs, dtype)


_ROUNDED: dict[str, dict[str, Any]] = {
    "tables": {"tokens": 290, "planes": 3, "tables": 20},
    "forgotten": {"tokens": 150, "planes": 4, "tables": 8},
    "grouped": {"tokens": 150, "heads": 4, "kv_heads": 2, "planes": 3, "tables": 9, "dim": 7, "value_dim": 5},
    "packed": {"lengths": (280, 1, 0, 40), "planes": 2, "tables": 40, "masked": 0.2},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "decay"), zip(_ROUNDED, (-0.3, -4.0, -1.0, -1.0), strict=True))
def test_decay_gradient_of_many_tables(case: str, decay: float, dtype: torch.dtype) -> None:
    """Where buckets fill tiles two tokens' weight is rounded once for both: it is in all sums before the two."""
    from tests.bfloat16 import as_on_a_gpu

    given = {"causal": True, "batch": 1, "heads": 1, "dim": 16, "seed": 1} | _ROUNDED[case]
    inputs = make_inputs(**given, decay="token", dtype=dtype, requires_grad=True)
    with torch.no_grad():
        inputs["log_decay"] *= decay / inputs["log_decay"].mean()
    with as_on_a_gpu():
        assert_decay_gradient(inputs, dtype)


def test_random_cases() -> None:
    from benchmarks.fuzz import checked
    from tests.bfloat16 import as_on_a_gpu

    with as_on_a_gpu():
        rows = [checked(seed, "triton", "cpu", ("bfloat16", "float16"), True, 1) for seed in range(7200000, 7200012)]
    assert not [row for row in rows if row["result"] in ("out", "error")]
    assert sum(row["result"] == "within" for row in rows) >= 9
