"""The checks of :func:`race_attention.race_attention`: from a user's arguments to a ``Call``.

Shapes, dtypes and devices are checked always. Values (a positive log_decay, a NaN beta, cu_seqlens that do
not rise) are checked where reading them is free, on the CPU; on other devices reading them would stall the
device at every call, and RACE_ATTENTION_CHECK_VALUES=1 asks for it. Inside torch.compile and CUDA graphs
values cannot be read at all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .backends.call import Call
from .state import RaceState, state_dtype

MAX_BETA = 1e4
MAX_PLANES = 10  # 2**-14P, the least of a bucket, must be a float32 number (a denormal one will do)


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hyperplanes: Tensor,
    beta: float | Tensor,
    *,
    causal: bool,
    scale: float,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_key: Tensor | None,
    initial_state: RaceState | None,
    return_state: bool,
    readout: str,
) -> Call:
    """The checked call. Raises ValueError or TypeError naming the argument, the given and the allowed."""
    for name, flag in (("causal", causal), ("return_state", return_state)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: got {flag!r}, allowed is a bool")
    if readout not in ("global", "bucket"):
        raise ValueError(f"readout: got {readout!r}, allowed is 'global' or 'bucket'")
    query, key, value = _check_tokens(query, key, value, causal)
    groups = key.shape[2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    hyperplanes, scale = _check_hyperplanes(hyperplanes, query, groups).to(dtype), check_scale(scale)
    if torch.compiler.is_compiling() or scale != 1:  # a product less; traced, a dynamic scale would be guarded on
        hyperplanes = hyperplanes * scale
    cu_seqlens, cu_seqlens_key = _check_packing(query, key, causal, cu_seqlens, cu_seqlens_key)
    rows = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    mass, value_sum = _check_state(initial_state, rows, hyperplanes, value, groups)
    return Call(
        query=query,
        key=key,
        value=value,
        hyperplanes=hyperplanes.expand(groups, -1, -1, -1),
        beta=_check_beta(beta, query, groups).to(dtype).expand(groups),
        causal=causal,
        log_decay=_check_log_decay(log_decay, key, causal, dtype),
        key_mask=_check_key_mask(key_mask, key),
        cu_seqlens=cu_seqlens,
        cu_seqlens_key=cu_seqlens_key,
        initial_mass=mass,
        initial_value_sum=value_sum,
        return_state=return_state,
        readout=readout,
    )


def check_scale(scale: float) -> float:
    """The scale as a float, finite and positive."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {scale!r}, allowed is a number")
    if scale <= 0 or scale - scale != 0:  # not math.isfinite: torch.compile traces a dynamic scale through this
        raise ValueError(f"scale: got {scale}, allowed is finite and positive")
    return float(scale)


def shape_of(x: Tensor) -> str:
    """The shape, for a message."""
    return str(list(x.shape))


def is_tensor(name: str, x: object) -> None:
    """Raises TypeError where ``x`` is no tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, allowed is a Tensor")


def values_readable(x: Tensor) -> bool:
    """Whether to look at the values of ``x``: see the module's docstring."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta:
        return False
    if torch._C._functorch.maybe_current_level() is not None:  # vmap, grad: values are not numbers here
        return False
    if x.device.type == "cpu":
        return True
    if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    return os.environ.get("RACE_ATTENTION_CHECK_VALUES", "0") not in ("", "0")


def _check_same_device(name: str, x: Tensor, query: Tensor) -> None:
    if x.device != query.device:
        raise ValueError(f"{name}: got a tensor on {x.device}, allowed is the query's device, {query.device}")


def _check_shape(name: str, x: Tensor, query: Tensor, *allowed: tuple[int, ...]) -> None:
    if tuple(x.shape) not in allowed:
        shapes = " or ".join(str(list(shape)) for shape in allowed)
        raise ValueError(f"{name}: got shape {shape_of(x)}, allowed is {shapes}")
    _check_same_device(name, x, query)


