"""What a call's arguments have to be, but for the values of tensors: types, shapes, dtypes, devices.

The dtype that autocast casts to counts as the dtype of queries, keys and values.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from .arguments import flag, same_shape
from .state import RaceState

MAX_BETA = 1e4
MAX_PLANES = 10  # 2**-14P, the least of a bucket, must be a float32 number (a denormal one will do)


def check_forms(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hyperplanes: Tensor,
    beta: float | Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_key: Tensor | None,
    causal: bool,
    scale: float,
    initial_state: RaceState | None,
    return_state: bool,
    readout: str,
) -> None:
    """Checks all but the values of tensors."""
    flag("causal", causal)
    flag("return_state", return_state)
    if readout not in ("global", "bucket"):
        raise ValueError(f"readout: got {readout!r}, allowed is 'global' or 'bucket'")
    _check_tokens(query, key, value, causal)
    groups = key.shape[2]
    _check_hyperplanes(hyperplanes, query, groups)
    check_scale(scale)
    _check_packing(query, key, causal, cu_seqlens, cu_seqlens_key)
    rows = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _check_state(initial_state, rows, hyperplanes, value, groups)
    _check_beta(beta, query, groups)
    _check_log_decay(log_decay, key, causal)
    _check_key_mask(key_mask, key)


def autocast_dtype(query: Tensor, key: Tensor, value: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts queries, keys and values to, or None."""
    kind = query.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # torch raises for meta, which has none
        return None
    return None if torch.float64 in (query.dtype, key.dtype, value.dtype) else torch.get_autocast_dtype(kind)


def check_scale(scale: float) -> float:
    """The scale as a float, finite and positive."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {scale!r}, allowed is a number")
    if not 0 < scale <= sys.float_info.max:  # not math.isfinite: torch.compile traces a dynamic scale through this
        raise ValueError(f"scale: got {scale}, allowed is finite and positive")
    return float(scale)


def shape_of(x: Tensor) -> str:
    """The shape, for a message."""
    return str(list(x.shape))


def is_tensor(name: str, x: object) -> None:
    """Raises TypeError where ``x`` is no tensor, or none whose elements lie at strides."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, allowed is a Tensor")
    if x.is_nested:
        raise TypeError(f"{name}: got a nested tensor, allowed is a dense one; sequences are packed by cu_seqlens")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: got a tensor of layout {x.layout}, allowed is {torch.strided}")


def check_same_device(name: str, x: Tensor, other: Tensor, its_name: str = "the query") -> None:
    """Raises ValueError where ``x`` is not on the device of another argument."""
    if x.device != other.device:
        raise ValueError(f"{name}: got a tensor on {x.device}, allowed is {its_name}'s device, {other.device}")


def _check_shape(name: str, x: Tensor, query: Tensor, *allowed: tuple[int, ...]) -> None:
    if not any(same_shape(x.shape, shape) for shape in allowed):
        shapes = " or ".join(str(list(shape)) for shape in allowed)
        raise ValueError(f"{name}: got shape {shape_of(x)}, allowed is {shapes}")
    check_same_device(name, x, query)


