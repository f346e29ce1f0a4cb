"""``race-attention info``: versions, devices, which backends serve here and why others do not."""

from __future__ import annotations

import platform
import warnings
from importlib import metadata
from typing import Any

import torch

from race_attention import backends
from race_attention._version import __version__
from race_attention.attention import BackendWarning, choose_backend
from race_attention.backends.call import Call

from .common import Json, console, table, write_json

PACKAGES = ("triton", "safetensors", "numpy", "typer", "rich")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def command(as_json: Json = False) -> None:
    """Versions, devices, each backend (available, or why not), and what backend="auto" chooses."""
    facts = collect()
    if as_json:
        write_json(facts)
        return
    out = console()
    out.print(table("Versions", ("what", "version"), [(k, v or "not installed") for k, v in facts["versions"].items()]))
    out.print(table("Devices", ("device", "what"), list(facts["devices"].items())))
    out.print(table("Backends", ("backend", "device", "dtype", "state"), _backend_rows(facts)))
    described = [(name, k, v) for name, about in facts["backends"].items() for k, v in about["details"].items()]
    if described:
        out.print(table("Details", ("backend", "what", "value"), described))
    rows = []
    for device, by_dtype in facts["auto"].items():
        grouped: dict[tuple[str, str], list[str]] = {}
        for dtype, choice in by_dtype.items():
            grouped.setdefault((choice["backend"], choice["why"]), []).append(dtype)
        rows += [(device, ", ".join(dtypes), chosen, why) for (chosen, why), dtypes in grouped.items()]
    out.print(table('backend="auto" chooses', ("device", "dtype", "backend", "why"), rows))


def collect() -> dict[str, Any]:
    """All that the command shows, as plain data."""
    places = devices()
    return {
        "versions": versions(),
        "devices": places,
        "backends": {name: _backend(name, places) for name in backends.NAMES},
        "auto": {
            device: {short(dtype): _chosen(probe(device, dtype)) for dtype in DTYPES if _exists(device, dtype)}
            for device in places
        },
    }


def versions() -> dict[str, str | None]:
    """The versions of this package and those it works with; None where one is not installed."""
    found: dict[str, str | None] = {
        "race-attention": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda (of torch)": torch.version.cuda,
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def devices() -> dict[str, str]:
    """The devices that torch sees: name -> what it is."""
    found = {"cpu": f"{_processor()}, {torch.get_num_threads()} threads"}
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        for index in range(module.device_count() if module.is_available() else 0):
            about = module.get_device_properties(index)
            found[f"{kind}:{index}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found


def probe(
    device: str, dtype: torch.dtype, *, dim: int = 64, planes: int = 2, tables: int = 2, causal: bool = True
) -> Call:
    """A plain call of few tokens there, to ask backends about."""
    x = torch.zeros(1, 4, 1, dim, device=device, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    hyperplanes = torch.zeros(1, tables, planes, dim, device=device, dtype=wide)
    return Call(x, x, x, hyperplanes, torch.ones(1, device=device, dtype=wide), causal=causal)


def short(dtype: torch.dtype) -> str:
    """'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _exists(device: str, dtype: torch.dtype) -> bool:
    return not (device == "mps" and dtype == torch.float64)


def _chosen(call: Call) -> dict[str, str]:
    """What auto takes for the call, and why."""
    with warnings.catch_warnings():  # what it would warn of is said in "why"
        warnings.simplefilter("ignore", BackendWarning)
        chosen = choose_backend(call)
    kind = call.query.device.type
    native = backends.NATIVE.get(kind)
    if native is None:
        why = f"no backend is made for {kind}"
    elif native == chosen:
        why = f"the native backend of {kind}"
    else:
        why = f"{native!r} cannot: {backends.why_not(native, call)}"
    return {"backend": chosen, "why": why}


def _backend(name: str, places: dict[str, str]) -> dict[str, Any]:
    """What a backend says of each device and dtype (None: it serves it), and of itself."""
    serves: dict[str, dict[str, str | None]] = {}
    for device in places:
        by_dtype = {
            short(dtype): backends.why_not(name, probe(device, dtype)) for dtype in DTYPES if _exists(device, dtype)
        }
        serves[device] = by_dtype
    details: dict[str, str] = {}
    try:
        describe = getattr(backends.load(name), "describe", None)
    except ImportError:
        describe = None
    if describe is not None:
        details = {key: str(value) for key, value in describe().items()}
    return {"why_not": serves, "details": details}


def _backend_rows(facts: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """One row for each backend, device and answer, the dtypes with the same answer together."""
    rows = []
    for name, about in facts["backends"].items():
        for device, by_dtype in about["why_not"].items():
            answers: dict[str | None, list[str]] = {}
            for dtype, reason in by_dtype.items():
                answers.setdefault(reason, []).append(dtype)
            for reason, dtypes in answers.items():
                rows.append((name, device, ", ".join(dtypes), "available" if reason is None else f"no: {reason}"))
    return rows


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
