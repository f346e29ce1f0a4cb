"""The CPU backend: C++ kernels behind two ``torch.library`` operators, forward and backward.

Sums over tokens run in blocks of 16, states in float64 between runs of tokens, arithmetic in float32 (float64 for
float64). Results do not depend on the number of threads, which is torch's. Gradients are of first order; the
reference backend is differentiable twice.

Shape letters are those of :mod:`race_attention.backends.call`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor

from . import cpu_library
from .call import OTHERWISE, Call, several_at_once

_STORES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_DLPACK = {torch.float32: (2, 32), torch.float64: (2, 64), torch.bfloat16: (4, 16)}  # code, bits
# Bytes of a result that malloc takes fresh from the system each time; RACE_ATTENTION_CPU_KEEP=0 leaves it to malloc.
_LARGE = 1 << 62 if os.environ.get("RACE_ATTENTION_CPU_KEEP") == "0" else 1 << 25
_MOST_BUCKETS = 1 << 16
_FLOAT32_PLANES = 8  # with more, a key's least weight is a denormal float32: such calls compute in float64
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor hyperplanes, Tensor beta, Tensor? log_decay, Tensor? key_mask, "
    "Tensor? cu_seqlens, Tensor? cu_seqlens_key, Tensor? initial_mass, Tensor? initial_value_sum, bool causal"
)
_NO_TOKENS, _NO_STATE = (0,) * 5, (0,) * 11

#: Why the library cannot be used, or None. A constant, which torch.compile can see through; this module is imported
#: when a call asks for it.
_NOT_LOADED = cpu_library.why_not_loaded()


def why_not(call: Call) -> str | None:
    """The reason why this backend cannot serve the call, or None when it can."""
    if call.query.device.type != "cpu":
        return f"the tensors are on {call.query.device}, it serves the CPU"
    if call.query.dtype not in _STORES:
        return f"it serves float32, float64 and bfloat16, not {str(call.query.dtype).removeprefix('torch.')}"
    if call.readout != "global":
        return f"it has the global readout only, not {call.readout!r}"
    buckets = call.hyperplanes.shape[1] << call.hyperplanes.shape[2]
    if buckets > _MOST_BUCKETS:
        return f"it serves at most {_MOST_BUCKETS} buckets, not {buckets}"
    if call.differentiated_otherwise():
        return OTHERWISE
    return _NOT_LOADED


def instruction_set() -> str:
    """The instruction set in use: "avx512", "avx2" or "baseline"; RACE_ATTENTION_CPU_ISA names another.

    Raises:
        OSError: the library was not built.
    """
    return cpu_library.load().isa_name


def describe() -> dict[str, str]:
    """What ``race-attention info`` shows of this backend."""
    if _NOT_LOADED is not None:
        return {"library": _NOT_LOADED}
    library = cpu_library.load()
    return {
        "instruction set": f"{library.isa_name} (of {', '.join(library.isas())})",
        "threads": str(torch.get_num_threads()),
        "library": str(library.path),
    }


def run(call: Call) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Serves a call for which :func:`why_not` had no reason against it.

    Returns:
        out [B, Tq, H, Dv] in the query's dtype, and the final mass [rows, G, L, R] and value_sum
        [rows, G, L, R, Dv] float64, or None twice where ``call.return_state`` is not set.
    """
    tokens: tuple[Tensor | None, ...] = call.query, call.key, call.value, call.hyperplanes, call.beta, call.log_decay
    if call.hyperplanes.shape[2] > _FLOAT32_PLANES:
        tokens = tuple(None if x is None else x.double() for x in tokens)
    inputs = (
        *tokens,
        call.key_mask,
        call.cu_seqlens,
        call.cu_seqlens_key,
        call.initial_mass,
        call.initial_value_sum,
    )
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    arguments = (*inputs, call.causal, call.return_state)
    if not _plain(inputs):
        out, mass, value_sum, _ = torch.ops.race_attention.cpu_forward(*arguments, save)
    elif save:
        results = _Function.apply(*arguments)
        out, mass, value_sum = results if call.return_state else (results, None, None)
    else:
        out, mass, value_sum, _ = _forward_checked(*arguments, False)
    out = out.to(call.query.dtype)
    return (out, mass, value_sum) if call.return_state else (out, None, None)


