"""Times a handful of configurations for a shape class on the GPU at hand and writes the user's own table.

python -m race_attention.backends.triton.autotune --dim 128 --planes 4 --tables 4 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from . import configs, plan
from .configs import Config
from .ops import precision_of, triton_forward

#: (block, warps, stages) worth a try anywhere.
CANDIDATES = tuple(
    Config(*c) for c in ((64, 4, 1), (64, 4, 2), (32, 4, 1), (32, 4, 2), (32, 2, 2), (16, 4, 2), (16, 2, 2))
)


@contextmanager
def _trying(trial: dict[str, Config]) -> Iterator[None]:
    before = dict(configs._trial)
    configs._trial.update(trial)
    plan.forget()
    try:
        yield
    finally:
        configs._trial.clear()
        configs._trial.update(before)
        plan.forget()


def autotune(
    dim: int,
    value_dim: int,
    tables: int,
    planes: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    tokens: int = 1 << 18,
    heads: int = 4,
    candidates: tuple[Config, ...] = CANDIDATES,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Finds the fastest configuration of every kernel of a shape class, one kernel at a time.

    Args:
        dim, value_dim, tables, planes, dtype: the shape class.
        tokens, heads: of the timed call; long enough to fill the GPU.
        candidates: tried for each kernel. One that does not compile or does not fit is passed over.
        report: gets a line a kernel.

    Returns:
        The path of the user's table, with this shape class added.

    Raises:
        ValueError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("autotune: got a machine without a GPU that torch sees, allowed is one with")
    shape = plan.shape_class(dim, value_dim, tables, planes, dtype, precision_of(dtype))
    padded = plan.power_of_two(dim, 16), plan.power_of_two(value_dim, 16)
    found: dict[str, Config] = {}
    for kernel in configs.KERNELS:
        name = configs.key(kernel, *padded, shape.tile, dtype)
        times: dict[Config, float] = {}
        for candidate in candidates:
            try:
                with _trying({**found, name: candidate}):
                    times[candidate] = _time(kernel, shape, tokens, heads)
            except Exception as error:  # Triton raises what it likes where a configuration does not fit
                report(f"{name}: {candidate} passed over, {type(error).__name__}")
        if times:
            found[name] = min(times, key=lambda c: times[c])
            report(f"{name}: {found[name]}, {times[found[name]]:.3f} ms")
    return configs.write_users_table(found, torch.cuda.get_device_name())


def _time(kernel: str, shape: plan.Shape, tokens: int, heads: int) -> float:
    """The median time in milliseconds of a forward pass, or forward and backward, that the kernel takes part in."""
    causal = not kernel.startswith("full")
    forward_only = kernel in ("accumulate", "causal_readout", "full_readout")
    device = torch.device("cuda")

    def tokens_of(size: int) -> Tensor:
        return torch.randn(1, tokens, heads, size, device=device, dtype=shape.dtype, requires_grad=not forward_only)

    query, key, value = tokens_of(shape.dim), tokens_of(shape.dim), tokens_of(shape.value_dim)
    planes = torch.randn(heads, shape.tables, shape.planes, shape.dim, device=device) * shape.dim**-0.5
    beta = torch.full((heads,), 4.0, device=device)
    grad = torch.randn_like(value)

    def step() -> None:
        out = triton_forward(query, key, value, planes, beta, None, None, None, None, None, None, causal)[0]
        if not forward_only:
            torch.autograd.grad(out, (query, key, value), grad)

    times = []
    for turn in range(8):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        if turn > 2:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--value-dim", type=int, default=None)
    parser.add_argument("--planes", type=int, default=4)
    parser.add_argument("--tables", type=int, default=4)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    given = parser.parse_args()
    value_dim = given.dim if given.value_dim is None else given.value_dim
    path = autotune(given.dim, value_dim, given.tables, given.planes, getattr(torch, given.dtype), report=_say)
    _say(str(path))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
