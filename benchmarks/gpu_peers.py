"""What the GPU benchmark calls: RACE Attention, and what it is compared with, each as a callable step."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from race_attention import race_attention

HEADS, DIM = 4, 128
CONFIGURATIONS = ((2, 2), (3, 3), (4, 4))  # (P, L)
EXACT = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
Step = Callable[[], Any]


def tokens_of(tokens: int, heads: int, grad: bool, dim: int = DIM) -> Tensor:
    x = torch.randn(1, tokens, heads, dim, dtype=torch.bfloat16, device="cuda")
    return x.requires_grad_(grad)


class Race:
    """A call of ``race_attention`` at (P, L), forward alone or with its backward pass; beta learns, hyperplanes do not.

    ``backend="reference"`` is plain torch. ``lengths``, which add up to ``tokens``, are of packed sequences.
    """

    def __init__(
        self, planes: int, tables: int, tokens: int, causal: bool, backward: bool, heads: int = HEADS,
        decay: bool = False, backend: str = "triton", lengths: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.inputs = [tokens_of(tokens, heads, backward) for _ in range(3)]
        self.planes = torch.randn(heads, tables, planes, DIM, device="cuda") * DIM**-0.5
        self.beta = torch.full((heads,), 4.0, device="cuda", requires_grad=backward)
        self.decay = -0.01 * torch.rand(1, tokens, heads, device="cuda") if decay else None
        if self.decay is not None and backward:
            self.decay.requires_grad_()
        self.bounds = torch.tensor((0, *lengths), device="cuda").cumsum(0) if lengths else None
        self.causal, self.backward, self.backend = causal, backward, backend
        self.grad = torch.randn_like(self.inputs[2]) if backward else None

    def __call__(self) -> Any:
        out = race_attention(
            *self.inputs, self.planes, self.beta, log_decay=self.decay, causal=self.causal, cu_seqlens=self.bounds,
            backend=self.backend,
        )  # fmt: skip
        if not self.backward:
            return out
        wanted = [*self.inputs, self.beta] + ([] if self.decay is None else [self.decay])
        return torch.autograd.grad(out, wanted, self.grad)


class Exact:
    """torch's exact attention with one of the backends of EXACT; "flash" is FlashAttention-2."""

    def __init__(self, backend: str, tokens: int, causal: bool, backward: bool, heads: int = HEADS) -> None:
        inputs = [tokens_of(tokens, heads, False).transpose(1, 2) for _ in range(3)]
        self.inputs = [x.requires_grad_(backward) for x in inputs]  # leaves, which a graph can capture
        self.grad = torch.randn_like(self.inputs[2]) if backward else None
        self.backend, self.causal, self.backward = EXACT[backend], causal, backward

    def __call__(self) -> Any:
        with sdpa_kernel(self.backend):
            query, key, value = self.inputs
            out = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return torch.autograd.grad(out, self.inputs, self.grad) if self.backward else out


class Nothing:
    """An autograd function that does nothing, forward and backward: what no such function is without."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    def __init__(self) -> None:
        self.x = tokens_of(16, HEADS, True)
        self.grad = torch.randn_like(self.x)

    def __call__(self) -> Any:
        return torch.autograd.grad(self.Function.apply(self.x), self.x, self.grad)


class Linear:
    """flash-linear-attention on positive features of ``buckets`` numbers a token, as many as RACE has buckets.

    The features are given, not computed from queries and keys of 128 numbers: it has less to do.
    """

    KINDS = ("linear, normalised", "linear")
    GATED = ("simple_gla", "gla")

    def __init__(self, kind: str, buckets: int, tokens: int, backward: bool, heads: int = HEADS) -> None:
        self.query, self.key = (
            tokens_of(tokens, heads, False, buckets).abs_().requires_grad_(backward) for _ in range(2)
        )
        self.value = tokens_of(tokens, heads, backward)
        self.grad = torch.randn_like(self.value) if backward else None
        gate = {"simple_gla": (1, tokens, heads), "gla": (1, tokens, heads, buckets)}.get(kind)
        self.gate = None if gate is None else (-0.01 * torch.rand(gate, device="cuda")).requires_grad_(backward)
        self.kind, self.backward = kind, backward

    def __call__(self) -> Any:
        from fla.ops.gla import chunk_gla
        from fla.ops.linear_attn import chunk_linear_attn
        from fla.ops.simple_gla import chunk_simple_gla

        inputs = [self.query, self.key, self.value]
        if self.gate is None:
            out, _ = chunk_linear_attn(*inputs, normalize=self.kind.endswith("normalised"))
        else:
            inputs.append(self.gate)
            out, _ = (chunk_simple_gla if self.kind == "simple_gla" else chunk_gla)(*inputs)
        return torch.autograd.grad(out, inputs, self.grad) if self.backward else out


class Candidates:
    """A call of :class:`Linear` that compiles a share of the configurations its autotuner tries, and times none.

    Processes with a share each fill Triton's cache on disk at the same time; tuned in one process, compiling them one
    after the other takes minutes. The version of ptxas is in the cache's keys, and Triton asks for it at a process'
    first kernel: that is one of RACE's where rows are timed, so its answer is given here too.
    """

    def __init__(self, share: int, shares: int, *arguments: Any) -> None:
        self.share, self.shares, self.arguments = share, shares, arguments

    def __call__(self) -> None:
        from triton.compiler.compiler import make_backend
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.driver import driver

        from race_attention.backends.triton import start

        with start._compiling():
            make_backend(driver.active.get_current_target()).hash()
        share, shares = self.share, self.shares

        def compiled(tuner: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
            place = tuner.configs.index(config)
            if place % shares == share:
                with contextlib.suppress(Exception):  # the autotuner leaves out those that do not compile
                    tuner.fn.run(*args, **(meta | config.all_kwargs() | {"warmup": True}))
            return [float(place)] * 3  # the first is the best: what comes after has something to go on with

        def not_written(tuner: Any, key: Any, configs: Any, timed: Callable[[], None]) -> bool:
            timed()
            return False

        Autotuner._bench, Autotuner.check_disk_cache = compiled, not_written
        Linear(*self.arguments)()


def has_linear() -> bool:
    return importlib.util.find_spec("fla") is not None
