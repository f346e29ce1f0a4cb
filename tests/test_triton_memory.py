"""GPU kernels touch only the tensors of a call, no two programs the same element, and use nothing that nobody wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from benchmarks import gpu_sanitize
from tests.interpreter import INTERPRETED

pytest.importorskip("triton")

import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")

#: The sanitizers' cases; those that take long in the interpreter with fewer heads and tokens, still of several runs.
SHORTER: dict[str, dict[str, Any]] = {
    "causal-64-long-run": {"heads": 1, "tokens": 270},
    "causal-64-joined-decay": {"heads": 1},
    "causal-64-joined-options": {"heads": 2, "kv_heads": 1, "lengths": (36, 0, 1, 3, 34)},
    "causal-128-joined": {"heads": 1, "lengths": (36, 0, 1, 3, 34)},
    "full-short-and-long": {"heads": 1},
    "causal-64-128": {"heads": 1, "tokens": 40},
    "causal-64-128-decay": {"heads": 1, "tokens": 40},
    "full-128": {"heads": 1, "tokens": 40, "keys": 30},
    "causal-wide": {"heads": 1, "tokens": 150},
    "causal-wide-columns": {"tokens": 70},
    "causal-wide-256": {"tokens": 150},
    "causal-large-heads": {"tokens": 70},
    "full-large-heads": {"tokens": 40, "keys": 30},
    "causal-wide-large-heads": {"tokens": 40},
    "causal-tables-large-heads": {"tokens": 40},
    "causal-wide-options": {"heads": 2, "kv_heads": 1, "lengths": (70, 0, 1, 66)},
}


@contextmanager
def filled(fill: bool) -> Iterator[None]:
    """New tensors begin as NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(fill, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("case", gpu_sanitize.CASES)
def test_kernels_touch_what_is_theirs(case: str) -> None:
    from tests.watched import watched

    given = gpu_sanitize.CASES[case] | SHORTER.get(case, {})
    with watched() as watch, filled(True):
        results = gpu_sanitize.forward_and_backward(given, torch.float32, "cpu", 1)
    assert not watch.found, sorted(watch.found)
    assert watch.kernels
    for name, result in results.items():
        assert not result.isnan().any(), f"{name} depends on memory that nobody wrote"


def test_decoding_touches_what_is_its() -> None:
    from tests.watched import watched

    with watched() as watch, filled(True):
        gpu_sanitize.run_decode(torch.float32, "cpu")
    assert not watch.found, sorted(watch.found)
    assert watch.kernels


@triton.jit
def _shifted_kernel(x, y, count, shift, BARRIER: tl.constexpr):
    """Each program writes four elements of y, and reads four others of it if ``shift`` says so."""
    at = 4 * tl.program_id(0) + tl.arange(0, 4)
    tl.store(y + at, tl.load(x + at, mask=at < count, other=0.0), mask=at < count)
    if BARRIER:
        tl.debug_barrier()
    back = at + shift
    tl.store(x + at, tl.load(y + back, mask=back < count, other=0.0), mask=at < count)


@triton.jit
def _same_kernel(x):
    tl.store(x, tl.program_id(0).to(tl.float32))


def test_the_watch_sees_each_kind_of_mistake() -> None:
    from tests.watched import watched

    def found(kernel: Any, programs: int, *args: Any) -> str:
        with watched() as watch:
            kernel[(programs,)](*args)
        return " ".join(watch.found)

    x, y = torch.zeros(8), torch.zeros(8)
    short = torch.frombuffer(bytearray(64), dtype=torch.float32, count=6)  # what comes after it is ours too
    assert short.untyped_storage().nbytes() == 24
    assert not found(_shifted_kernel, 2, x, y, 8, 0, True)
    assert "without a barrier" in found(_shifted_kernel, 2, x, y, 8, 0, False)
    assert "another one writes" in found(_shifted_kernel, 2, x, y, 8, 4, True)
    assert "writes outside" in found(_shifted_kernel, 2, x, short, 8, 0, True)
    assert "reads outside" in found(_shifted_kernel, 2, short, y, 8, 0, True)
    assert "two programs" in found(_same_kernel, 2, x)
