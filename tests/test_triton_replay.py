"""A layout met before: the same results without the host code, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from race_attention import race_attention
from race_attention.backends.triton import replay
from race_attention.testing import make_inputs
from tests.helpers import CASES, evaluate, whole

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"
)


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    replay.forget()
    yield
    replay.forget()


def _replays() -> list[Any]:
    return [found for found in replay._known.values() if isinstance(found, replay.Replay)]


@pytest.mark.parametrize("case", ["causal-packed-all", "causal-decay-token", "full-packed-cross", "full-state"])
def test_a_layout_met_before_gives_the_same(case: str) -> None:
    """The first time as it is, the second recorded, from then on replayed: with other numbers, equal to the bit."""
    inputs = [
        make_inputs(**CASES[case], dtype=torch.float32, device=DEVICE, requires_grad=True, seed=seed) for seed in (1, 2)
    ]
    right = []
    for given in inputs:
        replay.forget()
        right.append(evaluate(whole, given, backend="triton"))
    for turn in (0, 1, 0, 1):
        found = evaluate(whole, inputs[turn], backend="triton")
        for name, value in right[turn].items():
            assert torch.equal(found[name], value), name
    assert len(_replays()) == 3  # forward; backward of what it kept apart, and in one piece


def _qkv(tokens: int = 20) -> torch.Tensor:
    return torch.randn(1, tokens, 3, 2, 16, device=DEVICE)


def _call(query: Any, key: Any, value: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    planes = torch.randn(2, 2, 2, 16, generator=generator).to(DEVICE)
    return race_attention(query, key, value, planes, 2.0, backend="triton")


def test_inputs_of_one_tensor_and_of_several() -> None:
    """Recorded with query, key and value cut from one tensor, replayed with tensors of the same layout elsewhere."""
    first = _qkv().unbind(2)
    for _ in range(3):
        _call(*first)
    apart = [_qkv().unbind(2)[n] for n in range(3)]
    found, known = _call(*apart), len(replay._known)
    replay.forget()
    assert torch.equal(found, _call(*apart))
    assert known == 1


def test_one_tensor_twice_is_a_layout_of_its_own() -> None:
    one, other, value = (torch.randn(1, 20, 2, 16, device=DEVICE) for _ in range(3))
    right = _call(one, other, value)
    replay.forget()
    for _ in range(3):
        _call(one, one, value)
    assert torch.equal(_call(one, other, value), right)


def test_too_much_memory_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_limit", lambda device: 1000)
    tensors = _qkv().unbind(2)
    results = [_call(*tensors) for _ in range(4)]
    assert all(torch.equal(x, results[0]) for x in results)
    assert not _replays()


def test_unwatched_calls_alone_go_around_the_operators() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    tensors = _qkv().unbind(2)
    right = _call(*tensors)
    with Watching():
        found = _call(*tensors)
    assert any("race_attention.triton_forward" in name for name in seen)
    assert torch.equal(found, right)


def test_gradients_of_some_inputs_and_of_the_state() -> None:
    """Replayed with and without what a backward pass needs; a state's gradient alone."""
    query, key, value = (x.clone() for x in _qkv().unbind(2))
    key.requires_grad_()
    planes = torch.randn(2, 2, 2, 16, device=DEVICE, requires_grad=True)
    results = []
    for _ in range(4):
        out, state = race_attention(query, key, value, planes, 2.0, causal=True, return_state=True, backend="triton")
        results.append(torch.autograd.grad(state.value_sum.sum(), (key, planes)))
        with torch.no_grad():
            assert torch.equal(race_attention(query, key, value, planes, 2.0, causal=True, backend="triton"), out)
    for found in results:
        assert all(torch.equal(x, y) for x, y in zip(found, results[0], strict=True))


def test_memory_for_descriptors_is_allocated_with_the_scratch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from race_attention.backends.triton.recording import Recorder
    from race_attention.backends.triton.replay import Replay

    monkeypatch.setattr(replay.batch, "driver", lambda: None)  # launches stay apart
    x = torch.zeros(4)
    recorder = Recorder([x], 1 << 20)
    with recorder:
        scratch, memory, out = torch.empty(3), torch.empty(1024, dtype=torch.uint8), torch.empty(4)
        compiled = SimpleNamespace(metadata=SimpleNamespace(global_scratch_size=512))
        recorder.launched(None, (2,), (x, scratch, out), {}, (compiled, ()), memory)
    found = Replay(recorder, 1, [recorder.place(out)], None)
    (step,) = found.steps
    assert step.memory is not None
    assert step.memory.buffer == step.tensors[1][1].buffer == 1
    assert {step.memory.offset, step.tensors[1][1].offset} == {0, 512}
    assert found.allocations[0][0] == (512 + 1024,)
