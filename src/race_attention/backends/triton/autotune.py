"""Times a handful of configurations for a shape class on the GPU at hand and writes the user's own table.

A configuration that is compiled wrongly is not hypothetical (see start.py): each has to give the oracle's results,
within the error budget, before it is timed.

python -m race_attention.backends.triton.autotune --dim 128 --planes 4 --tables 4 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from race_attention.testing import BUDGETS, oracle, relative_error

from . import configs, plan, replay
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
    _forget()
    try:
        yield
    finally:
        configs._trial.clear()
        configs._trial.update(before)
        _forget()


def _forget() -> None:
    plan.forget()
    replay.forget()


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
    workers: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Finds the fastest configuration of every kernel of a shape class, one kernel at a time.

    Args:
        dim, value_dim, tables, planes, dtype: the shape class.
        tokens, heads: of the timed call; long enough to fill the GPU.
        candidates: tried for each kernel. One that does not compile or does not fit is passed over.
        workers: processes that compile ahead; as many as there are processors, 16 at most, where not given.
        report: gets a line a kernel.

    Returns:
        The path of the user's table, with this shape class added. Where buckets fill several tiles nothing is: their
        configurations are in wide_configs.py.

    Raises:
        ValueError: there is no GPU.
        RuntimeError: a configuration has left the GPU unusable for this process.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        raise ValueError("autotune: got a machine without a GPU that torch sees, allowed is one with")
    shape = plan.shape_class(dim, value_dim, tables, planes, dtype, precision_of(dtype))
    padded = plan.power_of_two(dim, 16), plan.power_of_two(value_dim, 16)
    names = {
        kernel: configs.key(kernel, *padded, shape.tile, dtype) for kernel in (configs.KERNELS if shape.narrow else ())
    }
    jobs = [(kernel, name, candidate) for kernel, name in names.items() for candidate in candidates]
    broken = {} if interpreted or not jobs else _compile_ahead(jobs, shape, workers, report)
    found: dict[str, Config] = {}
    for kernel, name in names.items():
        times: dict[Config, float] = {}
        for candidate in candidates:
            why = broken.get((name, candidate))
            if why is None:
                try:
                    with _trying({**found, name: candidate}):
                        wrong = _wrong(kernel, shape)
                        if wrong is None:
                            times[candidate] = _time(_Step(kernel, shape, tokens, heads))
                        else:
                            why = f"wrong: {wrong}"
                except Exception as error:  # Triton raises what it likes where a configuration does not fit
                    why = type(error).__name__
                    _still_usable(f"{name}: {candidate}")
            if why is not None:
                report(f"{name}: {candidate} passed over, {why}")
        if times:
            found[name] = min(times, key=lambda c: times[c])
            report(f"{name}: {found[name]}, {times[found[name]]:.3f} ms")
    return configs.write_users_table(found, "Triton's interpreter" if interpreted else torch.cuda.get_device_name())


def _still_usable(after: str) -> None:
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise RuntimeError(f"autotune: {after} has left the GPU unusable for this process: {error}") from error


_Job = tuple[str, str, Config]


def _compile_ahead(
    jobs: list[_Job], shape: plan.Shape, workers: int | None, report: Callable[[str], None]
) -> dict[tuple[str, Config], str]:
    """Fills Triton's cache on disk in several processes; returns the configurations that broke one of them.

    Compiling one after the other takes ten times as long as all the timing.
    """
    begin = time.perf_counter()
    about = (shape.dim, shape.value_dim, shape.tables, shape.planes, shape.dtype, shape.precision)
    count = workers or min(16, os.cpu_count() or 1, len(jobs))
    broken: dict[tuple[str, Config], str] = {}
    try:
        with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
            for (_, name, candidate), why in zip(jobs, pool.map(functools.partial(_tried, about), jobs), strict=True):
                if why is not None:
                    broken[name, candidate] = why
    except BrokenProcessPool:
        report("a process that compiled ahead has died: the rest is compiled as it is timed")
    report(f"compiled ahead in {time.perf_counter() - begin:.0f} s")
    return broken


def _tried(about: tuple[int, int, int, int, torch.dtype, str], job: _Job) -> str | None:
    """Calls a kernel with a configuration; says so where the device is unusable afterwards."""
    kernel, name, candidate = job
    if _unusable(None):
        return None  # another one has broken this process: nothing is known of this one
    shape = plan.shape_class(*about)
    try:
        with _trying({name: candidate}):
            step = _Step(kernel, shape, _CHECKED, 2)
            step()
    except Exception as error:  # which the timing meets again, and reports
        return _unusable(error)
    return _unusable(None)


def _unusable(error: Exception | None) -> str | None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as after:
        return f"the GPU was unusable after it: {error or after}"
    return None


_FORWARD = ("causal_key_states", "causal_readout", "full_accumulate", "full_readout")


class _Step:
    """A forward pass, or forward and backward, that a kernel takes part in."""

    def __init__(self, kernel: str, shape: plan.Shape, tokens: int, heads: int) -> None:
        self.causal = kernel.startswith("causal")
        self.backward = kernel not in _FORWARD
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        generator = torch.Generator(device=device).manual_seed(0)

        def numbers(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        sizes = (shape.dim, shape.dim, shape.value_dim)
        self.inputs = [numbers(1, tokens, heads, size).to(shape.dtype).requires_grad_(self.backward) for size in sizes]
        self.planes = numbers(heads, shape.tables, shape.planes, shape.dim) * shape.dim**-0.5
        self.beta = torch.full((heads,), 4.0, device=device)
        self.grad = numbers(1, tokens, heads, shape.value_dim).to(shape.dtype)

    def __call__(self) -> list[Tensor]:
        nothing = (None, None, None, None, None, None)
        out = triton_forward(*self.inputs, self.planes, self.beta, *nothing, self.causal)[0]
        return [out, *torch.autograd.grad(out, self.inputs, self.grad)] if self.backward else [out]

    def right(self) -> list[Tensor]:
        """The same by the oracle in float64."""
        query, key, value = inputs = [x.detach().double().requires_grad_(self.backward) for x in self.inputs]
        out = oracle(query, key, value, self.planes, self.beta, causal=self.causal)
        return [out, *torch.autograd.grad(out, inputs, self.grad.double())] if self.backward else [out]


@functools.lru_cache(maxsize=4)
def _right(causal: bool, backward: bool, shape: plan.Shape) -> list[Tensor]:
    kernel = ("causal" if causal else "full") + ("_query_gradient" if backward else "_readout")
    return _Step(kernel, shape, _CHECKED, 2).right()


#: Tokens of the call that is compared with the oracle: several blocks, and part of one.
_CHECKED = 333


def _wrong(kernel: str, shape: plan.Shape) -> str | None:
    """What is out of the error budget with the configuration under trial, or None."""
    step = _Step(kernel, shape, _CHECKED, 2)
    names = ("out", "gradient of query", "gradient of key", "gradient of value")
    for name, got, right in zip(names, step(), _right(step.causal, step.backward, shape), strict=False):
        error, budget = relative_error(got, right), BUDGETS[shape.dtype]["forward" if name == "out" else "backward"]
        if not error <= budget:
            return f"{name} has a relative error of {error:.1e}, allowed is {budget:.0e}"
    return None


def _time(step: Callable[[], object]) -> float:
    """The median time in milliseconds."""
    times = []
    for turn in range(8):
        begin = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if turn > 2:
            times.append((time.perf_counter() - begin) * 1e3)
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
