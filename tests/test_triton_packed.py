"""Packed sequences joined end to end on the GPU: each equals itself alone, however uneven they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from race_attention import race_attention
from race_attention.testing import make_inputs
from tests.helpers import assert_equal_results, by_oracle, evaluate, no_tokens, one_run
from tests.interpreter import DEVICE, INTERPRETED, KERNELS_RUN

pytest.importorskip("triton")

pytestmark = KERNELS_RUN
FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = (FLOAT16, FLOAT32) if INTERPRETED else (FLOAT16, BFLOAT16, FLOAT32)

#: One long one beside many short ones, empty ones among them; ends at, before and after those of blocks, chunks, runs.
LENGTHS: dict[str, tuple[int, ...]] = {
    "short": (1, 0, 3, 2, 0, 5, 1, 1, 4, 7, 9, 2, 30, 0),
    "one-long": (3, 1, 0, 90, *[2] * 9, 1, 17),
    "edges": (63, 1, 64, 0, 15, 16, 17),
    "one-token-each": (*[1] * 20, 5, *[1] * 17),
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"decay": "token", "masked": 0.2},
    "at-once": {"planes": 4, "tables": 4, "masked": 0.2},
    "groups": {"planes": 3, "tables": 3, "heads": 4, "kv_heads": 2},
    "all": {"planes": 4, "tables": 4, "heads": 4, "kv_heads": 2, "decay": "head", "value_dim": 9, "masked": 0.2},
}


CUTS = ("short runs", "one run", "short chunks", "short blocks")
#: Each shape with each lengths, and each way to cut with each of both; on a GPU all with all.
ALL = [(lengths, shape, how) for lengths in LENGTHS for shape in SHAPES for how in CUTS]
CASES = [
    (*case, dtype)
    for case in ALL
    for n, dtype in enumerate(DTYPES)
    if not INTERPRETED or (list(LENGTHS).index(case[0]) + list(SHAPES).index(case[1]) + n) % 4 == CUTS.index(case[2])
]


@pytest.fixture
def cut(how: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of a block or of several, runs of a chunk or of all."""
    from race_attention.backends.triton import configs, plan, replay

    if how == "short chunks":
        monkeypatch.setattr(plan, "CHUNKS", dict.fromkeys(plan.CHUNKS, 16))
    if how == "short blocks":
        for dtype, buckets in itertools.product((FLOAT16, BFLOAT16), plan.CHUNKS):
            name = configs.key("causal_key_gradient", 16, 16, buckets, dtype)
            monkeypatch.setitem(configs._trial, name, configs.Config(16, 4, 1))
    plan.forget()
    replay.forget()
    with one_run() if how == "one run" else nullcontext():
        yield
    monkeypatch.undo()
    plan.forget()
    replay.forget()


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """That the calls went this way."""
    from race_attention.backends.triton import launch_short, runs

    seen: list[int] = []
    ages, spans = runs.ages_of, launch_short.spans_of
    monkeypatch.setattr(runs, "ages_of", lambda *x: seen.append(1) or ages(*x))
    monkeypatch.setattr(launch_short, "spans_of", lambda *x: seen.append(1) or spans(*x))
    yield
    assert seen


def _inputs(lengths: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    given: dict[str, Any] = {"causal": True, "heads": 1, "dim": 6, "planes": 2, "tables": 2} | options
    return make_inputs(batch=1, lengths=lengths, dtype=dtype, device=DEVICE, requires_grad=True, seed=6, **given)


def _results(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    return evaluate(lambda x, **how: (race_attention(**x, **how), no_tokens(x)), inputs, backend="triton")


@pytest.mark.parametrize(("lengths", "shape", "how", "dtype"), CASES)
@pytest.mark.usefixtures("cut")
def test_equals_the_oracle(lengths: str, shape: str, how: str, dtype: torch.dtype) -> None:
    inputs = _inputs(LENGTHS[lengths], SHAPES[shape], dtype)
    right = by_oracle(inputs, lambda results, x: (results[0], no_tokens(x)))
    assert_equal_results(_results(inputs), right, dtype)


FULL: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"planes": 4, "tables": 4, "heads": 4, "kv_heads": 2, "masked": 0.2},
    "cross": {"planes": 3, "tables": 3, "key_lengths": (2, 1, 0, 9, 10, 2, 0, 5, 40, 60, 3, 4)},
}


#: In the interpreter, where dtypes differ in their loads alone: each shape and each ``short`` with both of them.
FULL_CASES = [
    (shape, short, dtype)
    for i, shape in enumerate(FULL)
    for j, short in enumerate((1, 20, 512))
    for n, dtype in enumerate(DTYPES)
    if not INTERPRETED or (i + j + n) % 2 == 0
]


@pytest.mark.parametrize(("shape", "short", "dtype"), FULL_CASES)
def test_short_and_long_where_all_is_seen(
    shape: str, short: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them long (of more than a token), some, none."""
    from race_attention.backends.triton import launch_short, plan, replay

    if short == 20:  # the longer blocks
        monkeypatch.setattr(launch_short, "VERY_SHORT", (0, 4, 1))
    monkeypatch.setattr(plan, "SHORT", short)
    monkeypatch.setattr(plan, "SHORT_PROGRAMS", 5)
    replay.forget()
    inputs = _inputs((3, 0, 1, 9, 70, 2, 0, 5, 13, 1, 1, 4), FULL[shape] | {"causal": False}, dtype)
    right = by_oracle(inputs, lambda results, x: (results[0], no_tokens(x)))
    assert_equal_results(_results(inputs), right, dtype)
    replay.forget()


@pytest.mark.parametrize("causal", [True, False])
def test_no_tokens_and_no_sequences(causal: bool) -> None:
    for lengths in ((0, 0), ()):
        inputs = _inputs(lengths, {"causal": causal}, DTYPES[0])
        for _ in range(3):
            assert all(not x.any() for x in _results(inputs).values())


@pytest.mark.parametrize("causal", [True, False])
def test_repeats_and_a_call_without_gradients_are_equal_to_the_bit(causal: bool) -> None:
    inputs = _inputs(LENGTHS["one-long"], {"causal": causal, "planes": 3, "tables": 3}, DTYPES[0])
    first = _results(inputs)
    for _ in range(3):
        again = _results(inputs)
        assert all(torch.equal(x, again[name]) for name, x in first.items())
        with torch.no_grad():
            assert torch.equal(race_attention(**inputs, backend="triton"), first["out"])


def test_neighbours_do_not_meet() -> None:
    """A sequence's output is the same to the bit whatever the values of the sequences before and behind it are."""
    inputs = _inputs((5, 9, 7), {}, DTYPES[0])
    out = race_attention(**inputs, backend="triton")
    with torch.no_grad():
        for name in ("query", "key", "value"):
            inputs[name][:, :5] *= 100
            inputs[name][:, 14:] = 1000
    assert torch.equal(race_attention(**inputs, backend="triton")[:, 5:14], out[:, 5:14])


def test_compiled() -> None:
    dtype = DTYPES[0]
    inputs = _inputs(LENGTHS["short"], {"decay": "token"}, dtype)
    right = by_oracle(inputs, lambda results, x: (results[0], no_tokens(x)))
    compiled = torch.compile(lambda x: race_attention(**x, backend="triton"), fullgraph=True, backend="aot_eager")
    results = evaluate(lambda x: (compiled(x), no_tokens(x)), inputs)
    assert_equal_results(results, right, dtype)