def _check_tokens(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    tokens = {"query": query, "key": key, "value": value}
    for name, x in tokens.items():
        is_tensor(name, x)
        if x.ndim != 4:
            letters = "[B, Tq, H, D]" if name == "query" else "[B, Tk, G, Dv]" if name == "value" else "[B, Tk, G, D]"
            raise ValueError(f"{name}: got shape {shape_of(x)}, allowed is {letters}")
        if not x.is_floating_point() or x.itemsize < 2:
            raise TypeError(f"{name}: got {x.dtype}, allowed is bfloat16, float16, float32 or float64")
        if min(x.shape[2:]) < 1:
            raise ValueError(f"{name}: got shape {shape_of(x)}, allowed is at least one head of size 1 or more")
        _check_same_device(name, x, query)
    kind = query.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)  # torch raises for meta, which has none
    if autocast and torch.float64 not in {x.dtype for x in tokens.values()}:
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in tokens.values())
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(f"{name}: got {x.dtype}, allowed is the query's dtype, {query.dtype}")
    batch, length, heads, dim = query.shape
    if key.shape[0] != batch or key.shape[3] != dim:
        raise ValueError(
            f"key: got shape {shape_of(key)}, allowed is [{batch}, Tk, G, {dim}] (query {shape_of(query)})"
        )
    if heads % key.shape[2]:
        raise ValueError(f"query: got H = {heads} heads, allowed is a multiple of the key's G = {key.shape[2]}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: got shape {shape_of(value)}, allowed is {[*key.shape[:3]]} and Dv (key {shape_of(key)})"
        )
    if causal and key.shape[1] != length:
        raise ValueError(f"key: got {key.shape[1]} tokens, allowed with causal=True is the query's {length}")
    return query, key, value


def _check_hyperplanes(hyperplanes: Tensor, query: Tensor, groups: int) -> Tensor:
    is_tensor("hyperplanes", hyperplanes)
    if not hyperplanes.is_floating_point():
        raise TypeError(f"hyperplanes: got {hyperplanes.dtype}, allowed is a floating dtype")
    shape = hyperplanes.shape
    if len(shape) != 4 or shape[0] not in (1, groups) or shape[3] != query.shape[3] or min(shape) < 1:
        raise ValueError(
            f"hyperplanes: got shape {shape_of(hyperplanes)}, allowed is [{groups} or 1, L, P, {query.shape[3]}] "
            f"(key heads, tables, planes, size of a query)"
        )
    if shape[2] > MAX_PLANES:
        raise ValueError(f"hyperplanes: got P = {shape[2]} planes, allowed is 1 to {MAX_PLANES}")
    _check_same_device("hyperplanes", hyperplanes, query)
    return hyperplanes


def _allowed_beta(groups: int) -> str:
    """Written only where an error is raised: torch.compile cannot format dynamic numbers."""
    return f"allowed is a number in (0, {MAX_BETA:g}], a scalar tensor, or [{groups}] of them"


def _check_beta(beta: float | Tensor, query: Tensor, groups: int) -> Tensor:
    if isinstance(beta, (int, float)) and not isinstance(beta, bool):
        if not 0 < beta <= MAX_BETA:
            raise ValueError(f"beta: got {beta}, {_allowed_beta(groups)}")
        return torch.full(
            (1,),
            float(beta),
            dtype=torch.float64 if query.dtype == torch.float64 else torch.float32,
            device=query.device,
        )
    if not isinstance(beta, Tensor):
        raise TypeError(f"beta: got {type(beta).__name__}, {_allowed_beta(groups)}")
    if not beta.is_floating_point():
        raise TypeError(f"beta: got {beta.dtype}, allowed is a floating dtype")
    if tuple(beta.shape) not in ((), (1,), (groups,)):
        raise ValueError(f"beta: got shape {shape_of(beta)}, {_allowed_beta(groups)}")
    _check_same_device("beta", beta, query)
    if values_readable(beta) and not bool(((beta > 0) & (beta <= MAX_BETA)).all()):
        raise ValueError(f"beta: got {beta.detach().tolist()}, {_allowed_beta(groups)}")
    return beta.reshape(-1)


