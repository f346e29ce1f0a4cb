"""A layout met before: the same results without the host code, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from race_attention import attention, race_attention
from race_attention.backends.triton import direct, replay
from race_attention.testing import make_inputs
from tests.helpers import (
    CASES,
    assert_batched_gradients_are_those_of_each,
    assert_negated_views_are_read,
    evaluate,
    whole,
)
from tests.interpreter import DEVICE, KERNELS_RUN

pytestmark = KERNELS_RUN


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    replay.forget()
    attention._prepared.clear()
    yield
    replay.forget()


@pytest.fixture
def whole_ways(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The passes that were not started at once, by their work; values are not looked at, as on a GPU."""
    seen: list[Any] = []

    def repeated(work: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(work)
        return replay.repeated(work, *arguments, **options)

    monkeypatch.setattr(direct, "repeated", repeated)
    monkeypatch.setattr(attention, "values_wanted", lambda device: False)
    return seen


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


def _step(tensors: Any, causal: bool = True) -> tuple[torch.Tensor, ...]:
    out = race_attention(*tensors, causal=causal, backend="triton")
    return out, *torch.autograd.grad(out.square().sum(), tensors)


def _leaves(seed: int = 0, heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (1, 20, heads, 16), (1, 20, heads, 16), (1, 20, heads, 16), (heads, 2, 2, 16)
    tensors = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    return [x.requires_grad_() for x in (*tensors, torch.full((heads,), 2.0, device=DEVICE))]


def test_what_is_brought_to_one_form_is_started_at_once_too(whole_ways: list[Any]) -> None:
    """A beta that is a number, hyperplanes of one head for all, another scale."""
    results = []
    for _ in range(5):
        query, key, value, planes, _ = _leaves()
        whole_ways.clear()
        out = race_attention(query, key, value, planes[:1], 2.0, causal=True, scale=1.5, backend="triton")
        results.append((out, *torch.autograd.grad(out.square().sum(), (query, key, value))))
    assert not whole_ways
    assert all(torch.equal(x, y) for found in results for x, y in zip(found, results[0], strict=True))
    right = race_attention(query, key, value, planes[:1], 2.0, causal=True, scale=1.5, backend="reference")
    torch.testing.assert_close(results[-1][0], right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_recorded_call_is_started_at_once(causal: bool, whole_ways: list[Any]) -> None:
    """And its backward pass: with other numbers, with and without gradients, and anew once all is forgotten."""
    for _ in range(2):
        for seed in (0, 1, 2):
            _step(_leaves(seed), causal)
        assert whole_ways
        whole_ways.clear()
        for seed in (3, 4):
            found = _step(_leaves(seed), causal)
            assert not whole_ways
            replay_known, replay._known = replay._known, {}
            attention_known = dict(attention._prepared)
            attention._prepared.clear()
            right = _step(_leaves(seed), causal)
            replay._known = replay_known
            attention._prepared.update(attention_known)
            whole_ways.clear()
            assert all(torch.equal(x, y) for x, y in zip(found, right, strict=True))
        with torch.no_grad():
            tensors = _leaves(3)
            results = [race_attention(*tensors, causal=causal, backend="triton") for _ in range(4)]
        assert len(whole_ways) == 2
        assert all(torch.equal(x, results[0]) for x in results)
        replay.forget()
        whole_ways.clear()


def test_what_lies_elsewhere_goes_the_whole_way(whole_ways: list[Any]) -> None:
    """Tensors off multiples of 16 bytes; what was saved, moved before the backward pass. One tensor twice does not."""
    for _ in range(4):
        _step(_leaves())
    whole_ways.clear()
    right = _step(_leaves())
    assert not whole_ways

    tensors = _leaves()
    moved = torch.empty(tensors[0].numel() + 1, device=DEVICE)[1:].view(tensors[0].shape)
    tensors[0] = moved.copy_(tensors[0].detach()).requires_grad_()
    found = _step(tensors)
    assert whole_ways
    assert all(torch.equal(x, y) for x, y in zip(found, right, strict=True))

    whole_ways.clear()
    tensors = _leaves()
    out = race_attention(*tensors, causal=True, backend="triton")
    tensors[3].data = tensors[3].detach().clone()
    grads = torch.autograd.grad(out.square().sum(), tensors)
    assert len(whole_ways) == 1
    assert all(torch.equal(x, y) for x, y in zip(grads, right[1:], strict=True))

    whole_ways.clear()
    one, _, value, planes, beta = _leaves()
    found = race_attention(one, one, value, planes, beta, causal=True, backend="triton")
    assert not whole_ways
    other = one.detach().clone()
    assert torch.equal(found, race_attention(one, other, value, planes, beta, causal=True, backend="triton"))


def test_a_prepared_call_is_still_checked(whole_ways: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Values where they are wanted; other shapes, dtypes and options are other forms."""
    tensors = _leaves()
    for _ in range(4):
        race_attention(*tensors, backend="triton")
    whole_ways.clear()
    race_attention(*tensors, backend="triton")
    assert not whole_ways
    with pytest.raises(ValueError, match="hyperplanes"):
        race_attention(*tensors[:3], tensors[3][:, :, :, :8], tensors[4], backend="triton")
    with pytest.raises(TypeError, match="key"):
        race_attention(tensors[0], tensors[1].half(), *tensors[2:], backend="triton")
    with pytest.raises(ValueError, match="backend"):
        race_attention(*tensors, backend="other")
    monkeypatch.setattr(attention, "values_wanted", lambda device: True)
    monkeypatch.setenv("RACE_ATTENTION_CHECK_VALUES", "1")
    with torch.no_grad():
        tensors[4].fill_(-1.0)
    with pytest.raises(ValueError, match="beta"):
        race_attention(*tensors, backend="triton")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients() -> None:
    assert_batched_gradients_are_those_of_each("triton", device=DEVICE)


@pytest.mark.parametrize("packed", [False, True])
def test_views_marked_as_negated(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "values_wanted", lambda device: False)
    assert_negated_views_are_read("triton", packed=packed, device=DEVICE)
