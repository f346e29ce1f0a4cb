"""``race-attention stream``: one layer's core over a stream of any length, in constant memory."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from race_attention.arguments import number
from race_attention.features import sample_hyperplanes
from race_attention.forms import MAX_BETA
from race_attention.streaming.generated import GeneratedStream
from race_attention.streaming.measured import checksums, keep_freed_memory, measure, peak_memory

from .bench import Dtype, _device, _name, _served
from .common import Json, console, enough_memory, si, table, write_json
from .info import probe

_MOST = 10**12  # a list of segments has to be possible
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def number_of_tokens(text: str | int) -> int:
    """75M -> 75000000; also 65536, 1.5k, 1G, 1B, 2e6."""
    lower = str(text).strip().lower().replace("_", "").replace(",", "")
    unit = lower[-1:] if lower[-1:] in "kmgb" else ""
    try:
        given = float(lower[: len(lower) - len(unit)]) * _UNITS[unit]
        tokens = round(given)
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"got {text!r}, allowed is a number with k, M, G or B behind it, or without") from None
    if not 1 <= tokens <= _MOST or tokens != given:
        raise typer.BadParameter(f"got {text!r}, allowed is a whole number of tokens, 1 to {_MOST:g}")
    return tokens


def command(
    tokens: Annotated[int, typer.Option(parser=number_of_tokens, metavar="N", help="T: 75M, 1B, 65536.")] = 1_000_000,
    segment: Annotated[int, typer.Option(parser=number_of_tokens, metavar="N", help="Tokens in memory.")] = 8192,
    heads: Annotated[int, typer.Option(min=1, help="H = G.")] = 4,
    dim: Annotated[int, typer.Option(min=1, help="D = Dv, of a head.")] = 128,
    planes: Annotated[int, typer.Option(min=1, max=10, help="P.")] = 2,
    tables: Annotated[int, typer.Option(min=1, help="L.")] = 2,
    beta: Annotated[float, typer.Option(help="Sharpness of the buckets, in (0, 1e4].")] = 2.0,
    dtype: Annotated[Dtype, typer.Option(help="Of queries, keys and values.")] = Dtype.float32,
    causal: Annotated[bool, typer.Option(help="Causal or not.")] = True,
    decay: Annotated[bool, typer.Option(help="A log_decay for each token (causal only).")] = False,
    backward: Annotated[bool, typer.Option(help="Forward and backward, or the forward pass alone.")] = True,
    keep_every: Annotated[int, typer.Option(min=1, help="Keeps the state before every n-th segment only.")] = 1,
    keep_on: Annotated[str | None, typer.Option(help="Where kept states wait, for example cpu.")] = None,
    backend: Annotated[str, typer.Option(help="auto, reference, cpu or triton.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; the GPU where there is one.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**15, help="Of the data.")] = 0,
    journal: Annotated[
        Path | None, typer.Option(help="A folder: a run that was killed continues when started again with it.")
    ] = None,
    journal_every: Annotated[int, typer.Option(min=1, help="Segments between entries.")] = 16,
    progress: Annotated[bool | None, typer.Option(help="A bar; default on terminals.")] = None,
    as_json: Json = False,
) -> None:
    """Streams generated data through one layer's core: peak memory, tokens per second, checksums of all results.

    The data come from their positions alone, so that checksums do not depend on the size of a segment beyond
    rounding.
    """
    place = _device(device)
    if keep_on is not None:
        _device(keep_on, "keep-on")
    if place.type == "cpu":
        keep_freed_memory()
    kind = getattr(torch, dtype.value)
    try:
        served = _served(backend, probe(str(place), kind, dim=dim, planes=planes, tables=tables, causal=causal))
        source = GeneratedStream(
            tokens, segment, heads=heads, dim=dim, dtype=kind, device=place, seed=seed, decay=decay
        )
        options: dict[str, Any] = {
            "causal": causal,
            "scale": dim**-0.5,
            "backend": served,
            "journal_every": journal_every,
            "progress": sys.stderr.isatty() if progress is None else progress,
        }
        with enough_memory("segment, heads, dim, planes, tables"):
            seconds, sums, gradients = measure(
                source, _hash(heads, tables, planes, dim, place, beta), options, backward, keep_every, keep_on, journal
            )
    except (ValueError, TypeError, ImportError) as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        if journal is None:
            raise
        raise typer.BadParameter(f"journal: got {str(journal)!r}, which cannot be written: {error}") from None
    result = {
        "device": _name(place),
        "backend": served,
        "shape": {"B": 1, "T": tokens, "H": heads, "D": dim, "P": planes, "L": tables},
        "segment": segment,
        "dtype": dtype.value,
        "causal": causal,
        "decay": decay,
        "beta": beta,
        "seed": seed,
        "pass": "forward and backward" if backward else "forward",
        "keep_every": keep_every,
        "journal": journal is not None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": seconds,
        "tokens_per_s": tokens / sum(seconds.values()),
        "cpu_seconds": time.process_time(),  # of all threads, the start included
        "peak_memory_bytes": peak_memory(place),
        "checksums": sums | ({} if gradients is None else checksums(gradients)),
    }
    if as_json:
        write_json(result)
    else:
        _show(result)


def _hash(
    heads: int, tables: int, planes: int, dim: int, device: torch.device, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    number("beta", beta, 0.0, MAX_BETA)
    return sample_hyperplanes(heads, tables, planes, dim, device=device), torch.full((heads,), beta, device=device)


def _show(result: dict[str, Any]) -> None:
    shape = " ".join(f"{letter}={size}" for letter, size in result["shape"].items())
    rows = [
        ("device", result["device"]),
        ("backend", result["backend"]),
        ("shape", shape),
        ("segment", f"{result['segment']} tokens"),
        ("dtype", result["dtype"]),
        ("pass", result["pass"] + (", causal" if result["causal"] else ", not causal")),
        *((f"seconds, {name}", f"{seconds:.2f}") for name, seconds in result["seconds"].items()),
        ("tokens per second", si(result["tokens_per_s"])),
        *((f"peak memory, {name}", f"{size / 2**20:.0f} MiB") for name, size in result["peak_memory_bytes"].items()),
    ]
    out = console()
    out.print(table("One layer's core, streamed", ("what", "value"), rows))
    sums = [(name, f"{x['sum']:.9g}", f"{x['norm']:.9g}") for name, x in result["checksums"].items()]
    out.print(table("Checksums", ("of", "sum", "norm"), sums, right=("sum", "norm")))
