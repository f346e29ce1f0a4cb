"""Two GPUs in one process: results and gradients on the second are those of the first, to the bit."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from race_attention import RaceAttention, race_attention, sample_hyperplanes
from race_attention.backends.triton import replay
from race_attention.testing import make_inputs
from tests.helpers import evaluate, whole

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
FIRST, SECOND = DEVICES = "cuda:0", "cuda:1"
_HEADS: dict[str, Any] = {"heads": 2, "dim": 32, "scale": 0.2}
#: A call that is not causal, one with rows by descriptors, one with every other option, and one of several tiles.
CASES: dict[str, dict[str, Any]] = {
    "full": {"batch": 2, "tokens": 200, "keys": 150, **_HEADS},
    "causal": {"causal": True, "batch": 1, "tokens": 300, **_HEADS},
    "packed": {"causal": True, "lengths": (150, 0, 1, 140), **_HEADS, "decay": "token", "masked": 0.2},
    "wide": {"causal": True, "batch": 1, "tokens": 270, **_HEADS, "planes": 6, "decay": "head"},
}
Results = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    replay.forget()
    yield
    assert torch.cuda.current_device() == 0
    replay.forget()


def _inputs(case: str, device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    return make_inputs(**CASES[case], dtype=dtype, device=device, requires_grad=True, seed=3)


def _evaluated(inputs: dict[str, Any]) -> Results:
    return {name: x.cpu() for name, x in evaluate(whole, inputs, backend="triton").items()}


def _assert_equal(found: Results, right: Results) -> None:
    for name, x in right.items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("case", CASES)
def test_devices_in_turns(case: str) -> None:
    """As it is, recorded, replayed, on one device between the calls on the other."""
    inputs = [_inputs(case, device) for device in DEVICES]
    right = _evaluated(inputs[0])
    assert all(x.isfinite().all() for x in right.values())
    for _ in range(5):
        for given in inputs:
            _assert_equal(_evaluated(given), right)


def test_the_second_device_alone_is_enough() -> None:
    """All layouts are met there first; the current device stays the first one, or is the second."""
    inputs = _inputs("causal", SECOND)
    found = [_evaluated(inputs) for _ in range(4)]
    with torch.cuda.device(1):
        found += [_evaluated(inputs) for _ in range(2)]
        assert torch.cuda.current_device() == 1
    right = _evaluated(_inputs("causal", FIRST))
    for results in found:
        _assert_equal(results, right)


def test_threads() -> None:
    """Four threads, two of them on both devices in turns, meet the same layouts at the same time."""
    right = _evaluated(_inputs("causal", FIRST))
    found: list[Results] = []
    errors: list[BaseException] = []

    def work(devices: tuple[str, ...]) -> None:
        try:
            inputs = [_inputs("causal", device) for device in devices]
            found.extend(_evaluated(inputs[n % len(inputs)]) for n in range(12))
        except BaseException as error:
            errors.append(error)

    places = ((FIRST,), (SECOND,), DEVICES, DEVICES[::-1])
    threads = [threading.Thread(target=work, args=(devices,)) for devices in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert len(found) == 48
    for results in found:
        _assert_equal(results, right)


def _decoding(device: str) -> Callable[[], Results]:
    from race_attention.backends.triton.decode import decode_

    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, heads, 32, generator=generator).to(device) for heads in (4, 2, 2))
    planes = sample_hyperplanes(2, 4, 4, 32, device=device)
    beta = torch.full((2,), 3.0, device=device)
    mass = torch.rand(2, 2, 4, 16, generator=generator, dtype=torch.float64).to(device)
    value_sum = torch.randn(*mass.shape, 32, generator=generator, dtype=torch.float64).to(device)

    def token() -> Results:
        out = decode_(query, key, value, planes, beta, None, mass, value_sum)
        return {"out": out.cpu(), "mass": mass.cpu(), "value_sum": value_sum.cpu()}

    return token


def test_decoding_in_place() -> None:
    """A state a device, both changed in place by one token after the other."""
    first, second = map(_decoding, DEVICES)
    for _ in range(3):
        _assert_equal(second(), first())


def _layer(device: str) -> RaceAttention:
    torch.manual_seed(0)
    return RaceAttention(64, 2, causal=True, conv_size=3, decay="per_token", norm_gate=True).to(device)


def test_steps_of_a_layer() -> None:
    """A prompt, then tokens through the decode kernel with a state of their own."""
    layers = [_layer(device) for device in DEVICES]
    x = torch.randn(2, 40, 64)
    with torch.no_grad():
        outs = []
        for layer, device in zip(layers, DEVICES, strict=True):
            out, state = layer(x[:, :36].to(device), return_state=True)
            outs.append([out.cpu()])
            for t in range(36, 40):
                out, state = layer.step(x[:, t].to(device), state)
                outs[-1].append(out[:, None].cpu())
    first, second = (torch.cat(parts, 1) for parts in outs)
    assert torch.equal(first, second)


def test_a_model_over_both_devices() -> None:
    """One layer on each, one backward pass through both; its gradients are those of both on the first."""
    torch.manual_seed(0)
    layers = _layer(FIRST), _layer(FIRST)
    apart = copy.deepcopy(layers[0]), copy.deepcopy(layers[1]).to(SECOND)
    x = torch.randn(1, 130, 64, device=FIRST)
    for _ in range(4):
        outs = layers[1](layers[0](x)), apart[1](apart[0](x).to(SECOND))
        assert torch.equal(outs[0].cpu(), outs[1].cpu())
        gradients = []
        for model, out in zip((layers, apart), outs, strict=True):
            wanted = [parameter for layer in model for parameter in layer.parameters()]
            gradients.append(torch.autograd.grad(out.square().sum(), wanted))
        for one, other in zip(*gradients, strict=True):
            assert torch.equal(one.cpu(), other.cpu())


def test_captured_graphs() -> None:
    """A graph of forward and backward on each device, replayed in turns beside calls that are not captured."""
    right = _evaluated(_inputs("causal", FIRST))
    graphs, results, read = [], [], []
    for device in DEVICES:
        inputs = _inputs("causal", device)
        generator = torch.Generator().manual_seed(2)
        grad = torch.randn(inputs["value"].shape, generator=generator).bfloat16().to(device)
        read.append((inputs, grad))  # by the graph, at each replay: their memory is not to be given to others

        def step(inputs: dict[str, Any] = inputs, grad: torch.Tensor = grad) -> tuple[torch.Tensor, ...]:
            out = race_attention(**inputs, backend="triton")
            return out, *torch.autograd.grad(out, [inputs[name] for name in ("query", "key", "value")], grad)

        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):  # without one it takes a stream of the first device for all
                captured = step()
        for x in captured:
            x.detach().zero_()
        graphs.append(graph)
        results.append(captured)
    for _ in range(3):
        for graph, device in zip(graphs, DEVICES, strict=True):
            with torch.cuda.device(device):
                graph.replay()
            _assert_equal(_evaluated(_inputs("causal", device)), right)
    for device in DEVICES:
        torch.cuda.synchronize(device)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.cpu(), second.cpu())
        assert first.abs().sum() > 0
    assert torch.equal(results[1][0].cpu(), right["out"])
