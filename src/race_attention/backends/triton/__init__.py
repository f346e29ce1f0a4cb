"""The Triton backend: forward and backward on a GPU, NVIDIA first, nothing vendor-specific.

    device.py    what the kernels share: tiles, soft buckets and their gradients, decay inside a block
    narrow.py    what the causal kernels of one tile share besides
    states.py    the scan over the states of runs of tokens
    causal.py, causal_gradients.py, causal_blocks.py    buckets in one tile; full.py    not causal
    full_short.py                not causal, short packed sequences, without states
    wide.py, wide_features.py, wide_segments.py, wide_configs.py    causal, buckets in several tiles
    wide_halves.py, wide_gradients.py    their gradients: by halves of tables, or by buckets; full_wide.py    not causal
    decode.py, decode_ops.py     one token, and its operator
    plan.py, configs.py          runs of tokens, configurations
    launch.py, launch_*.py       host code of the launches: shared, then by what they launch
    passes.py, ops.py            the forward and the backward pass, torch operators
    direct.py                    around the operators' dispatch
    replay.py, recording.py, memory.py     a pass again without its host code, and how it is written down
    batch.py, csrc/              all kernels of a recorded pass started by one call
    autotune.py  times configurations and writes the user's own table

Importing this module imports neither Triton nor a kernel.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from race_attention.backends.call import OTHERWISE, Call

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_DIM, MOST_BUCKETS = 256, 1024
#: Looked up here, and not at a call, which torch.compile would have to trace.
INSTALLED = importlib.util.find_spec("triton") is not None
#: Before it the compiler knows no product of eight columns.
OLDEST = (3, 5)


def _installed_version() -> str | None:
    """Triton's, without importing it; None where no distribution of that name says so."""
    for name in ("triton", "pytorch-triton"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _too_old(version: str | None) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST


VERSION = _installed_version() if INSTALLED else None
TOO_OLD = _too_old(VERSION)


def why_not(call: Call) -> str | None:
    """The reason the Triton kernels cannot serve a call, or None when they can."""
    query, value = call.query, call.value
    tables, planes = call.hyperplanes.shape[1:3]
    if not INSTALLED:
        return "triton is not installed"
    if TOO_OLD:
        return f"triton is {VERSION}, allowed is {OLDEST[0]}.{OLDEST[1]} or newer"
    if query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the query is on {query.device.type}, allowed is cuda (or any device with TRITON_INTERPRET=1)"
    if query.dtype not in DTYPES:
        return f"the query is {query.dtype}, allowed are bfloat16, float16 and float32"
    if call.readout != "global":
        return f"readout is {call.readout!r}, allowed is 'global'"
    for name, size in (("D", query.shape[3]), ("Dv", value.shape[3])):
        if size > LARGEST_DIM:
            return f"{name} is {size}, allowed is at most {LARGEST_DIM}"
    if tables << planes > MOST_BUCKETS:
        return f"there are {tables << planes} buckets a head, allowed are at most {MOST_BUCKETS}"
    if call.causal and query.shape[1] != call.key.shape[1]:
        return "causal needs as many queries as keys"
    if call.differentiated_otherwise():
        return OTHERWISE
    return None


def run(call: Call) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, mass, value_sum) of a call that :func:`why_not` allows; the states are float64, or None if not wanted."""
    from . import decode_ops

    if decode_ops.serves(call):
        return decode_ops.run(call)
    if not torch.compiler.is_compiling():
        from . import direct

        if direct.unwatched(call):
            return direct.run(call)
    from .ops import triton_forward

    out, mass, value_sum = triton_forward(
        call.query,
        call.key,
        call.value,
        call.hyperplanes,
        call.beta,
        call.log_decay,
        call.key_mask,
        call.cu_seqlens,
        call.cu_seqlens_key,
        call.initial_mass,
        call.initial_value_sum,
        call.causal,
        call.return_state or not call.causal,  # where all keys are seen, what pays depends on lengths
    )[:3]
    return (out, mass, value_sum) if call.return_state else (out, None, None)


def prepared(call: Call) -> Callable[[tuple[Any, ...]], Tensor | None] | None:
    """See :mod:`race_attention.backends`: a pass that has been recorded is started at once."""
    from . import direct

    return direct.Prepared(call) if direct.unwatched(call) else None


def describe() -> dict[str, str]:
    """Versions of the compilers, how kernels are started, and on Hopper whether they use warp-group instructions."""
    if not INSTALLED:
        return {}
    import triton

    from . import batch, start

    facts = {"triton": str(triton.__version__), "ptxas": start.ptxas_version() or "not found"}
    one_call = batch.library() is not None
    facts["kernels of a pass"] = "started by one call" if one_call else "one by one: the library for it was not built"
    if torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9:
        facts["warp-group matrix instructions"] = "on" if start.warp_groups() else "off: needs ptxas 12.9 or newer"
    return facts
