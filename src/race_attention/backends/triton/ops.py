"""The operators ``race_attention::triton_forward`` and ``triton_backward``: schema, fakes, autograd.

Nothing here imports Triton; the kernels come with the first launch. The forward pass keeps for the backward pass
its inputs and the state before each run of tokens (causal) or of each row (not), float32; and where its kernels use
them, the inverses of the denominators, both sides' buckets, the sums before each chunk, or out.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from . import plan

#: Operators of the plain kind: ``torch.library.custom_op`` and ``register_autograd`` take 0.2 ms of host time a step
#: more, as long as the kernels of a short sequence.
_library = torch.library.Library("race_attention", "FRAGMENT")
#: Places of chunks that an operator's results have besides: where there can be one alone, or none, a compiler asks
#: whether it is so, and compiles short sequences again.
SPARE = 2
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor hyperplanes, Tensor beta, Tensor? log_decay, Tensor? key_mask, "
    "Tensor? cu_seqlens, Tensor? cu_seqlens_key"
)
_library.define(
    f"triton_forward({_INPUTS}, Tensor? mass, Tensor? value_sum, bool causal, bool final=True) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"triton_backward(Tensor grad_out, Tensor? grad_mass, Tensor? grad_value_sum, {_INPUTS}, Tensor? final_mass, "
    "Tensor? final_value_sum, Tensor? out, Tensor states, Tensor inverses, Tensor features, "
    "Tensor inner, Tensor marks, Tensor fades, bool causal, bool need_planes) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
triton_forward = torch.ops.race_attention.triton_forward.default
triton_backward = torch.ops.race_attention.triton_backward.default


def precision_of(dtype: torch.dtype) -> str:
    """The precision of dots: "bf16", of operands rounded to bfloat16 but for those that must be exact, or "ieee".

    float16 inputs compute in bfloat16 too, since soft buckets need its exponent; where a rounding would be magnified
    (projections, what is subtracted) they are split in two. float32 is always float32: Triton 3.6 compiles products
    of transposed tf32 operands wrongly (errors of 0.3 to 1, seen on an H200), so its leave is not used.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # the interpreter's bfloat16 products are wrong
    return "ieee" if dtype == torch.float32 or interpreted else "bf16"


def shape_of(query: Tensor, value: Tensor, hyperplanes: Tensor) -> plan.Shape:
    return plan.shape_class(
        int(query.shape[3]),
        int(value.shape[3]),
        int(hyperplanes.shape[1]),
        int(hyperplanes.shape[2]),
        query.dtype,
        precision_of(query.dtype),
    )


def _forward_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hyperplanes: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_key: Tensor | None,
    mass: Tensor | None,
    value_sum: Tensor | None,
    causal: bool,
    final: bool = True,
) -> tuple[Tensor, ...]:
    """(out, final mass, final value_sum; for the backward pass states, inverses, features, inner, marks, fades).

    Arguments as ``Call``. Without ``final`` the final state is empty, and packed sequences may go without states.
    """
    from . import passes, replay

    inputs = query, key, value, hyperplanes, beta, log_decay, key_mask, cu_seqlens, cu_seqlens_key, mass, value_sum
    return replay.repeated(passes.forward, inputs, (causal, True, True, final))


@torch.library.register_fake("race_attention::triton_forward", lib=_library)
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hyperplanes: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_key: Tensor | None,
    mass: Tensor | None,
    value_sum: Tensor | None,
    causal: bool,
    final: bool = True,
) -> tuple[Tensor, ...]:
    batch, queries, heads = query.shape[:3]
    groups, value_dim = value.shape[2:]
    tables, planes = hyperplanes.shape[1:3]
    rows, packed = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1, cu_seqlens is not None
    of_rows = (rows, groups, tables, 1 << planes)
    inverses = kept_inverses(query, value, hyperplanes, causal)
    if goes_without_states(shape_of(query, value, hyperplanes), packed, mass, value_sum, final):
        if causal:
            rows, packed, inverses = batch, False, query.new_empty(queries + 1, dtype=torch.int32)
        else:
            rows = plan.long_rows(queries, key.shape[1])
            inverses = query.new_empty(2, rows, 2, dtype=torch.int64)
    inner, marks, fades = kept_chunks(key, value, hyperplanes, rows, log_decay is not None, packed, causal)
    return (
        query.new_empty(batch, queries, heads, value_dim),
        query.new_empty(of_rows if final else 0, dtype=torch.float64),
        query.new_empty((*of_rows, value_dim) if final else 0, dtype=torch.float64),
        kept_states(query, value, hyperplanes, rows, causal, packed, log_decay is not None),
        inverses,
        kept_features(query, key, value, hyperplanes, causal),
        kept_residual(query, value, hyperplanes, inner),
        marks,
        fades,
    )


