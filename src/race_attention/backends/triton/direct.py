"""A call where nobody watches the operators: around torch's dispatcher, with its host code done once a layout.

The dispatcher's way through operators written in Python costs 0.1 to 0.2 ms a forward and backward pass, and the host
code of the passes 0.4 ms more; the kernels of a thousand tokens take 0.1 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from race_attention.backends.call import Call

from . import passes
from .ops import reads_out, triton_backward
from .replay import Bundle, repeated

#: What Dynamo does with each frame that runs, or None.
_frames_seen = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)
Results = tuple[Tensor | None, ...]
#: Among the tensors that passes.backward takes: log_decay, and the first that the forward pass kept besides out.
_DECAY, _KEPT = 8, 15
#: The first of the forward pass's results that the backward pass alone reads.
_OF_FORWARD = 3


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def unwatched(call: Call) -> bool:
    """Whether nobody watches a call's operators."""
    return _unwatched(_inputs(call))


def _unwatched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether there is no compiler, mode, transform or subclass of Tensor that has to see the operators."""
    if torch.compiler.is_compiling() or _frames_seen() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return False
    if torch._C._functorch.maybe_current_level() is not None or torch._C._len_torch_function_stack():
        return False
    if forward_ad._current_level >= 0:
        return False
    return _PLAIN.issuperset(map(type, tensors))


def run(call: Call) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, mass, value_sum) of a call that is :func:`unwatched`; the states None if not wanted."""
    inputs = _inputs(call)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        results = _Function.apply(*inputs, call.causal, call.return_state)
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
    state, kept = arguments[-2:]
    inputs = [*arguments[:-2], kept]
    results: Results = passes.forward(*inputs)
    state = state or (kept and arguments[5] is not None)  # the gradient of log_decay is anchored at the final state
    final = results[1:3] if state else (None, None)
    return results[0], *final, *[x if kept and x is not None and x.numel() else None for x in results[3:]]


def _backward(*arguments: Any) -> Results:
    """What passes.backward returns; None for the gradients of what was not given."""
    *inputs, initial, causal, need_planes, layout = arguments
    if layout is not None:
        *inputs, memory = inputs
        inputs += layout.tensors(memory)
    return _gradients(passes.backward, inputs, initial, causal, need_planes)


def _gradients(
    backward: Callable[..., Any], inputs: Sequence[Any], initial: bool, causal: bool, need_planes: bool
) -> Results:
    given, kept = inputs[:_KEPT], inputs[_KEPT:]
    kept = [given[0].new_empty(0) if x is None else x for x in kept]
    dq, dk, dv, planes, beta, decay, mass, value_sum = backward(*given, *kept, causal, need_planes)
    state = (mass, value_sum) if initial else (None, None)
    return dq, dk, dv, planes if need_planes else None, beta, None if given[_DECAY] is None else decay, *state


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *inputs, ctx.causal, state = arguments
        out, mass, value_sum, *kept = repeated(_forward, inputs, (ctx.causal, state, True), kept=_OF_FORWARD)
        *tensors, initial, initial_sums = inputs
        final = (None, None) if inputs[5] is None else (mass, value_sum)
        ctx.layout = None
        if type(kept[0]) is Bundle:
            ctx.layout, kept = kept[0].layout, [kept[0].memory]
        query, value, hyperplanes, log_decay = inputs[0], inputs[2], inputs[3], inputs[5]
        read = reads_out(query, value, hyperplanes, log_decay, ctx.causal)
        ctx.save_for_backward(*tensors, *final, out if read else None, *kept)
        ctx.initial = None if initial is None else (initial.dtype, initial_sums.dtype)
        ctx.set_materialize_grads(False)
        return (out, mass, value_sum) if state else out

    @staticmethod
    def backward(ctx: Any, grad_out: Any, grad_mass: Any = None, grad_value_sum: Any = None) -> Any:
        saved = ctx.saved_tensors
        if grad_out is None:
            query, value = saved[0], saved[2]
            grad_out = query.new_zeros(*query.shape[:3], value.shape[3])
        inputs = (grad_out, grad_mass, grad_value_sum, *saved)
        flags = ctx.initial is not None, ctx.causal, ctx.needs_input_grad[3]
        if torch.is_grad_enabled() or not _unwatched(inputs):
            if ctx.layout is not None:
                inputs = (*inputs[:-1], *ctx.layout.tensors(inputs[-1]))
            results: Sequence[Any] = _gradients(triton_backward, inputs, *flags)
        else:
            results = repeated(_backward, inputs, (*flags, ctx.layout), at_once=ctx.layout is not None)
        dq, dk, dv, planes, beta, decay, mass, value_sum = results
        if ctx.initial is not None:
            mass, value_sum = mass.to(ctx.initial[0]), value_sum.to(ctx.initial[1])
        return dq, dk, dv, planes, beta, decay, None, None, None, mass, value_sum, None, None
