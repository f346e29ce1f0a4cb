"""The backward pass by blocks of 16-bit inputs: where blocks, chunks and runs begin and end, and hard values there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal

import pytest
import torch

from race_attention.testing import assert_within_budget, make_inputs
from tests.helpers import assert_decay_gradient, assert_equal_results, by_oracle, evaluate, one_run, whole
from tests.interpreter import DEVICE, INTERPRETED, KERNELS_RUN

pytest.importorskip("triton")

pytestmark = KERNELS_RUN
FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16
DTYPES = (FLOAT16,) if INTERPRETED else (FLOAT16, BFLOAT16)

#: Chunks are 128 tokens, of more than 16 buckets 64, blocks 64 and with large heads 32: one token more, one less, and
#: all of it at once.
SHAPES: dict[str, dict[str, Any]] = {
    "half-a-chunk": {"tokens": 64},
    "one-token-over": {"tokens": 129, "decay": "token"},
    "one-token-short": {"tokens": 255, "decay": "head", "planes": 1, "tables": 3},
    "a-head": {"tokens": 300, "decay": "head", "heads": 4, "kv_heads": 2},
    "full-tile-stretches": {"tokens": 270, "planes": 4, "tables": 4, "decay": "token"},
    "full-tile": {"tokens": 200, "planes": 4, "tables": 4, "heads": 2, "kv_heads": 1, "decay": "token"},
    "three-planes": {"tokens": 130, "planes": 3, "tables": 3, "heads": 4, "kv_heads": 2, "decay": "token"},
    "batch": {"batch": 2, "tokens": 140, "masked": 0.3, "decay": "token", "initial_state": True},
    "large-heads": {"tokens": 140, "value_dim": 130, "decay": "token"},
    "packed": {"lengths": (70, 0, 1, 200, 128, 63), "decay": "token", "initial_state": True},
    "packed-groups": {"lengths": (129, 90), "heads": 4, "kv_heads": 2, "masked": 0.2},
    "at-once": {"tokens": 200, "planes": 4, "tables": 4, "heads": 2},
    "at-once-packed": {"lengths": (70, 0, 1, 129), "planes": 3, "tables": 5, "value_dim": 10, "initial_state": True},
    "at-once-masked": {"batch": 2, "tokens": 130, "planes": 6, "tables": 1, "masked": 0.3},
}


@pytest.fixture(params=["short runs", "one run"])
def runs(request: pytest.FixtureRequest) -> Iterator[None]:
    with one_run() if request.param == "one run" else nullcontext():
        yield


def _check(options: dict[str, Any], dtype: torch.dtype) -> None:
    given: dict[str, Any] = {"causal": True, "batch": 1, "heads": 1, "dim": 6, "planes": 2, "tables": 2} | options
    inputs = make_inputs(**given, dtype=dtype, device=DEVICE, requires_grad=True, seed=8)
    right = by_oracle(inputs)
    assert_equal_results(evaluate(whole, inputs, backend="triton"), right, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("runs")
def test_equals_the_oracle(shape: str, dtype: torch.dtype) -> None:
    _check(SHAPES[shape], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["head", "token"])
@pytest.mark.parametrize("log_decay", [-0.1, -1.0])
@pytest.mark.usefixtures("one_run")
def test_decay_gradient_of_a_long_run(log_decay: float, form: Literal["head", "token"], dtype: torch.dtype) -> None:
    """It is a difference of sums that grow with the run, by what is rounded once for queries and once for keys."""
    inputs = make_inputs(
        causal=True, batch=1, tokens=300 if INTERPRETED else 4000, heads=1, dim=64, decay=form, dtype=dtype,
        device=DEVICE, scale=0.125, seed=3, requires_grad=True,
    )  # fmt: skip
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], log_decay).requires_grad_()
    right = by_oracle(inputs)
    assert_equal_results(evaluate(whole, inputs, backend="triton"), right, dtype)


@pytest.mark.skipif(not INTERPRETED, reason="of a GPU benchmarks.gpu_decay asks it, in many cases")
@pytest.mark.usefixtures("one_run")
def test_decay_gradient_of_a_long_sequence_in_float32() -> None:
    """Each token's sum is off by the last digit of those behind it in the run, and a head's is the sum of these."""
    inputs = make_inputs(
        causal=True, batch=1, tokens=2000, heads=1, dim=16, scale=0.25, decay="head", device=DEVICE, seed=2,
        requires_grad=True,
    )  # fmt: skip
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -0.5).requires_grad_()
    name = "gradient of log_decay"
    found, right = evaluate(whole, inputs, backend="triton")[name], by_oracle(inputs)
    assert_within_budget(found, right[name], torch.float32, "backward", scale=right.terms[name])


@pytest.mark.usefixtures("runs")
def test_values_of_a_common_mean() -> None:
    """What later queries give to the gradient of the masses is a difference of what their large mean gives."""
    inputs = make_inputs(
        causal=True, batch=1, tokens=300, heads=1, dim=16, planes=4, tables=4, dtype=DTYPES[-1], device=DEVICE,
        requires_grad=False, seed=10,
    )  # fmt: skip
    inputs["value"] += 3.0
    inputs = {
        name: x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    assert_equal_results(evaluate(whole, inputs, backend="triton"), by_oracle(inputs), DTYPES[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("planes", "tables"), [(2, 2), (3, 3), (4, 4)])
def test_a_decay_that_hardly_forgets(planes: int, tables: int, dtype: torch.dtype) -> None:
    """Its gradient adds up differences of what the values' large mean gives; a state's gradient would hide that."""
    inputs = make_inputs(
        causal=True, batch=1, tokens=300, heads=1, dim=16, planes=planes, tables=tables, decay="token", dtype=dtype,
        device=DEVICE, requires_grad=True, seed=1,
    )  # fmt: skip
    with torch.no_grad():
        inputs["value"] += 3.0
        inputs["log_decay"] *= 0.01 / inputs["log_decay"].abs().mean()
    assert_decay_gradient(inputs, dtype)


@pytest.mark.parametrize("block", [32, 128])
def test_blocks_of_another_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two gradients' blocks the smaller: what one leaves the other reads."""
    from race_attention.backends.triton import configs, plan, replay

    name = configs.key("causal_key_gradient", 16, 16, 16, DTYPES[-1])
    monkeypatch.setitem(configs._trial, name, configs.Config(block, 4, 1))
    plan.forget()
    replay.forget()
    try:
        _check({"tokens": 200, "decay": "token"}, DTYPES[-1])
    finally:
        monkeypatch.undo()
        plan.forget()
        replay.forget()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("every", [1, 50])
@pytest.mark.usefixtures("runs")
def test_decays_that_forget_all(every: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(
        causal=True, batch=1, tokens=200, heads=1, dim=6, decay="token", dtype=dtype, device=DEVICE,
        requires_grad=False, seed=9,
    )  # fmt: skip
    inputs["log_decay"][:, 3::every] = -1e4
    inputs = {
        name: x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    right = by_oracle(inputs)
    assert_equal_results(evaluate(whole, inputs, backend="triton"), right, dtype)
