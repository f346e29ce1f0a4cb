"""What a backend is given: one checked call, with every optional form brought to one shape.

Shape letters, used throughout the package:

    B  batch            Tq, Tk  queries, keys          H  query heads    G  key heads, H = G * n
    D  head size        Dv      value size             L  tables         P  planes a table
    R  2**P buckets     S       L * R                  N  chunks         C  tokens a chunk
    rows  B, or the number of packed sequences
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad


@dataclass(frozen=True)
class Call:
    """A call of :func:`race_attention.race_attention` after its checks.

    Query head ``h`` reads key head ``h // (H // G)``. Bucket ``r`` of a table is the corner whose sign for
    plane ``p`` is +1 where bit ``p`` of ``r`` is set and -1 where it is not.

    The state before the first token, ``initial_mass`` and ``initial_value_sum``, and the final state that
    ``run`` returns are float64 (float32 on devices without float64): sums over 2**27 tokens need it.
    """

    query: Tensor  # [B, Tq, H, D], any strides
    key: Tensor  # [B, Tk, G, D], the query's dtype
    value: Tensor  # [B, Tk, G, Dv], the query's dtype
    hyperplanes: Tensor  # [G, L, P, D], multiplied by scale; float32, or float64 for float64 queries
    beta: Tensor  # [G], the hyperplanes' dtype
    causal: bool = False
    log_decay: Tensor | None = None  # [B, Tk, G], stride 0 where constant; the hyperplanes' dtype
    key_mask: Tensor | None = None  # [B, Tk, G] bool, True takes part; stride 0 where shared by the heads
    cu_seqlens: Tensor | None = None  # [rows + 1] int64, on the query's device; B == 1
    cu_seqlens_key: Tensor | None = None  # likewise for the keys; never None where cu_seqlens is given
    initial_mass: Tensor | None = None  # [rows, G, L, R]
    initial_value_sum: Tensor | None = None  # [rows, G, L, R, Dv]
    return_state: bool = False
    readout: str = "global"  # or "bucket"

    @property
    def rows(self) -> int:
        """Sequences: the batch, or the packed ones."""
        return self.query.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def differentiated_otherwise(self) -> bool:
        """Whether somebody wants derivatives that operators with a backward pass of first order do not give.

        These are forward mode and torch.func's grad and jvp. torch does not refuse forward mode through such an
        operator: the derivative would be zero without a word. vmap is another matter, and served.
        """
        if torch.compiler.is_compiling():
            return False
        if torch._C._functorch.maybe_current_level() is not None:
            stack = torch._C._functorch.get_interpreter_stack() or ()
            return any(level.key() != torch._C._functorch.TransformType.Vmap for level in stack)
        if forward_ad._current_level < 0:
            return False
        tensors = (x for x in vars(self).values() if isinstance(x, Tensor))
        return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def several_at_once(gradients: Iterable[Tensor | None]) -> bool:
    """Whether torch hands down a batch of gradients as one (``is_grads_batched``), which operators alone take apart."""
    return any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in gradients)


#: What a backend says of a call that is ``differentiated_otherwise``.
OTHERWISE = "derivatives in forward mode and those of torch.func are the reference's alone"
