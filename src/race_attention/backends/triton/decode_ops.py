"""The operator ``race_attention::triton_decode``: one token. Nothing here imports Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from race_attention.backends.call import Call

_library = torch.library.Library("race_attention", "FRAGMENT")
_library.define(
    "triton_decode(Tensor query, Tensor key, Tensor value, Tensor hyperplanes, Tensor beta, Tensor? log_decay, "
    "Tensor mass, Tensor value_sum) -> (Tensor, Tensor, Tensor)"
)
triton_decode = torch.ops.race_attention.triton_decode.default


def serves(call: Call) -> bool:
    """Whether the call is one step of decoding: a token a row after a state, and no gradients."""
    if not (call.causal and call.return_state and call.query.shape[1] == 1):
        return False
    if call.initial_mass is None or call.key_mask is not None or call.cu_seqlens is not None:
        return False
    inputs: list[Tensor | None] = [call.query, call.key, call.value, call.hyperplanes, call.beta, call.log_decay]
    inputs += [call.initial_mass, call.initial_value_sum]
    return not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs))


def run(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mass, value_sum) of a call that :func:`serves` allows."""
    log_decay = None if call.log_decay is None else call.log_decay[:, 0]
    out, mass, value_sum = triton_decode(
        call.query[:, 0], call.key[:, 0], call.value[:, 0], call.hyperplanes, call.beta, log_decay,
        call.initial_mass, call.initial_value_sum,
    )  # fmt: skip
    return out.unsqueeze(1), mass, value_sum


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, hyperplanes: Tensor, beta: Tensor, log_decay: Tensor | None,
    mass: Tensor, value_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from .decode import decode

    return decode(query, key, value, hyperplanes, beta, log_decay, mass, value_sum)


@torch.library.register_fake("race_attention::triton_decode", lib=_library)
def _(
    query: Tensor, key: Tensor, value: Tensor, hyperplanes: Tensor, beta: Tensor, log_decay: Tensor | None,
    mass: Tensor, value_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    return out, mass.new_empty(mass.shape), value_sum.new_empty(value_sum.shape)


for _device in ("CPU", "CUDA", "XPU"):  # on the CPU in Triton's interpreter
    _library.impl("triton_decode", _disable_dynamo(_kernel), _device)  # as in ops.py
