"""A call where nobody watches the operators: around torch's dispatcher, with its host code done once a layout.

The dispatcher's way through operators written in Python costs 0.1 to 0.2 ms a forward and backward pass, and the host
code of the passes 0.4 ms more; the kernels of a thousand tokens take 0.1 ms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from race_attention.backends.call import Call, several_at_once

from . import passes, plan, replay
from .memory import Bundle
from .ops import kept_dtypes, reads_out, shape_of, triton_backward
from .replay import Replay, key_of_aligned, recording_of, repeated

#: What Dynamo does with each frame that runs, or None.
_frames_seen = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)
Results = tuple[Tensor | None, ...]
#: Among the tensors that passes.backward takes: log_decay, and the first that the forward pass kept besides out.
_QUERY, _VALUE, _HYPERPLANES, _DECAY, _KEPT = 3, 5, 6, 8, 15
#: The first of the forward pass's results that the backward pass alone reads.
_OF_FORWARD = 3


#: Of a call's inputs, the hyperplanes, and the first that is an option; how many there are.
_PLANES, _OPTIONS, _ALL = 3, 5, 11
_BOUNDS = 7
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def unwatched(call: Call) -> bool:
    """Whether nobody watches a call's operators."""
    return not _watched() and _PLAIN.issuperset(map(type, _inputs(call)))


def _watched() -> bool:
    """Whether there is a compiler, mode or transform that has to see the operators."""
    return (
        torch.compiler.is_compiling()
        or _frames_seen() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._len_torch_function_stack() > 0
        or forward_ad._current_level >= 0
    )


