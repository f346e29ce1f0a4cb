"""Starting a kernel: Triton's own way the first time, straight from the compiled kernel from then on.

Triton looks at each of a kernel's fifty arguments at every launch, 30 to 50 microseconds of host time. What a compiled
kernel depends on is less: the compile-time arguments, and of each tensor its dtype and whether it begins at a multiple
of 16 bytes. Numbers are never specialised on here.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import _disable_current_modes

#: kernel, device, compile-time arguments, dtypes, alignment -> (compiled kernel, compile-time arguments in its order)
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


_NUMBERS = frozenset((int, float))


class _Recording(threading.local):
    """Who writes launches down, in this thread: see recording.py."""

    launched: Callable[..., None] | None = None


recording = _Recording()


def start(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)`` on the current device.

    Args:
        kernel: its integers are all annotated and never specialised.
        grid: one to three counts of programs.
        args: tensors (the first one is) and numbers, all that come before the compile-time arguments.
        options: the compile-time arguments, num_warps and num_stages, always in the same order at one place.
    """
    if options.get("DESCRIBED"):
        provide_memory()
    tensors = [x for x in args if type(x) not in _NUMBERS]
    unaligned: Any = [x.data_ptr() % 16 for x in tensors]
    unaligned = tuple(map(bool, unaligned)) if any(unaligned) else None
    key = kernel, args[0].get_device(), *options.values(), *[x.dtype for x in tensors], unaligned
    if recording.launched is None:
        _start(key, kernel, grid, args, options)
        return
    with _disable_current_modes():  # the interpreter calls operators of torch
        _start(key, kernel, grid, args, options)
    found = _compiled.get(key)
    each = 0 if found is None else getattr(found[0].metadata, "global_scratch_size", 0)
    memory = torch.empty(math.prod(grid) * each, dtype=torch.uint8, device=args[0].device) if each else None
    recording.launched(kernel, grid, args, options, found, memory)


@functools.cache
def describes(device: torch.device) -> bool:
    """Whether kernels there may take rows by tensor descriptors, which the hardware itself copies by.

    Other devices would get Triton's replacement by pointers, with more instructions than the kernels' own.
    """
    if not hasattr(tl, "make_tensor_descriptor"):
        return False
    if device.type == "cpu":
        return True  # Triton's interpreter
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def provide_memory() -> None:
    """Memory for the descriptors that kernels make: Triton asks each thread for a way to get some, and has none."""
    if _allocator is None or isinstance(_allocator.get(), _NoAllocator):
        triton.set_allocator(_memory)


def _memory(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cuda")


_allocation = getattr(triton.runtime, "_allocation", None)
_allocator = getattr(_allocation, "_allocator", None)
_NoAllocator = getattr(_allocation, "NullAllocator", ())


def _start(key: tuple[Any, ...], kernel: Any, grid: tuple[int, ...], args: Any, options: dict[str, Any]) -> None:
    found = _compiled.get(key)
    if found is None:
        _start_first(key, kernel, grid, args, options)
    else:
        compiled, constants = found
        compiled[grid + (1,) * (3 - len(grid))](*args, *constants)


def _start_first(key: tuple[Any, ...], kernel: Any, grid: tuple[int, ...], args: Any, options: dict[str, Any]) -> None:
    compiled, options = _first_that_fits(kernel, grid, args, options)
    if not isinstance(compiled, triton.compiler.CompiledKernel):
        return  # Triton's interpreter, or a compilation that goes on elsewhere
    names = [parameter.name for parameter in kernel.params]
    for parameter, value in zip(kernel.params, args, strict=False):
        if isinstance(value, int) and not (parameter.do_not_specialize and parameter.annotation_type):
            raise TypeError(f"{names[0]}: {parameter.name} is a number that is specialised on, or of no one type")
    _compiled[key] = compiled, tuple(options[name] for name in names[len(args) :])


def _first_that_fits(
    kernel: Any, grid: tuple[int, ...], args: Any, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Launches, with fewer stages of loads where a multiprocessor of this GPU has no room for as many."""
    for stages in range(options.get("num_stages", 1), 0, -1):
        if "num_stages" in options:
            options = options | {"num_stages": stages}
        try:
            with _compiling():
                return kernel[grid](*args, **options), options
        except triton.runtime.errors.OutOfResources:
            if stages == 1:
                raise
    raise AssertionError("num_stages is at least 1")


#: The first release of ptxas that compiles Hopper's warp-group matrix instructions rightly.
_REPAIRED = (12, 9)


@functools.cache
def _environment() -> dict[str, str]:
    """The environment variables that Triton compiles under.

    The ptxas of Triton 3.6 (12.8.93) keeps a predicate in the register that holds the descriptor of a warp-group
    matrix instruction: wrong sums or illegal addresses, in kernels that compute-sanitizer otherwise finds clean, on
    an H200. Its wheel also has 12.9, for newer GPUs, which compiles them rightly, as 13.0 does. Where no such one is
    at hand, the older instructions are used, at about two thirds of the speed.
    """
    nvidia = torch.cuda.is_available() and torch.version.hip is None
    if not nvidia or torch.cuda.get_device_capability()[0] != 9:
        return {}
    tools = getattr(getattr(triton, "knobs", None), "nvidia", None)
    if _repaired(getattr(tools, "ptxas", None)):
        return {}
    newer = getattr(tools, "ptxas_blackwell", None)
    if newer is not None and "TRITON_PTXAS_PATH" not in os.environ and _repaired(newer):
        return {"TRITON_PTXAS_PATH": newer.path}
    return {"DISABLE_MMA_V3": "1"}


def ptxas_version() -> str | None:
    """The version of the ptxas that kernels are compiled with, where Triton knows one."""
    tools = getattr(getattr(triton, "knobs", None), "nvidia", None)
    tool = getattr(tools, "ptxas_blackwell" if "TRITON_PTXAS_PATH" in _environment() else "ptxas", None)
    return getattr(tool, "version", None)


def warp_groups() -> bool:
    """Whether kernels may use warp-group matrix instructions; DISABLE_MMA_V3=1 turns them off by hand."""
    return "DISABLE_MMA_V3" not in _environment() and os.environ.get("DISABLE_MMA_V3", "0") in ("", "0")


def _repaired(tool: Any) -> bool:
    return tool is not None and tuple(int(n) for n in tool.version.split(".")[:2]) >= _REPAIRED


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    wanted = _environment()
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
