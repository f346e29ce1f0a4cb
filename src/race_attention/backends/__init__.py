"""The implementations of RACE Attention, and the one place that knows their names.

Every backend is a module with two functions:

    why_not(call) -> str | None     the reason it cannot serve this call, or None when it can
    run(call) -> (out, mass, value_sum)

and it may have

    prepared(call) -> Prepared | None       how to serve calls of the same form with less host code, where no state
                                            comes in or goes out

``call`` is a checked :class:`~race_attention.backends.call.Call`. Backends are imported on first use,
so that the package imports with torch alone, and they never import each other.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from .call import Call

#: Takes query, key, value, hyperplanes, beta, log_decay, key_mask, cu_seqlens and cu_seqlens_key of a call, whose
#: shapes, strides, dtypes, devices and options are those of the call it was made for. Returns out, or None where the
#: call has to go the whole way.
Prepared = Callable[[tuple[Any, ...]], Tensor | None]

NAMES = ("reference", "cpu", "triton")

#: device type -> the backend that ``backend="auto"`` asks first there; the reference serves the rest.
NATIVE = {"cpu": "cpu", "cuda": "triton", "xpu": "triton"}


def load(name: str) -> ModuleType:
    """The backend module of that name, imported on first use.

    Raises:
        ValueError: no backend has that name. ImportError: it needs something that is not installed.
    """
    # Plain imports: torch.compile follows these, and not importlib.
    if name == "reference":
        from . import reference

        return reference
    if name == "cpu":
        from . import cpu

        return cpu
    if name == "triton":
        from . import triton

        return triton
    raise ValueError(f"backend: got {name!r}, allowed are 'auto', " + ", ".join(map(repr, NAMES)))


def why_not(name: str, call: Call) -> str | None:
    """The reason why a backend cannot serve the call, or None.

    Raises:
        ValueError: no backend has that name.
    """
    try:
        module = load(name)
    except ImportError as error:
        return str(error)
    reason: str | None = module.why_not(call)
    return reason
