"""``race_attention``: the checks, the choice of a backend, the call, the state. One page."""

from __future__ import annotations

import warnings
from types import ModuleType

import torch
from torch import Tensor

from . import backends
from .backends.call import Call
from .checks import MOST_PASSED, Form, check, form_of, taken, values_wanted
from .packing import row_of_token
from .state import RaceState, state_dtype


class BackendWarning(UserWarning):
    """A call that ``backend="auto"`` serves by the reference although its device has a faster backend."""


def race_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hyperplanes: Tensor,
    beta: float | Tensor,
    *,
    causal: bool = False,
    scale: float = 1.0,
    log_decay: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
    initial_state: RaceState | None = None,
    return_state: bool = False,
    readout: str = "global",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, RaceState]:
    r"""RACE Attention: linear in the length, by soft locality-sensitive hashing (arXiv 2510.04008).

    With a(x) = (1 - 2**-13) tanh(beta tanh(scale w.x)) for each hyperplane w, a query i sees key j with weight

        kappa(q_i, k_j) = (1/L) sum_l prod_p (1 + a_{l,p}(q_i) a_{l,p}(k_j)) / 2

    and the output is the weighted mean of the values: over all keys (Algorithm 1), or over j <= i with
    ``causal`` (Algorithm 2). The paper's softmax over corners factorises into this product exactly; its
    a has no factor 1 - 2**-13, which we add so that no weight is ever zero.

    Shape letters: B batch, Tq and Tk tokens, H query heads, G key heads, D and Dv sizes of a key and a value,
    L tables, P planes a table, R = 2**P buckets, rows = B or the number of packed sequences.

    Args:
        query: [B, Tq, H, D], bfloat16, float16, float32 or float64, any strides. Under autocast query, key
            and value are cast to its dtype (float64 excepted).
        key: [B, Tk, G, D] of the query's dtype. H is a multiple of G; head h reads key head h // (H / G).
        value: [B, Tk, G, Dv] of the query's dtype.
        hyperplanes: [G or 1, L, P, D], any floating dtype, P at most 10; see :func:`sample_hyperplanes`.
        beta: sharpness of the buckets, in (0, 1e4]: a number, a scalar tensor, or [G].
        causal: a query sees the keys up to its own position; needs Tq == Tk. Otherwise it sees all keys, and
            Tq != Tk is cross-attention.
        scale: multiplies the projections w.x; 1 in the paper.
        log_decay: [G] or [B, Tk, G], finite and <= 0, causal only: the state is multiplied by exp(log_decay_t)
            before token t is added, whether or not key_mask lets the token take part. Not in the paper.
        key_mask: [B, Tk] or [B, Tk, G] bool, True takes part; a masked key adds neither mass nor value.
        cu_seqlens: [n + 1] int32 or int64 offsets of n packed sequences, rising from 0 to Tq; needs B == 1.
        cu_seqlens_key: [n + 1] likewise for the keys, where they are packed differently (not causal).
        initial_state: the state of what came before: of earlier tokens if causal, of extra keys otherwise.
        return_state: returns the state of the initial state and all keys as well.
        readout: "global", the paper's: one mean over all buckets. "bucket": the mean of each bucket, averaged
            with weight phi_q / L, which the paper's released code computes; the reference backend has it.
        backend: "auto" picks by device; "reference", "cpu" and "triton" insist on one.

    Returns:
        [B, Tq, H, Dv] in the query's dtype, in the convex hull of the values seen; 0 where a query sees no
        key. With ``return_state`` a pair of it and a :class:`RaceState` of ``rows`` rows, float64.
        Differentiable in query, key, value, hyperplanes, beta, log_decay, and in and out of the state.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed; also where the named
            backend cannot serve the call, with its reason. Values of tensors are checked on the CPU; on other
            devices only with RACE_ATTENTION_CHECK_VALUES=1, since reading them stalls the device.
    """
    given = (query, key, value, hyperplanes, beta, log_decay, key_mask, cu_seqlens, cu_seqlens_key)
    form = form_of(given, causal, scale, initial_state, return_state, readout, backend)
    prepared = None if form is None else _prepared.get(form)
    if form is not None and prepared is not None and not values_wanted(query.device):
        again = prepared(taken(form, given, scale))
        if again is not None:
            return again
    call = check(
        query,
        key,
        value,
        hyperplanes,
        beta,
        causal=causal,
        scale=scale,
        log_decay=log_decay,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        cu_seqlens_key=cu_seqlens_key,
        initial_state=initial_state,
        return_state=return_state,
        readout=readout,
        form=form,
    )
    module = backends.load(choose_backend(call, backend))
    out, mass, value_sum = module.run(call)
    if mass is None or value_sum is None:
        if form is not None and prepared is None and initial_state is None and not return_state:
            _prepare(form, module, call)
        return out
    return out, RaceState(mass, value_sum, _total_log_decay(call, initial_state), _tokens(call, initial_state))


