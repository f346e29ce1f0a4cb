"""``race-attention bench``: a quick look at the speed of one layer's core on this machine."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any

import torch
import typer

from race_attention.attention import BackendWarning, choose_backend, race_attention
from race_attention.backends.call import Call
from race_attention.features import sample_hyperplanes

from .common import Json, console, enough_memory, si, table, write_json
from .info import devices, probe


class Dtype(str, Enum):
    """The dtypes of the option of that name."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


def command(
    tokens: Annotated[int, typer.Option(min=1, help="T, the length of the sequence.")] = 16384,
    batch: Annotated[int, typer.Option(min=1, help="B.")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="H = G.")] = 4,
    head_dim: Annotated[int, typer.Option(min=1, help="D = Dv.")] = 128,
    planes: Annotated[int, typer.Option(min=1, max=10, help="P.")] = 2,
    tables: Annotated[int, typer.Option(min=1, help="L.")] = 2,
    dtype: Annotated[Dtype, typer.Option(help="Of queries, keys and values.")] = Dtype.float32,
    causal: Annotated[bool, typer.Option(help="Causal or not.")] = True,
    backward: Annotated[bool, typer.Option(help="Time forward and backward, or the forward pass alone.")] = True,
    backend: Annotated[str, typer.Option(help="auto, reference, cpu or triton.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; the GPU where there is one.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs, after one that is not counted.")] = 5,
    as_json: Json = False,
) -> None:
    """Times the core of one layer: median, tokens per second, and the ratio to copying the same bytes.

    The copy is of memory on the same device, measured in the same run: the time that reading the inputs and
    writing the outputs once takes at least (forward: query, key, value, out; forward and backward: 11 tensors).
    """
    place = _device(device)
    kind = getattr(torch, dtype.value)
    try:
        served = _served(backend, probe(str(place), kind, dim=head_dim, planes=planes, tables=tables, causal=causal))
        with enough_memory("tokens, batch, heads, head-dim, planes, tables"):
            call = _calls(place, kind, (batch, tokens, heads, head_dim), (planes, tables), causal, served, backward)
            times = measure(call, repeats, place)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from None
    size = batch * tokens * heads * head_dim * kind.itemsize
    floor = (11 if backward else 4) * size / copy_bandwidth(place)
    result = {
        "device": _name(place),
        "backend": served,
        "shape": {"B": batch, "T": tokens, "H": heads, "D": head_dim, "P": planes, "L": tables},
        "dtype": dtype.value,
        "causal": causal,
        "pass": "forward and backward" if backward else "forward",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": repeats,
        "median_s": statistics.median(times),
        "fastest_s": min(times),
        "slowest_s": max(times),
        "tokens_per_s": batch * tokens / statistics.median(times),
        "copy_s": floor,
        "ratio_to_copy": statistics.median(times) / floor,
    }
    if as_json:
        write_json(result)
        return
    _show(result)


def measure(call: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """The seconds that each of ``repeats`` calls takes, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return times[1:]


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes read and written per second by a large copy on the device; the median of several."""
    size = size or (2**30 if device.type == "cuda" else 2**27)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(measure(lambda: target.copy_(source), 7, device))


def _device(name: str | None, option: str = "device") -> torch.device:
    """The device of that name, where torch can use it; the GPU, or else the CPU, if none was named."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's builds without CUDA assert
        raise typer.BadParameter(f"{option}: got {name!r}, which torch cannot use here: {error}") from None
    if device.type == "meta":
        raise typer.BadParameter(f"{option}: got {name!r}, allowed is a device that computes")
    return device


def _served(backend: str, call: Call) -> str:
    """The backend that serves such a call. That auto falls back on the reference is a result here, no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BackendWarning)
        return choose_backend(call, backend)


def _calls(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    buckets: tuple[int, int],
    causal: bool,
    backend: str,
    backward: bool,
) -> Callable[[], object]:
    """The call to be timed, on random inputs."""
    generator = torch.Generator(device).manual_seed(0)
    query, key, value, upstream = (
        torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype) for _ in range(4)
    )
    leaves = [x.requires_grad_(backward) for x in (query, key, value)]
    planes, tables = buckets
    hyperplanes = sample_hyperplanes(1, tables, planes, shape[3], device=device)

    def call() -> object:
        out = race_attention(
            query, key, value, hyperplanes, 4.0, scale=shape[3] ** -0.5, causal=causal, backend=backend
        )
        assert isinstance(out, torch.Tensor)
        return torch.autograd.grad(out, leaves, upstream) if backward else out

    return call


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def _name(device: torch.device) -> str:
    named = devices()
    return named.get(str(device), named.get(f"{device.type}:0", str(device)))


def _show(result: dict[str, Any]) -> None:
    shape = " ".join(f"{letter}={size}" for letter, size in result["shape"].items())
    rows = [
        ("device", result["device"]),
        ("backend", result["backend"]),
        ("shape", shape),
        ("dtype", result["dtype"]),
        ("pass", result["pass"] + (", causal" if result["causal"] else ", not causal")),
        ("median", f"{result['median_s'] * 1e3:.2f} ms of {result['repeats']}"),
        ("range", f"{result['fastest_s'] * 1e3:.2f} to {result['slowest_s'] * 1e3:.2f} ms"),
        ("tokens per second", si(result["tokens_per_s"])),
        ("copy of the same bytes", f"{result['copy_s'] * 1e3:.2f} ms"),
        ("ratio to the copy", f"{result['ratio_to_copy']:.1f}"),
    ]
    console().print(table("One layer's core", ("what", "value"), rows))