def _plain(inputs: Sequence[Any]) -> bool:
    """Whether nobody watches the operators: no compiler, mode, transform or subclass of Tensor.

    Then the call goes around torch's dispatcher, whose Python side takes 0.3 ms of a forward and backward.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return False
    if torch._C._functorch.maybe_current_level() is not None or torch._C._len_torch_function_stack():
        return False
    return all(x is None or type(x) is Tensor or type(x) is torch.nn.Parameter for x in inputs)


# ---- the operators ----------------------------------------------------------------------------------------

_library = torch.library.Library("race_attention", "FRAGMENT")
_library.define(
    f"cpu_forward({_INPUTS}, bool return_state, bool save) -> (Tensor out, Tensor mass, Tensor value_sum, Tensor saved)"
)
_library.define(
    f"cpu_backward({_INPUTS}, Tensor saved, Tensor? grad_out, Tensor? grad_mass, Tensor? grad_value_sum, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward_results(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hyperplanes: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_key: Tensor | None,
    initial_mass: Tensor | None,
    initial_value_sum: Tensor | None,
    causal: bool,
    return_state: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of cpu_forward, uninitialised: also its fake implementation."""
    batch, length, heads, _ = query.shape
    groups, dim_v = value.shape[2:]
    tables, buckets = hyperplanes.shape[1], 2 ** hyperplanes.shape[2]
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = _tokens_like(query, batch, length, heads, dim_v)
    state = (rows, groups, tables, buckets) if return_state else (0,)
    mass = query.new_empty(state, dtype=torch.float64)
    value_sum = query.new_empty((*state, dim_v) if return_state else (0,), dtype=torch.float64)
    # Two more than are ever used: with none, or one, a compiled model would be compiled again for short sequences.
    saved = (batch * length // run_length(tables * buckets) + 2, groups, tables * buckets, dim_v + 1)
    return out, mass, value_sum, hyperplanes.new_empty(saved if causal and save else (0,))


def _leanest_results(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The same, with None in the place of all that hold nothing: a new tensor takes 3 us.

    One tensor for all calls would be of the mode that the first call is made in, torch.inference_mode for example.
    """
    query, value, hyperplanes = arguments[0], arguments[2], arguments[3]
    *_, causal, return_state, save = arguments
    batch, length, heads, _ = query.shape
    long = length * batch >= run_length(hyperplanes.shape[1] << hyperplanes.shape[2])
    if return_state or (causal and save and long):
        return _forward_results(*arguments)
    return _tokens_like(query, batch, length, heads, value.shape[3]), None, None, None


def _gradients(inputs: Sequence[Any], wanted: Sequence[bool], lean: bool = False) -> tuple[Any, ...]:
    """The results of cpu_backward, of size 0 (or None where ``lean``) where not wanted.

    Uninitialised but for those of hyperplanes and beta, which no row writes where there is none.
    """
    query, key, value, hyperplanes, beta, log_decay, _, _, _, mass, value_sum = inputs[:11]
    tensors = (query, key, value, hyperplanes, beta, log_decay, mass, value_sum)
    results: list[Tensor | None] = []
    for place, (x, want) in enumerate(zip(tensors, wanted, strict=True)):
        if x is None or not want:
            results.append(None if lean else query.new_empty((0,)))
        elif place < 3:
            results.append(_tokens_like(x, *x.shape))
        else:
            results.append((x.new_zeros if place in (3, 4) else x.new_empty)(x.shape))
    return tuple(results)


def _tokens_like(x: Tensor, *shape: int) -> Tensor:
    """A result [B, T, heads, size] of the dtype of ``x``, uninitialised; a large one in kept memory."""
    here = type(x) is Tensor and x.device.type == "cpu"  # asked first: what is compiled serves all lengths
    if here and math.prod(shape) * x.itemsize >= _LARGE and not _fills_memory():
        capsule = cpu_library.load().lend(shape, *_DLPACK[x.dtype])
        if capsule is not None:
            return torch.utils.dlpack.from_dlpack(capsule)
    return x.new_empty(shape)


def _fills_memory() -> bool:
    """Whether torch was asked to fill new memory with NaN, for tests."""
    fills: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return fills and torch.are_deterministic_algorithms_enabled()


def run_length(buckets: int) -> int:
    """Tokens between the states that the forward keeps for the backward: an eighth of the keys' memory at most.

    Shorter for few buckets, so that a run of the backward stays in the cache; at most 2048, so that sums of equal
    tokens in float32 keep 1e-5.
    """
    return min(max(8 * buckets, 128), 2048)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = _forward_results(*arguments)
    (batch, length, *_), hyperplanes, packed = arguments[0].shape, arguments[3], arguments[7] is not None
    runs = -(-length // run_length(hyperplanes.shape[1] << hyperplanes.shape[2]))
    results[3][0 if packed else batch * max(runs - 1, 0) :].zero_()  # what is not used is the same each time, too
    _call_forward(_verified(arguments[:12]), arguments[12], results)
    return results


def _forward_checked(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The same for inputs that the public call has checked a moment ago."""
    results = _leanest_results(*arguments)
    _call_forward(_readable(arguments[:12]), arguments[12], results)
    return results


def _call_forward(
    inputs: Sequence[Any], return_state: bool, results: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
) -> None:
    out, mass, value_sum, saved = results
    fields = [
        *_common(inputs),
        *_tokens(out),
        _pointer(mass) if return_state else 0,
        _pointer(value_sum) if return_state else 0,
        _pointer(saved),
        *_NO_TOKENS,
        *_NO_STATE,
        *(_NO_TOKENS * 3),
        *((0,) * 5),
    ]
    cpu_library.load().call(False, fields)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    results = _gradients(arguments[:12], arguments[16])
    _call_backward(_verified(arguments[:12]), results, *arguments[12:])
    return results


def _backward_checked(*arguments: Any) -> tuple[Tensor, ...]:
    """The same for inputs that were checked before the forward, and which autograd has watched since."""
    results = _gradients(arguments[:12], arguments[16], lean=True)
    _call_backward(_readable(arguments[:12]), results, *arguments[12:])
    return results


def _call_backward(
    inputs: Sequence[Any],
    results: tuple[Any, ...],
    saved: Tensor | None,
    grad_out: Tensor | None,
    grad_mass: Tensor | None,
    grad_value_sum: Tensor | None,
    wanted: Sequence[bool],
) -> None:
    query, value = inputs[0], inputs[2]
    if grad_out is None:
        grad_out = query.new_zeros(()).expand(*query.shape[:3], value.shape[3])
    # Of torch's complex numbers come views that are only marked as negated: the library would read the opposite.
    grad_out = grad_out.resolve_neg()
    grad_mass, grad_value_sum = (None if x is None else x.resolve_neg() for x in (grad_mass, grad_value_sum))
    dq, dk, dv, dplanes, dbeta, ddecay, dmass, dvalue_sum = results
    fields = [
        *_common(inputs),
        *_NO_TOKENS,
        0,
        0,
        _pointer(saved),
        *_tokens(grad_out),
        *_state(grad_mass, grad_value_sum),
        *(_tokens(dq) if wanted[0] else _NO_TOKENS),
        *(_tokens(dk) if wanted[1] else _NO_TOKENS),
        *(_tokens(dv) if wanted[2] else _NO_TOKENS),
        *map(_pointer, (dplanes, dbeta, ddecay, dmass, dvalue_sum)),
    ]
    cpu_library.load().call(True, fields)


# ---- between tensors and the C interface -------------------------------------------------------------------


def _verified(inputs: Sequence[Any]) -> Sequence[Any]:
    """The inputs as the library may read them. The public call checked them; a call of the operator may not have.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """
    query, key, value, hyperplanes, beta, log_decay, key_mask, cu, cu_key, mass, value_sum, causal = inputs
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4 or hyperplanes.ndim != 4:
        raise ValueError("query, key, value, hyperplanes: allowed are four dimensions each")
    batch, length, heads, dim = query.shape
    keys, groups, dim_v = key.shape[1], key.shape[2], value.shape[3]
    tables, planes = hyperplanes.shape[1:3]
    rows = batch if cu is None else cu.shape[0] - 1
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    states = (rows, groups, tables, 2**planes)
    expected = (
        ("query", query, tuple(query.shape), query.dtype),
        ("key", key, (batch, keys, groups, dim), query.dtype),
        ("value", value, (batch, keys, groups, dim_v), query.dtype),
        ("hyperplanes", hyperplanes, (groups, tables, planes, dim), wide),
        ("beta", beta, (groups,), wide),
        ("log_decay", log_decay, (batch, keys, groups), wide),
        ("key_mask", key_mask, (batch, keys, groups), torch.bool),
        ("initial_mass", mass, states, torch.float64),
        ("initial_value_sum", value_sum, (*states, dim_v), torch.float64),
    )
    for name, x, shape, dtype in expected:
        if x is not None and (x.shape != shape or x.dtype != dtype or x.device.type != "cpu"):
            raise ValueError(
                f"{name}: got {list(x.shape)} {x.dtype} on {x.device}, allowed is {list(shape)} {dtype} on cpu"
            )
    if query.dtype not in _STORES or not 0 < planes <= 10 or tables < 1 or min(dim, dim_v, heads, groups) < 1:
        raise ValueError(f"query: got {query.dtype}, hyperplanes {list(hyperplanes.shape)}: not served by this backend")
    if heads % groups or (causal and keys != length) or (log_decay is not None and not causal):
        raise ValueError(f"query: got {list(query.shape)}, which does not fit key {list(key.shape)}, causal={causal}")
    if (cu is None) != (cu_key is None) or (mass is None) != (value_sum is None):
        raise ValueError("cu_seqlens_key, initial_value_sum: allowed are they and their partners both or neither")
    if cu is not None:
        cu, cu_key = _verified_offsets(cu, length, batch), _verified_offsets(cu_key, keys, batch)
        if cu.shape != cu_key.shape or (causal and not torch.equal(cu, cu_key)):
            raise ValueError("cu_seqlens_key: allowed are as many offsets as cu_seqlens has, and the same if causal")
    return _readable((query, key, value, hyperplanes, beta, log_decay, key_mask, cu, cu_key, mass, value_sum, causal))


def _readable(inputs: Sequence[Any]) -> Sequence[Any]:
    """The inputs as they lie in memory: offsets one after another."""
    query, key, value, hyperplanes, beta, log_decay, key_mask, cu, cu_key, mass, value_sum, causal = inputs
    if cu is not None:
        cu, cu_key = cu.contiguous(), cu_key.contiguous()
    return (query, key, value, hyperplanes, beta, log_decay, key_mask, cu, cu_key, mass, value_sum, causal)


def _verified_offsets(offsets: Tensor, length: int, batch: int) -> Tensor:
    offsets = offsets.to(torch.int64).contiguous()
    given = offsets.tolist()
    if batch != 1 or not given or given[0] != 0 or given[-1] != length or any(b < a for a, b in pairwise(given)):
        raise ValueError(f"cu_seqlens: got {given[:8]}..., allowed rises from 0 to {length}, with a batch of 1")
    return offsets


def _common(inputs: Sequence[Any]) -> list[int]:
    """The first fields of Args, up to the initial state."""
    query, key, value, hyperplanes, beta, log_decay, key_mask, cu, cu_key, mass, value_sum, causal = inputs
    batch, length, heads, dim = query.shape
    tables, planes = hyperplanes.shape[1:3]
    return [
        _STORES[query.dtype],
        torch.get_num_threads(),
        cpu_library.load().isa,
        batch,
        length,
        key.shape[1],
        heads,
        key.shape[2],
        dim,
        value.shape[3],
        tables,
        planes,
        batch if cu is None else cu.shape[0] - 1,
        int(causal),
        run_length(tables << planes),
        *_tokens(query),
        *_tokens(key),
        *_tokens(value),
        hyperplanes.data_ptr(),
        *hyperplanes.stride(),
        beta.data_ptr(),
        *beta.stride(),
        *_strided(log_decay, 3),
        *_strided(key_mask, 3),
        0 if cu is None else cu.data_ptr(),
        0 if cu_key is None else cu_key.data_ptr(),
        *_state(mass, value_sum),
    ]


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _tokens(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride())


def _strided(x: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * (dims + 1) if x is None else (x.data_ptr(), *x.stride())


def _state(mass: Tensor | None, value_sum: Tensor | None) -> tuple[int, ...]:
    return (*_strided(mass, 4), *_strided(value_sum, 5))


# ---- autograd --------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    ctx.set_materialize_grads(False)
    tensors = inputs[:11]
    ctx.given = [x is not None for x in tensors]
    ctx.causal = inputs[11]
    ctx.save_for_backward(*(x for x in tensors if x is not None), output[3])


def _autograd(ctx: Any, grad_out: Tensor | None, grad_mass: Tensor | None, grad_sum: Tensor | None, _: Any) -> Any:
    *tensors, saved = ctx.saved_tensors
    left = iter(tensors)
    inputs = [next(left) if given else None for given in ctx.given]
    needs = ctx.needs_input_grad
    wanted = [bool(needs[n]) for n in (0, 1, 2, 3, 4, 5, 9, 10)]
    # With gradients switched on somebody wants second derivatives: the operator refuses.
    given = (grad_out, grad_mass, grad_sum)
    plain = not torch.is_grad_enabled() and not several_at_once(given) and _plain((*tensors, *given))
    if saved is None and not plain:
        saved = tensors[0].new_empty(0)
    arguments = (*inputs, ctx.causal, saved, grad_out, grad_mass, grad_sum, wanted)
    grads = _backward_checked(*arguments) if plain else torch.ops.race_attention.cpu_backward(*arguments)
    query, key, value, planes, beta, decay, mass, value_sum = (
        grad if want else None for grad, want in zip(grads, wanted, strict=True)
    )
    return query, key, value, planes, beta, decay, None, None, None, mass, value_sum, None, None, None


class _Function(torch.autograd.Function):
    """The operators' autograd without the operators."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        out, mass, value_sum, saved = _forward_checked(*arguments, True)
        _setup_context(ctx, arguments, (out, mass, value_sum, saved))
        return (out, mass, value_sum) if arguments[12] else out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_mass: Any = None, grad_value_sum: Any = None) -> Any:
        return _autograd(ctx, grad_out, grad_mass, grad_value_sum, None)[:-1]


def _no_second_order(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "race_attention's cpu backend has gradients of first order only; backend='reference' is differentiable twice"
    )


torch.library.impl("race_attention::cpu_forward", "CPU", _forward, lib=_library)
torch.library.impl("race_attention::cpu_backward", "CPU", _backward, lib=_library)
torch.library.register_fake("race_attention::cpu_forward", _forward_results, lib=_library)
torch.library.register_fake(
    "race_attention::cpu_backward", lambda *arguments: _gradients(arguments[:12], arguments[16]), lib=_library
)
torch.library.register_autograd("race_attention::cpu_forward", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("race_attention::cpu_backward", _no_second_order, lib=_library)
