"""The checker of random cases: a few of them on the CPU, and that it finds what is wrong."""

from __future__ import annotations

import pytest

from benchmarks.fuzz import SERVED, checked
from race_attention.backends import reference
from tests.helpers import BACKENDS, skip_unless_runnable

ON_THE_CPU = [backend for backend in BACKENDS if backend.device == "cpu"]


def look(backend: str, first: int, cases: int) -> list[dict]:
    return [checked(seed, backend, "cpu", SERVED[backend], True, 1) for seed in range(first, first + cases)]


@pytest.mark.parametrize("backend", ON_THE_CPU, ids=lambda backend: backend.name)
@pytest.mark.parametrize("first", [0, 10, 20])
def test_random_cases(backend, first):
    skip_unless_runnable(backend)
    rows = look(backend.name, first, 10)
    assert not [row for row in rows if row["result"] in ("out", "error")]
    assert sum(row["result"] == "within" for row in rows) >= 7


@pytest.mark.parametrize("wrong", ["a little", "a dtype", "an exception"])
def test_what_is_wrong_is_found(wrong, monkeypatch):
    run = reference.run

    def wrongly(call):
        out, mass, value_sum = run(call)
        if wrong == "an exception":
            raise RuntimeError("of a kernel")
        return {"a little": out * 1.02, "a dtype": out.double()}[wrong], mass, value_sum

    monkeypatch.setattr(reference, "run", wrongly)
    rows = look("reference", 0, 12)
    assert sum(row["result"] in ("out", "error") for row in rows) >= 6