def _check_log_decay(log_decay: Tensor | None, key: Tensor, causal: bool, dtype: torch.dtype) -> Tensor | None:
    if log_decay is None:
        return None
    is_tensor("log_decay", log_decay)
    if not causal:
        raise ValueError(
            "log_decay: got a tensor with causal=False, allowed is None there: without order nothing decays"
        )
    if not log_decay.is_floating_point():
        raise TypeError(f"log_decay: got {log_decay.dtype}, allowed is a floating dtype")
    batch, length, groups, _ = key.shape
    _check_shape("log_decay", log_decay, key, (groups,), (batch, length, groups))
    if values_readable(log_decay) and not bool(((log_decay <= 0) & log_decay.isfinite()).all()):
        bad = log_decay.detach()[~((log_decay <= 0) & log_decay.isfinite())][0].item()
        raise ValueError(f"log_decay: got {bad}, allowed is finite and at most 0")
    return log_decay.to(dtype).expand(batch, length, groups)


def _check_key_mask(key_mask: Tensor | None, key: Tensor) -> Tensor | None:
    if key_mask is None:
        return None
    is_tensor("key_mask", key_mask)
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask: got {key_mask.dtype}, allowed is torch.bool (True takes part)")
    batch, length, groups, _ = key.shape
    _check_shape("key_mask", key_mask, key, (batch, length), (batch, length, groups))
    return (key_mask if key_mask.ndim == 3 else key_mask.unsqueeze(-1)).expand(batch, length, groups)


def _check_packing(
    query: Tensor, key: Tensor, causal: bool, cu_seqlens: Tensor | None, cu_seqlens_key: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if cu_seqlens is None:
        if cu_seqlens_key is not None:
            raise ValueError("cu_seqlens_key: got a tensor without cu_seqlens, allowed is both or cu_seqlens alone")
        return None, None
    if query.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens: got a query of batch {query.shape[0]}, allowed is 1: packed sequences share a row"
        )
    cu_seqlens = _check_offsets("cu_seqlens", cu_seqlens, query)
    if cu_seqlens_key is None or cu_seqlens_key is cu_seqlens:
        if key.shape[1] != query.shape[1]:
            raise ValueError(
                f"cu_seqlens_key: got None with {query.shape[1]} queries and {key.shape[1]} keys, "
                f"allowed is None only where queries and keys are packed alike"
            )
        return cu_seqlens, cu_seqlens
    if causal:
        raise ValueError("cu_seqlens_key: got a tensor with causal=True, allowed is None there: cu_seqlens serves both")
    cu_seqlens_key = _check_offsets("cu_seqlens_key", cu_seqlens_key, key)
    if cu_seqlens_key.shape != cu_seqlens.shape:
        raise ValueError(
            f"cu_seqlens_key: got shape {shape_of(cu_seqlens_key)}, "
            f"allowed is that of cu_seqlens, {shape_of(cu_seqlens)}"
        )
    return cu_seqlens, cu_seqlens_key


def _check_offsets(name: str, offsets: Tensor, tokens: Tensor) -> Tensor:
    is_tensor(name, offsets)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got {offsets.dtype}, allowed is torch.int32 or torch.int64")
    if offsets.ndim != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name}: got shape {shape_of(offsets)}, allowed is [n + 1]")
    _check_same_device(name, offsets, tokens)
    if values_readable(offsets):
        given: Sequence[int] = offsets.tolist()
        if given[0] != 0 or given[-1] != tokens.shape[1] or any(b < a for a, b in pairwise(given)):
            shown = str(given) if len(given) <= 8 else f"[{given[0]}, {given[1]}, ..., {given[-1]}]"
            raise ValueError(f"{name}: got {shown}, allowed rises from 0 to {tokens.shape[1]}, the number of tokens")
    return offsets.to(torch.int64)


def _check_state(
    state: RaceState | None, rows: int, hyperplanes: Tensor, value: Tensor, groups: int
) -> tuple[Tensor | None, Tensor | None]:
    if state is None:
        return None, None
    if not isinstance(state, RaceState):
        raise TypeError(f"initial_state: got {type(state).__name__}, allowed is RaceState")
    tables, planes = hyperplanes.shape[1:3]
    allowed = (rows, groups, tables, 2**planes, value.shape[3])
    if tuple(state.value_sum.shape) != allowed:
        raise ValueError(
            f"initial_state: got value_sum of shape {shape_of(state.value_sum)}, allowed is {list(allowed)} "
            f"(rows, key heads, tables, buckets, Dv)"
        )
    _check_same_device("initial_state", state.mass, value)
    dtype = state_dtype(value.device)
    return state.mass.to(dtype), state.value_sum.to(dtype)