def run(call: Call) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, mass, value_sum) of a call that is :func:`unwatched`; the states None if not wanted."""
    inputs = _inputs(call)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        results = _Function.apply(_way(call), None, *inputs[: _count(inputs)])
        return results if call.return_state else (results, None, None)
    out, mass, value_sum = repeated(_forward, inputs, (call.causal, call.return_state, False))[:3]
    assert out is not None
    return out, mass, value_sum


def _inputs(call: Call) -> tuple[Tensor | None, ...]:
    return (
        call.query, call.key, call.value, call.hyperplanes, call.beta, call.log_decay, call.key_mask, call.cu_seqlens,
        call.cu_seqlens_key, call.initial_mass, call.initial_value_sum,
    )  # fmt: skip


def _forward(*arguments: Any) -> Results:
    """What passes.forward returns, of it what is wanted: the final state, and what the backward pass reads.

    None also for what the kernels of this shape do not keep.
    """
    *inputs, causal, state, kept = arguments
    query, key, value, hyperplanes, bounds = *inputs[:4], inputs[_BOUNDS]
    final = state
    if bounds is not None:  # what packed sequences go without depends on whether somebody wants their states
        tokens = max(query.shape[1], key.shape[1])
        final = state or not plan.apart(shape_of(query, value, hyperplanes), bounds.shape[0] - 1, tokens, causal)
    inputs += [causal, kept, False, final]
    results: Results = passes.forward(*inputs)
    final = results[1:3] if state else (None, None)
    return results[0], *final, *[x if kept and x is not None and x.numel() else None for x in results[3:]]


def _backward(*arguments: Any) -> Results:
    """What passes.backward returns; None for the gradients of what was not given."""
    *inputs, initial, causal, need_planes, layout = arguments
    if layout is not None:
        *inputs, memory = inputs
        inputs += layout.tensors(memory)
    return _gradients(partial(passes.backward, final=initial), inputs, initial, causal, need_planes)


def _gradients(
    backward: Callable[..., Any], inputs: Sequence[Any], initial: bool, causal: bool, need_planes: bool
) -> Results:
    given, kept = inputs[:_KEPT], inputs[_KEPT:]
    if any(x is None for x in kept):
        dtypes = kept_dtypes(given[_QUERY], given[_VALUE], given[_HYPERPLANES])
        kept = [given[0].new_empty(0, dtype=d) if x is None else x for x, d in zip(kept, dtypes, strict=True)]
    dq, dk, dv, planes, beta, decay, mass, value_sum = backward(*given, *kept, causal, need_planes)
    state = (mass, value_sum) if initial else (None, None)
    return dq, dk, dv, planes if need_planes else None, beta, None if given[_DECAY] is None else decay, *state


@dataclass(frozen=True)
class _Way:
    """How the forward pass of a call is done: with these flags, by a recording where there is one.

    ``reads_out``: whether the backward pass does.
    """

    causal: bool
    state: bool
    reads_out: bool
    again: Replay | None = None
    generation: int = 0


class Prepared:
    """Calls of one layout: once that is recorded, no more is done than to start it.

    That is where all tensors begin at multiples of 16 bytes, as torch's own do, and nobody watches.
    """

    def __init__(self, call: Call) -> None:
        inputs = _inputs(call)
        self.count = _count(inputs)
        self.keys = [key_of_aligned(_forward, (call.causal, False, keep), inputs) for keep in (False, True)]
        self.ways = [_way(call)] * 2

    def __call__(self, given: Sequence[Tensor | None]) -> Tensor | None:
        inputs = given[: self.count]
        keep = torch.is_grad_enabled() and True in [x is not None and x.requires_grad for x in inputs]
        way = self.ways[keep]
        if way.again is None or way.generation != replay.generation:
            again = recording_of(self.keys[keep])
            self.ways[keep] = way = dataclasses.replace(way, again=again, generation=replay.generation)
        if way.again is None or _watched():
            return None
        addresses = [0 if x is None else x.data_ptr() for x in inputs]
        addresses += [0] * (_ALL - len(inputs))
        if any(map((15).__and__, addresses)):
            return None
        if keep:
            out: Tensor = _Function.apply(way, addresses, *inputs)
            return out
        return way.again((*inputs, *(None,) * (_ALL - len(inputs))), addresses)[0]


def _way(call: Call) -> _Way:
    read = reads_out(call.query, call.value, call.hyperplanes, call.causal)
    return _Way(call.causal, call.return_state, read)


def _count(inputs: Sequence[Tensor | None]) -> int:
    """How many of the first of a call's inputs autograd has to see: it looks at each, twice."""
    return _ALL if any(x is not None for x in inputs[_OPTIONS:]) else _OPTIONS


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        way, addresses, *inputs = arguments
        inputs += [None] * (_ALL - len(inputs))
        if way.again is None or addresses is None:
            results = repeated(_forward, inputs, (way.causal, way.state, True), kept=_OF_FORWARD)
        else:
            results = way.again(inputs, addresses)
        out, mass, value_sum, *kept = results
        *tensors, initial, initial_sums = inputs
        final = (None, None) if inputs[5] is None else (mass, value_sum)
        ctx.layout = None
        if type(kept[0]) is Bundle:
            ctx.layout, kept = kept[0].layout, [kept[0].memory]
        saved = (*tensors, *final, out if way.reads_out else None, *kept)
        ctx.save_for_backward(*saved)
        ctx.addresses = [0 if x is None else x.data_ptr() for x in saved]
        ctx.causal, ctx.initial = way.causal, None
        if initial is not None and initial_sums is not None:
            ctx.initial = initial.dtype, initial_sums.dtype
        ctx.set_materialize_grads(False)
        return (out, mass, value_sum) if way.state else out

    @staticmethod
    def backward(ctx: Any, grad_out: Any, grad_mass: Any = None, grad_value_sum: Any = None) -> Any:
        saved = ctx.saved_tensors
        if grad_out is None:
            query, value = saved[0], saved[2]
            grad_out = query.new_zeros(*query.shape[:3], value.shape[3])
        # Of torch's complex numbers come views that are only marked as negated: kernels would read the opposite.
        given = tuple(
            x.resolve_neg() if x is not None and x.is_neg() else x for x in (grad_out, grad_mass, grad_value_sum)
        )
        need_planes = ctx.needs_input_grad[2 + _PLANES]
        results: Sequence[Any]
        plain = _PLAIN.issuperset(map(type, (*given, *saved))) and not several_at_once(given)
        if torch.is_grad_enabled() or _watched() or not plain:
            results = _operator_of(ctx, given, saved, need_planes)
        else:
            results = _again(ctx, given, saved, need_planes)
        dq, dk, dv, planes, beta, decay, mass, value_sum = results
        if ctx.initial is not None:
            assert mass is not None
            assert value_sum is not None
            mass, value_sum = mass.to(ctx.initial[0]), value_sum.to(ctx.initial[1])
        grads = None, None, dq, dk, dv, planes, beta, decay, None, None, None, mass, value_sum
        return grads[: len(ctx.needs_input_grad)]


def _operator_of(ctx: Any, given: Results, saved: Sequence[Any], need_planes: bool) -> Results:
    """The gradients by the operator, which others may watch."""
    inputs = (*given, *saved)
    if ctx.layout is not None:
        inputs = (*inputs[:-1], *ctx.layout.tensors(inputs[-1]))
    return _gradients(triton_backward, inputs, ctx.initial is not None, ctx.causal, need_planes)


def _again(ctx: Any, given: Results, saved: Sequence[Any], need_planes: bool) -> Results:
    """The gradients from a recording, where there is one.

    What the forward pass saved lies as it did then where it lies at the same addresses: its layout is not looked at.
    """
    flags = ctx.initial is not None, ctx.causal, need_planes, ctx.layout
    if ctx.layout is None:
        return repeated(_backward, (*given, *saved), flags)
    addresses = [0 if x is None else x.data_ptr() for x in given]
    name = need_planes, *[
        None if x is None else (x.shape, x.stride(), x.dtype, address & 15)
        for x, address in zip(given, addresses, strict=True)
    ]  # fmt: skip
    found = ctx.layout.after.get(name)
    of_saved = [0 if x is None else x.data_ptr() for x in saved]
    if found is not None and of_saved == ctx.addresses:
        return found((*given, *saved), addresses + of_saved)
    return repeated(_backward, (*given, *saved), flags, at_once=(ctx.layout.after, name))
