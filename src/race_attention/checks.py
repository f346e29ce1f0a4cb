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
from typing import Any

import torch
from torch import Tensor

from .backends.call import Call
from .forms import MAX_BETA, allowed_beta, autocast_dtype, check_forms
from .state import RaceState, state_dtype

#: See :func:`form_of`.
Form = tuple[object, ...]


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
    form: Form | None = None,
) -> Call:
    """The checked call. Raises ValueError or TypeError naming the argument, the given and the allowed.

    ``form`` is :func:`form_of` it all: what has passed once is not looked at again.
    """
    given = (query, key, value, hyperplanes, beta, log_decay, key_mask, cu_seqlens, cu_seqlens_key)
    as_given = None if form is None else _passed.get(form)
    if as_given is None:
        check_forms(*given, causal, scale, initial_state, return_state, readout)
    if values_wanted(query.device):
        _check_values(query, key, beta, log_decay, cu_seqlens, cu_seqlens_key)
    if as_given:
        assert isinstance(beta, Tensor)
        return Call(
            query, key, value, hyperplanes, beta, causal, log_decay, key_mask, cu_seqlens, cu_seqlens_key,
            return_state=return_state, readout=readout,
        )  # fmt: skip
    call = _brought_to_one_form(*given, causal, scale, initial_state, return_state, readout)
    if form is not None and as_given is None:
        if len(_passed) >= MOST_PASSED:
            _passed.clear()
        _passed[form] = _is_as_given(call, given)
    return call


def taken(form: Form, given: tuple[Any, ...], scale: float) -> tuple[Any, ...]:
    """What a backend takes in the place of the tensors ``given``, in a call without states whose form has passed."""
    if _passed.get(form):
        return given
    others: dict[str, Any] = {
        "scale": scale,
        "initial_state": None,
        "return_state": False,
        "readout": "",
        "causal": False,
    }
    return _tensors(_brought_to_one_form(*given, **others))


def _tensors(call: Call) -> tuple[Tensor | None, ...]:
    return (
        call.query, call.key, call.value, call.hyperplanes, call.beta, call.log_decay, call.key_mask, call.cu_seqlens,
        call.cu_seqlens_key,
    )  # fmt: skip


def _is_as_given(call: Call, given: tuple[object, ...]) -> bool:
    """Whether a call takes all its tensors as they are given, and no state."""
    return call.initial_mass is None and all(x is y for x, y in zip(_tensors(call), given, strict=True))


def _brought_to_one_form(
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
) -> Call:
    """The call of arguments that have passed the checks."""
    query, key, value, hyperplanes, beta, log_decay = map(
        _as_in_memory, (query, key, value, hyperplanes, beta, log_decay)
    )
    autocast = autocast_dtype(query, key, value)
    if autocast is not None:
        query, key, value = query.to(autocast), key.to(autocast), value.to(autocast)
    batch, length, groups, _ = key.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if cu_seqlens is not None:
        alike = cu_seqlens_key is None or cu_seqlens_key is cu_seqlens
        cu_seqlens = cu_seqlens.to(torch.int64)
        cu_seqlens_key = cu_seqlens if alike or cu_seqlens_key is None else cu_seqlens_key.to(torch.int64)
    if key_mask is not None:
        key_mask = _expanded(key_mask if key_mask.ndim == 3 else key_mask.unsqueeze(-1), (batch, length, groups))
    mass = value_sum = None
    if initial_state is not None:
        wide = state_dtype(value.device)
        mass, value_sum = (_as_in_memory(x.to(wide)) for x in (initial_state.mass, initial_state.value_sum))
    return Call(
        query=query,
        key=key,
        value=value,
        hyperplanes=_scaled(hyperplanes, float(scale), dtype, groups),
        beta=_beta_of_heads(beta, dtype, groups, query.device),
        causal=causal,
        log_decay=None if log_decay is None else _expanded(log_decay.to(dtype), (batch, length, groups)),
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        cu_seqlens_key=cu_seqlens_key,
        initial_mass=mass,
        initial_value_sum=value_sum,
        return_state=return_state,
        readout=readout,
    )


#: The forms of calls that have passed: what is checked of them depends on nothing else. Of each, whether the tensors
#: are taken as they are given.
_passed: dict[Form, bool] = {}
#: One more, and all are forgotten.
MOST_PASSED = 4096
_TENSOR = frozenset((Tensor, torch.nn.Parameter))
_PLAIN = _TENSOR | {float, int, type(None)}


