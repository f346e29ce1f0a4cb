"""The implementations of RACE Attention, and the one place that knows their names.

Every backend is a module with two functions:

    why_not(call) -> str | None     the reason it cannot serve this call, or None when it can
    run(call) -> (out, mass, value_sum)

``call`` is a checked :class:`~race_attention.backends.call.Call`. Backends are imported on first use,
so that the package imports with torch alone, and they never import each other.
"""

from __future__ import annotations

import importlib
from types import ModuleType

#: name -> module, in the order in which ``backend="auto"`` asks them.
MODULES = {
    "triton": "race_attention.backends.triton",
    "cpu": "race_attention.backends.cpu",
    "reference": "race_attention.backends.reference",
}


def load(name: str) -> ModuleType:
    """The backend module of that name, imported on first use.

    Raises:
        ValueError: no backend has that name.
    """
    if name not in MODULES:
        raise ValueError(f"backend: got {name!r}, allowed are 'auto', " + ", ".join(map(repr, MODULES)))
    return importlib.import_module(MODULES[name])
