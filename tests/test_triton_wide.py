"""Causal kernels of heads whose buckets fill several tiles, with sub-runs and runs so short that few tokens fill many.

On a GPU as they are, without one in Triton's interpreter (TRITON_INTERPRET=1), else skipped.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from race_attention.testing import make_inputs, oracle
from tests.helpers import assert_decay_gradient, assert_equal_results, evaluate, in_double, whole
from tests.interpreter import DEVICE, INTERPRETED, KERNELS_RUN

pytest.importorskip("triton")
from race_attention.backends.triton import (
    configs,
    full_wide,
    launch_full_wide,
    launch_wide,
    plan,
    wide,
    wide_configs,
    wide_gradients,
    wide_halves,
    wide_segments,
)

pytestmark = KERNELS_RUN
FLOAT32 = torch.float32
DTYPES = (FLOAT32,) if INTERPRETED else (FLOAT32, torch.float16, torch.bfloat16)

#: One case for each thing that a kernel does, in sub-runs of 32 and runs of 64 tokens.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"tokens": 100, "planes": 6, "tables": 2, "heads": 1},
    "every-option": {
        "tokens": 69, "planes": 7, "tables": 1, "kv_heads": 1, "decay": "token", "initial_state": True,
        "masked": 0.2, "value_dim": 3,
    },
    "packed": {
        "lengths": (67, 0, 1, 33), "planes": 3, "tables": 9, "heads": 1, "decay": "token", "initial_state": True,
        "value_dim": 3,
    },
    "batch": {"batch": 2, "tokens": 66, "planes": 1, "tables": 40, "heads": 1, "strides": "transposed", "masked": 0.2,
              "value_dim": 40},
    "many-buckets": {"tokens": 33, "planes": 9, "tables": 1, "heads": 1, "beta": 9.0},
}  # fmt: skip


@pytest.fixture
def short_runs(one_run: None, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(plan, "SUB_RUN", 32)
    monkeypatch.setattr(configs, "LONGEST_RUN", 64)
    small = wide_configs.Tiles(
        width=0,
        feature_gradients=(32, 128, 4, 1, 0),
        accumulate=(16, 64, 32, 4, 1, 0),
        accumulate_queries=(32, 128, 16, 4, 1, 0),
        readout=(32, 16, 128, 32, 4, 1, 0),
        value_gradient=(16, 32, 64, 32, 4, 1, 0),
        buckets_gradient=(32, 16, 64, 4, 1, 0),
        query_gradient=(16, 32, 32, 4, 1, 0),
        key_gradient=(32, 16, 64, 4, 1, 0),
        full_readout=(16, 64, 32, 4, 1, 0),
        full_query_gradient=(16, 32, 4, 1, 0),
        full_key_gradient=(32, 64, 4, 1, 0),
    )

    def tiles_of(shape: plan.Shape) -> wide_configs.Tiles:
        return wide_configs.Tiles(**(vars(small) | {"width": -(-shape.buckets // 128) * 128}))

    for module in (wide_segments, launch_wide, launch_full_wide):
        monkeypatch.setattr(module, "tiles_of", tiles_of)
    return monkeypatch


def inputs_of(case: str, dtype: torch.dtype) -> dict[str, Any]:
    options = {"causal": True, "batch": 1, "heads": 2, "dim": 16, "scale": 0.3} | CASES[case]
    return make_inputs(**options, dtype=dtype, device=DEVICE, requires_grad=True, seed=len(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle(case: str, dtype: torch.dtype, short_runs: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(case, dtype)
    right = evaluate(lambda given: oracle(**given, return_state=True), in_double(inputs))
    assert_equal_results(evaluate(whole, inputs, backend="triton"), right, dtype)


@pytest.mark.parametrize("case", ["every-option", "packed"])
def test_segments_change_nothing(case: str, short_runs: pytest.MonkeyPatch) -> None:
    """Neither how many there are, nor a repeat: equal to the bit."""
    inputs = inputs_of(case, FLOAT32)
    one = evaluate(whole, inputs, backend="triton")
    short_runs.setattr(launch_wide, "SCRATCH_BYTES", 1)  # a run a segment
    several = evaluate(whole, inputs, backend="triton")
    for name, value in one.items():
        assert torch.equal(value, several[name]), name


@pytest.mark.parametrize(("planes", "tables"), [(3, 9), (6, 2)])
def test_a_decay_that_forgets_within_a_block(planes: int, tables: int, short_runs: pytest.MonkeyPatch) -> None:
    """Its inverse over the tokens of a block is infinite, and so it would be for what lies past the last token."""
    inputs = make_inputs(
        causal=True, batch=1, tokens=61, heads=1, dim=16, value_dim=2, scale=0.3, planes=planes, tables=tables,
        device=DEVICE, requires_grad=True,
    )  # fmt: skip
    decay = torch.full((1, 61, 1), -0.1, device=DEVICE)
    decay[:, 33:48] = -8.0
    inputs["log_decay"] = decay.requires_grad_()
    right = evaluate(lambda given: oracle(**given, return_state=True), in_double(inputs))
    assert_equal_results(evaluate(whole, inputs, backend="triton"), right, FLOAT32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", [-1.0, -10.0])
@pytest.mark.parametrize(("planes", "tables"), [(6, 2), (3, 20), (4, 8)])
def test_a_decay_that_leaves_hardly_anything(
    planes: int, tables: int, decay: float, dtype: torch.dtype, short_runs: pytest.MonkeyPatch
) -> None:
    """A token's own weight, of which all others are a small part, is not in the gradient of its decay."""
    inputs = make_inputs(
        causal=True, batch=1, tokens=90, heads=1, dim=16, value_dim=40, planes=planes, tables=tables, beta=2.0,
        decay="token", dtype=dtype, device=DEVICE, requires_grad=True, seed=4,
    )  # fmt: skip
    with torch.no_grad():
        inputs["log_decay"].fill_(decay)
    assert_decay_gradient(inputs, dtype)


def test_lengths_as_they_are() -> None:
    """The tiles and lengths of the table, more than one sub-run."""
    inputs = make_inputs(
        causal=True, batch=1, tokens=290, heads=1, dim=16, scale=0.3, planes=6, tables=2, dtype=torch.float16,
        device=DEVICE, requires_grad=True, decay="token", value_dim=6,
    )  # fmt: skip
    right = evaluate(lambda given: oracle(**given, return_state=True), in_double(inputs))
    assert_equal_results(evaluate(whole, inputs, backend="triton"), right, torch.float16)


def test_numbers_are_never_specialised() -> None:
    """No length, count or stride is a part of what is compiled."""
    for module in (wide, wide_gradients, wide_halves, full_wide):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                parameters = inspect.signature(kernel.fn).parameters.values()
                numbers = {x.name for x in parameters if x.annotation == "tl.int64"}
                assert numbers <= set(wide.NEVER_SPECIALIZED), name
