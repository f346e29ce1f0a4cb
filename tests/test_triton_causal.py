"""The causal kernels of one bucket tile, beyond the equivalence table: shapes, runs of several blocks, hard values."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from race_attention.testing import make_inputs, oracle
from tests.helpers import assert_equal_results, evaluate, in_double, whole

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"
)
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
DTYPES = (FLOAT32,) if INTERPRETED else (FLOAT32, torch.float16, BFLOAT16)

#: Planes of a tile padded to 8, 16 and 32; one, some and 64 buckets down; Dv in one half, in two, not a power of two.
SHAPES: dict[str, dict[str, Any]] = {
    "one-plane": {"planes": 1, "tables": 1, "dim": 3, "value_dim": 1},
    "eight-planes": {"planes": 2, "tables": 4, "dim": 20, "value_dim": 33, "decay": "head"},
    "odd-buckets": {"planes": 3, "tables": 3, "dim": 16, "value_dim": 16, "heads": 4, "kv_heads": 2, "decay": "token"},
    "full-tile": {"planes": 4, "tables": 4, "dim": 8, "value_dim": 12, "heads": 2, "kv_heads": 1, "decay": "token"},
    "many-small-tables": {"planes": 1, "tables": 30, "dim": 9, "value_dim": 40, "masked": 0.3},
}


def _check(options: dict[str, Any], dtype: torch.dtype) -> None:
    given = {"causal": True, "batch": 1, "tokens": 70, "heads": 1} | options
    inputs = make_inputs(**given, dtype=dtype, device=DEVICE, requires_grad=True, seed=5)
    right = evaluate(lambda x: oracle(**x, return_state=True), in_double(inputs))
    assert_equal_results(evaluate(whole, inputs, backend="triton"), right, dtype)


@pytest.fixture
def one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs as long as they come: a program goes from block to block even where the input is short."""
    from race_attention.backends.triton import plan

    monkeypatch.setattr(plan, "EXTRA_RUNS", 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("one_run")
def test_shapes_in_runs_of_several_blocks(shape: str, dtype: torch.dtype) -> None:
    _check(SHAPES[shape], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("one_run")
def test_packed_runs_of_several_blocks(dtype: torch.dtype) -> None:
    _check({"lengths": (41, 0, 1, 35), "decay": "token", "initial_state": True, "dim": 6, "planes": 2}, dtype)


@pytest.mark.usefixtures("one_run")
def test_gradients_where_values_have_a_common_part() -> None:
    """What the gradients subtract are then nearly equal numbers."""
    inputs = make_inputs(
        causal=True, batch=1, tokens=70, heads=1, dim=8, decay="token", dtype=FLOAT32, device=DEVICE,
        requires_grad=False, seed=6,
    )  # fmt: skip
    inputs["value"] = inputs["value"] + 30
    inputs = {
        name: x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    right = evaluate(lambda x: oracle(**x, return_state=True), in_double(inputs))
    got = evaluate(whole, inputs, backend="triton")
    for name in ("query", "key", "log_decay"):
        error = (got[f"gradient of {name}"].cpu().double() - right[f"gradient of {name}"]).norm()
        assert error < 30 * 1e-5 * right[f"gradient of {name}"].norm(), name