def _check_tokens(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> None:
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
        check_same_device(name, x, query)
    autocast = autocast_dtype(query, key, value)
    for name, x in (("key", key), ("value", value)):
        if autocast is None and x.dtype != query.dtype:
            raise TypeError(f"{name}: got {x.dtype}, allowed is the query's dtype, {query.dtype}")
    batch, length, heads, dim = query.shape
    if key.shape[0] != batch or key.shape[3] != dim:
        raise ValueError(
            f"key: got shape {shape_of(key)}, allowed is [{batch}, Tk, G, {dim}] (query {shape_of(query)})"
        )
    if heads % key.shape[2]:
        raise ValueError(f"query: got H = {heads} heads, allowed is a multiple of the key's G = {key.shape[2]}")
    if not same_shape(value.shape[:3], key.shape[:3]):
        raise ValueError(
            f"value: got shape {shape_of(value)}, allowed is {[*key.shape[:3]]} and Dv (key {shape_of(key)})"
        )
    if causal and key.shape[1] != length:
        raise ValueError(f"key: got {key.shape[1]} tokens, allowed with causal=True is the query's {length}")


def _check_hyperplanes(hyperplanes: Tensor, query: Tensor, groups: int) -> None:
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
    check_same_device("hyperplanes", hyperplanes, query)


def allowed_beta(groups: int) -> str:
    """Written only where an error is raised: torch.compile cannot format dynamic numbers."""
    return f"allowed is a number in (0, {MAX_BETA:g}], a scalar tensor, or [{groups}] of them"


def _check_beta(beta: float | Tensor, query: Tensor, groups: int) -> None:
    if isinstance(beta, (int, float)) and not isinstance(beta, bool):
        if not 0 < beta <= MAX_BETA:
            raise ValueError(f"beta: got {beta}, {allowed_beta(groups)}")
        return
    if not isinstance(beta, Tensor):
        raise TypeError(f"beta: got {type(beta).__name__}, {allowed_beta(groups)}")
    is_tensor("beta", beta)
    if not beta.is_floating_point():
        raise TypeError(f"beta: got {beta.dtype}, allowed is a floating dtype")
    if tuple(beta.shape) not in ((), (1,), (groups,)):
        raise ValueError(f"beta: got shape {shape_of(beta)}, {allowed_beta(groups)}")
    check_same_device("beta", beta, query)


def _check_log_decay(log_decay: Tensor | None, key: Tensor, causal: bool) -> None:
    if log_decay is None:
        return
    is_tensor("log_decay", log_decay)
    if not causal:
        raise ValueError(
            "log_decay: got a tensor with causal=False, allowed is None there: without order nothing decays"
        )
    if not log_decay.is_floating_point():
        raise TypeError(f"log_decay: got {log_decay.dtype}, allowed is a floating dtype")
    batch, length, groups, _ = key.shape
    _check_shape("log_decay", log_decay, key, (groups,), (batch, length, groups))


def _check_key_mask(key_mask: Tensor | None, key: Tensor) -> None:
    if key_mask is None:
        return
    is_tensor("key_mask", key_mask)
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask: got {key_mask.dtype}, allowed is torch.bool (True takes part)")
    batch, length, groups, _ = key.shape
    _check_shape("key_mask", key_mask, key, (batch, length), (batch, length, groups))


def _check_packing(
    query: Tensor, key: Tensor, causal: bool, cu_seqlens: Tensor | None, cu_seqlens_key: Tensor | None
) -> None:
    if cu_seqlens is None:
        if cu_seqlens_key is not None:
            raise ValueError("cu_seqlens_key: got a tensor without cu_seqlens, allowed is both or cu_seqlens alone")
        return
    if query.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens: got a query of batch {query.shape[0]}, allowed is 1: packed sequences share a row"
        )
    check_offsets("cu_seqlens", cu_seqlens, query)
    if cu_seqlens_key is None or cu_seqlens_key is cu_seqlens:
        if key.shape[1] != query.shape[1]:
            raise ValueError(
                f"cu_seqlens_key: got None with {query.shape[1]} queries and {key.shape[1]} keys, "
                f"allowed is None only where queries and keys are packed alike"
            )
        return
    if causal:
        raise ValueError("cu_seqlens_key: got a tensor with causal=True, allowed is None there: cu_seqlens serves both")
    check_offsets("cu_seqlens_key", cu_seqlens_key, key)
    if not same_shape(cu_seqlens_key.shape, cu_seqlens.shape):
        raise ValueError(
            f"cu_seqlens_key: got shape {shape_of(cu_seqlens_key)}, "
            f"allowed is that of cu_seqlens, {shape_of(cu_seqlens)}"
        )


def check_offsets(name: str, offsets: Tensor, tokens: Tensor, its_name: str = "the query") -> None:
    """Checks all but the values of the offsets of sequences packed in ``tokens``, [1, T, ...]."""
    is_tensor(name, offsets)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got {offsets.dtype}, allowed is torch.int32 or torch.int64")
    if offsets.ndim != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name}: got shape {shape_of(offsets)}, allowed is [n + 1]")
    check_same_device(name, offsets, tokens, its_name)


def _check_state(state: RaceState | None, rows: int, hyperplanes: Tensor, value: Tensor, groups: int) -> None:
    if state is None:
        return
    if not isinstance(state, RaceState):
        raise TypeError(f"initial_state: got {type(state).__name__}, allowed is RaceState")
    tables, planes = hyperplanes.shape[1:3]
    allowed = (rows, groups, tables, 2**planes, value.shape[3])
    if not same_shape(state.value_sum.shape, allowed):
        raise ValueError(
            f"initial_state: got value_sum of shape {shape_of(state.value_sum)}, allowed is {list(allowed)} "
            f"(rows, key heads, tables, buckets, Dv)"
        )
    check_same_device("initial_state", state.mass, value)