def goes_without_states(
    shape: plan.Shape, packed: bool, mass: Tensor | None, value_sum: Tensor | None, final: bool
) -> bool:
    """Whether packed sequences are told apart otherwise than by rows of states: see ``launch.Problem.told_apart``."""
    return packed and shape.narrow and mass is None and value_sum is None and not final


def kept_states(
    query: Tensor, value: Tensor, hyperplanes: Tensor, rows: int, causal: bool, packed: bool = False,
    decays: bool = False,
) -> Tensor:  # fmt: skip
    """The buffer for the states that the backward pass needs, [runs or rows, G, S * (Dv + 1)]."""
    shape = shape_of(query, value, hyperplanes)
    groups = value.shape[2]
    count = rows
    if causal:
        longest = plan.causal_run_lengths(shape, decays)[1]
        extra = plan.extra_runs(shape)
        count = plan.capacity(query.shape[0], query.shape[1], rows, int(groups), longest, extra, packed)
    return query.new_empty(count, groups, shape.state_size, dtype=torch.float32)


def clear_spare(kept: Tensor, runs: plan.Runs) -> None:
    """Zeros where no run is: an operator's result is the same every time, all of it. Before the scan fills the rest."""
    (kept if runs.table is not None else kept[runs.count :]).zero_()


def kept_inverses(query: Tensor, value: Tensor, hyperplanes: Tensor, causal: bool) -> Tensor:
    """The buffer for 1 / denominators, [B, H, Tq], where buckets fill several tiles; else empty."""
    batch, queries, heads = query.shape[:3]
    read = not shape_of(query, value, hyperplanes).narrow
    return query.new_empty((batch, heads, queries) if read else (0,), dtype=torch.float32)


def kept_features(
    query: Tensor, key: Tensor, value: Tensor, hyperplanes: Tensor, causal: bool, keep: bool = True
) -> Tensor:
    """The buffer for the keys' buckets, of one tile, [B, G, T, row] as the products take them; else empty.

    Behind all of them, which the backward pass alone reads, the queries' over their denominators, [B, H, T, row], the
    keys' projections, [B, G, T, hash_row], and the queries'.
    """
    shape = shape_of(key, value, hyperplanes)
    batch, keys, groups = key.shape[:3]
    heads, row = (groups + query.shape[2], shape.row + shape.hash_row) if keep else (groups, shape.row)
    size = (batch, keys, heads, row) if causal and shape.narrow else (0,)
    return key.new_empty(size, dtype=shape.operand)


def reads_out(query: Tensor, value: Tensor, hyperplanes: Tensor, causal: bool) -> bool:
    """Whether the backward pass reads out."""
    shape = shape_of(query, value, hyperplanes)
    share = query.shape[2] // value.shape[2]
    return not shape.narrow or (causal and shape.at_once(share))