def form_of(
    given: tuple[Any, ...],
    causal: object,
    scale: object,
    state: RaceState | None,
    return_state: object,
    readout: object,
    backend: object,
) -> Form | None:
    """All of a call but the values: what :func:`check_forms` looks at, and more; the tensors are ``given``.

    None where that is not worth it: traced, odd types, a call that fails.
    """
    if torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, given)):
        return None
    if not (causal is True or causal is False) or not (return_state is True or return_state is False):
        return None  # 1 is equal to True, but no bool
    if type(scale) is not float or type(readout) is not str or type(backend) is not str:
        return None
    if state is not None and type(state) is not RaceState:
        return None
    query = given[0]
    if not isinstance(query, Tensor):
        return None
    try:
        tensors = [(x.shape, x.stride(), x.dtype, x.device, x.is_neg()) if type(x) in _TENSOR else x for x in given]
    except RuntimeError:  # sparse or nested: check_forms says so
        return None
    kind = query.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    of_state = state and (state.value_sum.shape, state.mass.device)
    return (
        causal, return_state, scale, readout, backend, autocast, of_state, given[8] is given[7],
        *tensors,
    )  # fmt: skip


def _check_values(
    query: Tensor,
    key: Tensor,
    beta: float | Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_key: Tensor | None,
) -> None:
    """Checks the values of tensors, where they can be read."""
    if isinstance(beta, Tensor) and values_readable(beta) and not bool(((beta > 0) & (beta <= MAX_BETA)).all()):
        raise ValueError(f"beta: got {beta.detach().tolist()}, {allowed_beta(key.shape[2])}")
    if log_decay is not None and values_readable(log_decay):
        right = (log_decay <= 0) & log_decay.isfinite()
        if not bool(right.all()):
            bad = log_decay.detach()[~right][0].item()
            raise ValueError(f"log_decay: got {bad}, allowed is finite and at most 0")
    if cu_seqlens is not None:
        check_offset_values("cu_seqlens", cu_seqlens, query)
        if cu_seqlens_key is not None and cu_seqlens_key is not cu_seqlens:
            check_offset_values("cu_seqlens_key", cu_seqlens_key, key)


def _as_in_memory(x: Any) -> Any:
    """Itself, or a copy of a view that is only marked as negated (``z.conj().imag``), which kernels would misread.

    Traced, the operators' dispatch does it.
    """
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or not x.is_neg():
        return x
    return x.resolve_neg()


def _expanded(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x itself where it has the shape; traced, that would be guarded on."""
    return x if not torch.compiler.is_compiling() and x.shape == shape else x.expand(shape)


def _scaled(hyperplanes: Tensor, scale: float, dtype: torch.dtype, groups: int) -> Tensor:
    hyperplanes = hyperplanes.to(dtype)
    if torch.compiler.is_compiling() or scale != 1:  # a product less; traced, a dynamic scale would be guarded on
        hyperplanes = hyperplanes * scale
    return hyperplanes if hyperplanes.shape[0] == groups else hyperplanes.repeat(groups, 1, 1, 1)


def _beta_of_heads(beta: float | Tensor, dtype: torch.dtype, groups: int, device: torch.device) -> Tensor:
    if not isinstance(beta, Tensor):
        return torch.full((groups,), float(beta), dtype=dtype, device=device)
    beta = beta.to(dtype)
    return beta if tuple(beta.shape) == (groups,) else beta.reshape(-1).repeat(groups)


def values_wanted(device: torch.device) -> bool:
    """Whether to look at values on this device: see the module's docstring."""
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or os.environ.get("RACE_ATTENTION_CHECK_VALUES", "0") not in ("", "0")


def values_readable(x: Tensor) -> bool:
    """Whether the values of ``x`` can be read."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta:
        return False
    if torch._C._functorch.maybe_current_level() is not None:  # vmap, grad: values are not numbers here
        return False
    return x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def check_offset_values(name: str, offsets: Tensor, tokens: Tensor) -> None:
    """Raises ValueError where offsets that can be read do not rise from 0 to T, of ``tokens`` [1, T, ...]."""
    if values_readable(offsets):
        given: Sequence[int] = offsets.tolist()
        if given[0] != 0 or given[-1] != tokens.shape[1] or any(b < a for a, b in pairwise(given)):
            shown = str(given) if len(given) <= 8 else f"[{given[0]}, {given[1]}, ..., {given[-1]}]"
            raise ValueError(f"{name}: got {shown}, allowed rises from 0 to {tokens.shape[1]}, the number of tokens")