#: Calls that a backend has prepared, by their form.
_prepared: dict[Form, backends.Prepared] = {}


def _prepare(form: Form, module: ModuleType, call: Call) -> None:
    """Asks the backend for a way to serve calls like this one without what all of them have in common."""
    prepare = getattr(module, "prepared", None)
    found = None if prepare is None else prepare(call)
    if found is not None:
        if len(_prepared) >= MOST_PASSED:
            _prepared.clear()
        _prepared[form] = found


def choose_backend(call: Call, backend: str = "auto") -> str:
    """The name of the backend that serves the call.

    Raises:
        ValueError: no such backend, or the named one cannot serve the call, with its reason.
    """
    if backend != "auto":
        reason = backends.why_not(backend, call)
        if reason is not None:
            raise ValueError(f"backend: got {backend!r}, which cannot serve this call: {reason}")
        return backend
    native = backends.NATIVE.get(call.query.device.type)
    if native is None:
        return "reference"
    reason = backends.why_not(native, call)
    if reason is None:
        return native
    if call.readout == "global" and not torch.compiler.is_compiling():  # the bucket readout is reference only
        warnings.warn(
            f"race_attention: the slower reference backend serves this call; {native!r} cannot: {reason}",
            BackendWarning,
            stacklevel=3,
        )
    return "reference"


def _total_log_decay(call: Call, initial: RaceState | None) -> Tensor:
    """The log_decay of each row's tokens and of the state before them, summed: [rows, G]."""
    device = call.key.device
    dtype = state_dtype(device)
    before = None if initial is None else initial.log_decay.to(dtype)
    shape = (call.rows, call.key.shape[2])
    if call.log_decay is None:
        # A copy: a state neither shares memory with the one before it nor keeps its graph.
        return torch.zeros(shape, dtype=dtype, device=device) if before is None else before.clone()
    if call.cu_seqlens is None:
        total = call.log_decay.sum(1, dtype=dtype)
        return total if before is None else total + before
    if before is None:
        before = torch.zeros(shape, dtype=dtype, device=device)
    return before.index_add(0, _row_of_key(call), call.log_decay[0].to(dtype))


def _tokens(call: Call, initial: RaceState | None) -> Tensor:
    """How many keys of each row and of the state before them take part, in any head: [rows] int64."""
    length, device = call.key.shape[1], call.key.device
    if initial is None and call.key_mask is None and call.cu_seqlens_key is None:
        return torch.full((call.rows,), length, dtype=torch.int64, device=device)
    before = torch.zeros(call.rows, dtype=torch.int64, device=device) if initial is None else initial.tokens
    if call.key_mask is None:
        return before + (length if call.cu_seqlens_key is None else call.cu_seqlens_key.diff())
    part = call.key_mask.any(-1).to(torch.int64)
    if call.cu_seqlens_key is None:
        return before + part.sum(1)
    return before.index_add(0, _row_of_key(call), part[0])


def _row_of_key(call: Call) -> Tensor:
    """The packed sequence that each key belongs to: [Tk]."""
    assert call.cu_seqlens_key is not None
    return row_of_token(call.cu_seqlens_key, call.key.shape[1])
