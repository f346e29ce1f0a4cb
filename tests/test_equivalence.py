"""whole = chunked = segment by segment = token by token = packed = padded = split over ranks = the oracle.

Forward (output, final state) and backward (every input, the state in, the state out), for every backend.
"""

from __future__ import annotations

import itertools

import pytest

from tests.helpers import (
    CASES,
    LONG_CASES,
    Backend,
    backend_params,
    by_ranks,
    by_segments,
    by_sequences,
    check,
    skip_unless_runnable,
    whole,
    with_padding,
)

PACKED = [name for name, options in CASES.items() if "lengths" in options]
NOT_PACKED = [name for name in CASES if name not in PACKED]
CAUSAL = [name for name in NOT_PACKED if CASES[name].get("causal")]
EVERYWHERE = pytest.mark.parametrize(("backend", "dtype"), backend_params())


@EVERYWHERE
@pytest.mark.parametrize("case", [*CASES, *LONG_CASES])
def test_whole(backend, dtype, case):
    check(backend, dtype, case, whole)


@pytest.mark.parametrize(("backend", "dtype"), backend_params(chunked=True))
@pytest.mark.parametrize(
    ("case", "size"),
    [*itertools.product(CASES, (1, 2, 5, 16)), *itertools.product(("causal-decay-long", "full-packed-long"), (3, 37))],
)
def test_chunk_sizes(backend: Backend, dtype, case, size, monkeypatch):
    skip_unless_runnable(backend)
    assert backend.set_chunk is not None
    backend.set_chunk(monkeypatch, size)
    check(backend, dtype, case, whole)


@EVERYWHERE
@pytest.mark.parametrize("case", [*CAUSAL, "causal-decay-long"])
@pytest.mark.parametrize("sizes", [(1,), (4,), (1, 6, 3)], ids=str)
def test_segments(backend, dtype, case, sizes):
    if case in LONG_CASES:
        sizes = tuple(29 * size for size in sizes)
    check(backend, dtype, case, by_segments, sizes=sizes)


@EVERYWHERE
@pytest.mark.parametrize("case", PACKED)
def test_packed(backend, dtype, case):
    check(backend, dtype, case, by_sequences)


@EVERYWHERE
@pytest.mark.parametrize("case", NOT_PACKED)
def test_padded(backend, dtype, case):
    check(backend, dtype, case, with_padding)


@EVERYWHERE
@pytest.mark.parametrize("case", NOT_PACKED)
@pytest.mark.parametrize("sizes", [(1,), (5,), (2, 7)], ids=str)
def test_ranks(backend, dtype, case, sizes):
    check(backend, dtype, case, by_ranks, sizes=sizes)
