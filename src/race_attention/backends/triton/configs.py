"""The table of kernel configurations, by shape class, and the user's own on top of it.

For heads whose buckets fit one tile; others have theirs in wide_configs.py.

``race-attention autotune`` (:mod:`race_attention.backends.triton.autotune`) times a handful of configurations for a
shape class on the GPU at hand and writes the best to ``$RACE_ATTENTION_CONFIG``, or ``triton.json`` in the user's
configuration directory; that file is read when the first kernel is launched.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

#: Buckets of a tile where a head has too many for one.
TILE = 64


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled, and the longest run of tokens a program of it owns.

    Attributes:
        block: C, tokens of a block. warps, stages: Triton's num_warps and num_stages.
        registers: a thread's at most, Triton's maxnreg, on NVIDIA alone; 0 where the compiler chooses.
    """

    block: int
    warps: int
    stages: int
    registers: int = 0


#: Tokens of the longest runs, where a program carries the state from block to block.
LONGEST_RUN = 2048
KERNELS = (
    "causal_key_states",
    "causal_readout",
    "causal_adjoint",
    "causal_query_gradient",
    "causal_key_gradient",
    "full_accumulate",
    "full_readout",
    "full_query_gradient",
    "full_key_gradient",
)


def widest_tile(dim: int) -> int:
    """The most buckets that one tile holds, and a program's registers with it."""
    return TILE if dim <= 128 else 32


def config(kernel: str, dim: int, value_dim: int, buckets: int, dtype: torch.dtype) -> Config:
    """The configuration of a kernel for a shape class; a user's table comes first.

    Args:
        kernel: one of KERNELS.
        dim: D padded to a power of two. value_dim: likewise.
        buckets: of a tile. dtype: of the inputs.
    """
    name = key(kernel, dim, value_dim, buckets, dtype)
    own = _trial.get(name) or _users_table().get(name)
    return own if own is not None else _default(kernel, max(dim, value_dim), buckets, dtype)


#: Configurations under trial, before all others; see autotune.py.
_trial: dict[str, Config] = {}


def key(kernel: str, dim: int, value_dim: int, buckets: int, dtype: torch.dtype) -> str:
    return f"{kernel} D={dim} Dv={value_dim} S={buckets} {str(dtype).removeprefix('torch.')}"


#: (block, warps, stages) by buckets of a tile, 16-bit inputs, D and Dv up to 128: measured on an H200 with D = 128.
#: With 168 registers at most, three programs of four warps run on a multiprocessor, with 128 four.
_MEASURED: dict[str, dict[int, tuple[int, ...]]] = {
    "causal_key_states": {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 2)},
    "causal_readout": {16: (64, 4, 2), 32: (64, 4, 2), 64: (64, 4, 2)},
    "causal_adjoint": {16: (64, 4, 3), 32: (64, 4, 2), 64: (64, 4, 2)},
    "causal_query_gradient": {16: (64, 4, 2, 128), 32: (64, 4, 2, 168), 64: (64, 4, 2)},
    "causal_key_gradient": {16: (64, 4, 2, 128), 32: (64, 4, 2, 168), 64: (64, 4, 2)},
    "full_accumulate": {16: (64, 4, 3), 32: (64, 4, 3), 64: (128, 8, 3)},
    "full_readout": {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 4)},
    "full_query_gradient": {16: (64, 4, 2), 32: (64, 4, 2), 64: (128, 8, 1)},
    "full_key_gradient": {16: (32, 2, 3), 32: (32, 2, 1), 64: (32, 4, 3)},
}


#: Where a decay or grouped queries need more registers, a limit below this one spills.
MORE_REGISTERS = 168


def _default(kernel: str, dim: int, buckets: int, dtype: torch.dtype) -> Config:
    if dtype != torch.float32:
        measured = Config(*_MEASURED[kernel][buckets]) if dim <= 128 else Config(32, 8, 1)
        if dtype == torch.float16 and 0 < measured.registers < MORE_REGISTERS:
            return replace(measured, registers=0)  # its products in two parts spill
        return measured
    return Config(16, 4, 1) if dim <= 64 else Config(16, 8, 1)  # blocks of 32 make ptxas give up on registers


def users_path() -> Path:
    """Where the user's own table is."""
    given = os.environ.get("RACE_ATTENTION_CONFIG")
    if given:
        return Path(given)
    base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return base / "race-attention" / "triton.json"


@functools.cache
def _users_table() -> dict[str, Config]:
    path = users_path()
    if not path.is_file():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))["configs"]
    return {name: Config(**entry) for name, entry in entries.items()}


def write_users_table(entries: dict[str, Config], device: str) -> Path:
    """Adds entries to the user's table, replacing those of the same shape class."""
    path = users_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {**_users_table(), **entries}
    table = {"device": device, "configs": {name: asdict(entry) for name, entry in sorted(merged.items())}}
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    _users_table.cache_clear()
    return path
