"""The causal kernels of one bucket tile, beyond the equivalence table: shapes, runs of several blocks, hard values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from race_attention import race_attention
from race_attention.testing import assert_within_budget, leaves, make_inputs, oracle
from tests.helpers import assert_equal_results, by_oracle, evaluate, in_double, no_tokens, one_run, whole
from tests.interpreter import DEVICE, INTERPRETED, KERNELS_RUN

pytest.importorskip("triton")

pytestmark = KERNELS_RUN
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
    right = by_oracle(inputs)
    assert_equal_results(evaluate(whole, inputs, backend="triton"), right, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("one_run")
def test_shapes_in_runs_of_several_blocks(shape: str, dtype: torch.dtype) -> None:
    _check(SHAPES[shape], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("one_run")
def test_packed_runs_of_several_blocks(dtype: torch.dtype) -> None:
    _check({"lengths": (41, 0, 1, 35), "decay": "token", "initial_state": True, "dim": 6, "planes": 2}, dtype)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_decay_gradient_where_a_token_sees_hardly_more_than_itself(kv_heads: int) -> None:
    inputs = make_inputs(
        causal=True, batch=1, tokens=40, heads=2, kv_heads=kv_heads, dim=20, beta=1.0, decay="token", dtype=FLOAT32,
        device=DEVICE, seed=3,
    )  # fmt: skip
    inputs["log_decay"] = (inputs["log_decay"] * 0.1 - 9).requires_grad_()

    def of_out(given: Any, backend: str) -> Any:  # the gradient of a final state would be the largest part
        return race_attention(**given, backend=backend), no_tokens(given)

    found = evaluate(of_out, inputs, backend="triton")["gradient of log_decay"]
    right = evaluate(of_out, in_double(inputs), backend="reference")["gradient of log_decay"]
    assert_within_budget(found, right, FLOAT32, "backward")


@pytest.mark.parametrize(("planes", "tables"), [(6, 1), (2, 2), (8, 1)])
def test_saturated_hashes(planes: int, tables: int) -> None:
    """Factors of buckets at either end, which the logarithms of large odds would leave 1e-5 off."""
    inputs = make_inputs(
        causal=True, batch=1, tokens=2, heads=6, dim=4, planes=planes, tables=tables, beta=1e4, dtype=FLOAT32,
        device=DEVICE, seed=3,
    )  # fmt: skip
    inputs["key"] = inputs["key"] * 1e4
    state, right = (
        attention(**inputs, return_state=True)[1] for attention in (partial(race_attention, backend="triton"), oracle)
    )
    for name in ("mass", "value_sum"):
        found, wanted = getattr(state, name), getattr(right, name)
        assert (found - wanted).norm() <= 3e-6 * wanted.norm()


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
    right = by_oracle(inputs)
    got = evaluate(whole, inputs, backend="triton")
    for name in ("query", "key", "log_decay"):
        error = (got[f"gradient of {name}"].cpu().double() - right[f"gradient of {name}"]).norm()
        assert error < 30 * 1e-5 * right[f"gradient of {name}"].norm(), name


@pytest.fixture
def short_chunks(one_run: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of 16 tokens, several to a run."""
    from race_attention.backends.triton import plan

    monkeypatch.setattr(plan, "CHUNKS", dict.fromkeys(plan.CHUNKS, 16))
    plan.forget()
    yield
    monkeypatch.undo()
    plan.forget()


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64, 75])
@pytest.mark.parametrize("decay", [None, "token"])
@pytest.mark.usefixtures("short_chunks")
def test_a_call_without_gradients_equals_one_with_them(tokens: int, decay: str | None) -> None:
    """It keeps nothing for a backward pass; also where chunks and runs end."""
    dtype = torch.float16 if INTERPRETED else BFLOAT16
    inputs = make_inputs(
        causal=True, batch=2, tokens=tokens, heads=2, kv_heads=1, dim=8, decay=decay, masked=0.2, dtype=dtype,
        device=DEVICE, requires_grad=True, seed=8,
    )  # fmt: skip
    out = race_attention(**inputs, backend="triton")
    assert_within_budget(out, oracle(**in_double(inputs)), dtype, "forward")
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(out, race_attention(**inputs, backend="triton"))


#: Buckets, D and Dv that are not what they are padded to, the state in halves of Dv; runs that end within a block.
DESCRIBED: dict[str, dict[str, Any]] = {
    "grouped": {"planes": 3, "tables": 3, "dim": 24, "value_dim": 40, "heads": 4, "kv_heads": 2},
    "halves": {"planes": 4, "tables": 4, "dim": 16, "value_dim": 24, "decay": "token"},
    "one-half": {"planes": 4, "tables": 3, "dim": 8, "value_dim": 8},
    "packed": {"lengths": (41, 0, 1, 28), "dim": 8, "decay": "head"},
    "transposed": {"dim": 8, "heads": 2, "batch": 2, "strides": "transposed", "initial_state": True},
}