def kept_chunks(
    key: Tensor, value: Tensor, hyperplanes: Tensor, rows: int, decay: bool, packed: bool, causal: bool,
    keep: bool = True, spare: int = SPARE,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The buffers (inner, marks, fades) of chunks, see plan.py; empty where there are no chunks.

    Only the backward pass reads the first two: without ``keep`` they are empty. ``spare`` places are never used.
    """
    shape = shape_of(key, value, hyperplanes)
    batch, keys, groups = key.shape[:3]
    chunk = shape.chunk if causal else 0
    places = plan.chunk_places(batch, keys, rows, chunk, packed) + spare if keep and chunk else 0
    # Packed rows leave places between them: an operator's result is the same every time, all of it.
    make = key.new_zeros if packed and chunk else key.new_empty
    return (
        make((places, groups, shape.value_dim, shape.row), dtype=shape.operand),
        make((places, groups, shape.row + 8 + plan.power_of_two(shape.value_dim, 16)), dtype=torch.float32),
        make((batch, groups, keys) if decay and chunk else (0,), dtype=torch.float32),
    )


def kept_residual(query: Tensor, value: Tensor, hyperplanes: Tensor, inner: Tensor, keep: bool = True) -> Tensor:
    """In the place of ``inner`` where buckets fill several tiles: what rounding took from a 16-bit out, [B, Tq, H, Dv].

    grad_out . out is subtracted from the gradients of weights, and the rounding of out alone made errors of 2e-2.
    """
    if shape_of(query, value, hyperplanes).narrow or not keep or query.dtype == torch.float32:
        return inner
    return query.new_empty(*query.shape[:3], value.shape[3])


def kept_dtypes(query: Tensor, value: Tensor, hyperplanes: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes of states, inverses, features, inner, marks and fades, of any size: the kernels' types follow them."""
    shape, wide = shape_of(query, value, hyperplanes), torch.float32
    return wide, wide, shape.operand, shape.operand if shape.narrow else query.dtype, wide, wide


def _backward_kernels(
    grad_out: Tensor,
    grad_mass: Tensor | None,
    grad_value_sum: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hyperplanes: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_key: Tensor | None,
    final_mass: Tensor | None,
    final_value_sum: Tensor | None,
    out: Tensor | None,
    states: Tensor,
    inverses: Tensor,
    features: Tensor,
    inner: Tensor,
    marks: Tensor,
    fades: Tensor,
    causal: bool,
    need_planes: bool,
) -> tuple[Tensor, ...]:
    """Gradients of (query, key, value, hyperplanes, beta, log_decay, initial mass, initial value_sum).

    Those of hyperplanes (with ``need_planes`` False) and of a log_decay that is None are empty.
    """
    from . import passes, replay

    inputs = (
        grad_out, grad_mass, grad_value_sum, query, key, value, hyperplanes, beta, log_decay, key_mask, cu_seqlens,
        cu_seqlens_key, final_mass, final_value_sum, out, states, inverses, features, inner, marks, fades,
    )  # fmt: skip
    return replay.repeated(passes.backward, inputs, (causal, need_planes))


@torch.library.register_fake("race_attention::triton_backward", lib=_library)
def _(
    grad_out: Tensor,
    grad_mass: Tensor | None,
    grad_value_sum: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hyperplanes: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_key: Tensor | None,
    final_mass: Tensor | None,
    final_value_sum: Tensor | None,
    out: Tensor | None,
    states: Tensor,
    inverses: Tensor,
    features: Tensor,
    inner: Tensor,
    marks: Tensor,
    fades: Tensor,
    causal: bool,
    need_planes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tables, planes = hyperplanes.shape[1:3]
    groups, value_dim = value.shape[2:]
    nothing = query.new_empty(0, dtype=torch.float32)
    return (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        torch.empty_like(key, memory_format=torch.contiguous_format),
        torch.empty_like(value, memory_format=torch.contiguous_format),
        query.new_empty(hyperplanes.shape, dtype=torch.float32) if need_planes else nothing,
        query.new_empty(beta.shape, dtype=torch.float32),
        nothing.clone() if log_decay is None else query.new_empty(key.shape[:3], dtype=torch.float32),
        query.new_empty(rows, groups, tables, 1 << planes, dtype=torch.float64),
        query.new_empty(rows, groups, tables, 1 << planes, value_dim, dtype=torch.float64),
    )


#: Dynamo looks at every frame that runs below one it has given up on; launches of kernels it would take for the
#: user's own and inspect. (torch.compiler.disable would import Dynamo here, and not at the first call.)
_hidden = _disable_dynamo
for _device in ("CPU", "CUDA", "XPU"):  # on the CPU in Triton's interpreter
    _library.impl("triton_forward", _hidden(_forward_kernels), _device)
    _library.impl("triton_backward", _hidden(_backward_kernels), _device)


#: Which of the operator's arguments ``final`` is.
_FINAL = 12


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            output: tuple[Tensor, ...] = triton_forward(*inputs)
        *tensors, mass, value_sum, ctx.causal = inputs[:_FINAL]
        ctx.count, ctx.wanted = len(inputs), all(inputs[_FINAL:])  # a default is not handed on
        # The gradient of log_decay is anchored at the final state; nothing else needs that.
        final = output[1:3] if inputs[5] is not None and ctx.wanted else (None, None)
        query, value, hyperplanes = inputs[0], inputs[2], inputs[3]
        out = output[0] if reads_out(query, value, hyperplanes, ctx.causal) else None
        ctx.save_for_backward(*tensors, *final, out, *output[3:])
        ctx.initial = None if mass is None else (mass.dtype, value_sum.dtype)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[3:])
        return output

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_mass: Tensor | None, grad_value_sum: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        query, value, log_decay = saved[0], saved[2], saved[5]
        if grad_out is None:
            grad_out = query.new_zeros(*query.shape[:3], value.shape[3])
        need_planes = ctx.needs_input_grad[3]
        if not ctx.wanted:  # of nothing
            grad_mass = grad_value_sum = None
        dq, dk, dv, planes, beta, decay, mass, value_sum = triton_backward(
            grad_out, grad_mass, grad_value_sum, *saved, ctx.causal, need_planes
        )
        return (
            dq,
            dk,
            dv,
            planes if need_planes else None,
            beta,
            None if log_decay is None else decay,
            None,
            None,
            None,
            None if ctx.initial is None else mass.to(ctx.initial[0]),
            None if ctx.initial is None else value_sum.to(ctx.initial[1]),
            None,
            *[None] * (ctx.count - _FINAL),
        )


def _forward_autograd(*inputs: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return _Differentiable.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return triton_forward(*inputs)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return triton_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "race_attention: the triton backend is differentiable once; backend='reference' is any number of times"
        )


def _backward_autograd(*inputs: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return _Once.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return triton_backward(*inputs)


_library.impl("triton_forward", _hidden(_forward_autograd), "Autograd")
_library.impl("triton_backward", _hidden(_backward_autograd), "Autograd")