@pytest.mark.parametrize("shape", DESCRIBED)
@pytest.mark.usefixtures("one_run")
def test_rows_by_descriptor_and_by_address(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from race_attention.backends.triton import launch, start

    if not start.describes(torch.empty(0, device=DEVICE).device):
        pytest.skip("this device knows no descriptors")
    dtype = torch.float16 if INTERPRETED else BFLOAT16
    given = {"causal": True, "batch": 1, "tokens": 70, "heads": 1} | DESCRIBED[shape]
    inputs = make_inputs(**given, dtype=dtype, device=DEVICE, seed=9)
    seen: list[bool] = []
    asked = launch.Problem.described.fget
    assert asked is not None
    monkeypatch.setattr(launch.Problem, "described", property(lambda p: seen.append(asked(p)) or asked(p)))
    out = race_attention(**inputs, backend="triton")
    assert seen
    assert all(seen)
    assert_within_budget(out, oracle(**in_double(inputs)), dtype, "forward")
    monkeypatch.setattr(launch.Problem, "described", property(lambda p: False))
    assert_within_budget(race_attention(**inputs, backend="triton"), out.double(), dtype, "forward")


def _near(actual: torch.Tensor, right: torch.Tensor) -> None:
    """Within the forward budget of float32 inputs in the interpreter, of bfloat16 on a GPU, where sums are rounded."""
    assert float((actual - right).norm()) <= (1e-5 if INTERPRETED else 4e-3) * float(right.norm())


@pytest.mark.parametrize("lengths", [None, (41, 0, 1, 33)], ids=["rows", "packed"])
@pytest.mark.parametrize("decay", [None, "token"])
@pytest.mark.usefixtures("short_chunks")
def test_sums_before_chunks(lengths: tuple[int, ...] | None, decay: str | None) -> None:
    """What the keys' pass leaves at each chunk's place, added up again token by token."""
    from race_attention.backends.triton import passes, plan
    from race_attention.backends.triton.ops import shape_of

    rows = 2 if lengths is None else 1
    inputs = make_inputs(
        causal=True, batch=rows, tokens=75, heads=2, dim=8, planes=2, tables=2, decay=decay, lengths=lengths,
        dtype=torch.float16, device=DEVICE, requires_grad=False, seed=3,
    )  # fmt: skip
    bounds = inputs.get("cu_seqlens")
    fixed = (inputs["query"], inputs["key"], inputs["value"], inputs["hyperplanes"], inputs["beta"])
    results = passes.forward(*fixed, inputs.get("log_decay"), None, bounds, bounds, None, None, True)
    features, inner, marks, fades = results[5:]
    shape = shape_of(inputs["query"], inputs["value"], inputs["hyperplanes"])
    length = plan.runs_of(rows, 75, 2, *plan.run_lengths(shape, True), bounds).length
    assert length > shape.chunk
    phi = features.flatten()[: rows * 2 * 75 * shape.row].view(rows, 2, 75, shape.row).double()
    ends = [0, 75] if bounds is None else bounds.tolist()
    log_decay = inputs.get("log_decay")
    for batch in range(rows):
        for row, (start, end) in enumerate(itertools.pairwise(ends)):
            for first in range(start, end, length):
                state = torch.zeros(2, shape.row, 9, dtype=torch.float64, device=DEVICE)  # value sums, then masses
                faded, so_far = (torch.zeros(2, dtype=torch.float64, device=DEVICE) for _ in range(2))
                for t in range(first, min(first + length, end)):
                    if (t - first) % 16 == 0:
                        place = batch * 5 + t // 16 if bounds is None else row + t // 16
                        mass, mean = marks[place, :, : shape.row].double(), marks[place, :, shape.row + 8 :].double()
                        of_mean = mass[:, :, None] * mean[:, None, : shape.value_dim]
                        _near(inner[place].double().mT + of_mean, state[..., :8])
                        _near(mass, state[..., 8])
                        torch.testing.assert_close(marks[place, :, shape.row].double(), so_far, rtol=1e-5, atol=1e-5)
                        faded.zero_()
                    if log_decay is not None:
                        here = log_decay[batch, t].double()
                        faded, so_far, state = faded + here, so_far + here, state * here.exp()[:, None, None]
                        torch.testing.assert_close(fades[batch, :, t].double(), faded, rtol=1e-5, atol=1e-5)
                    row_of_v = torch.cat((inputs["value"][batch, t].double(), torch.ones_like(so_far)[:, None]), 1)
                    state = state + phi[batch, :, t, :, None] * row_of_v[:, None]


@pytest.mark.parametrize(("planes", "tables"), [(4, 1), (4, 4), (8, 1)])
def test_a_state_that_decays_to_nothing_at_leisure(planes: int, tables: int) -> None:
    """Masked tokens see what is left of it, less and less: many of them hardly anything, whose inverse is large."""
    inputs = make_inputs(
        causal=True, batch=1, tokens=1100, heads=2, kv_heads=1, dim=16, planes=planes, tables=tables, scale=0.25,
        masked=1.1, initial_state=True, decay="head", dtype=torch.float16, device=DEVICE, requires_grad=True,
    )  # fmt: skip
    with torch.no_grad():
        inputs["log_decay"].fill_(-0.1)
    with one_run():
        out = race_attention(**inputs, backend="triton")
        along = 300 * torch.randn(out.shape[2:], generator=torch.Generator().manual_seed(1)).to(out)
        gradients = torch.autograd.grad((out.double() * along).sum(), list(leaves(inputs).values()))
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in gradients)
