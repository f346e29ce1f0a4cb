"""Many kernels started by one call: the C++ library of csrc/launch.cpp, and the programs that it runs.

Starting a kernel through Triton's own launcher takes 16 to 26 microseconds of host time; the driver's part of that is 2
to 3. Where the library was not built, or the driver is not NVIDIA's, kernels are started one by one.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import triton

from .recording import Launch, Zeros

_FILE = "libracelaunch.so"
#: Parameters of a kernel at most; csrc/launch.cpp has the same number.
MOST = 128
#: How a parameter of one of Triton's types lies in the lowest of 8 bytes.
_PACKED = {"i1": "q", "u1": "q", "i8": "q", "i16": "q", "i32": "q", "i64": "q", "u8": "Q", "u16": "Q", "u32": "Q"}
_PACKED |= {"u64": "Q", "fp32": "f4x", "f32": "f4x", "fp64": "d"}
#: A place: which buffer, and how far behind its beginning; or a number: -1 and its 8 bytes as an integer.
Pair = tuple[int, int]


@functools.cache
def library() -> Callable[[bytes, bytes, int], int] | None:
    """``race_launch(program, addresses, stream)`` of the C++ library, which returns the driver's status, or None."""
    folders = [Path(__file__).parent, *map(Path, sys.modules[__package__].__path__)]
    found = next((folder / _FILE for folder in folders if (folder / _FILE).exists()), None)
    if found is None:
        return None
    try:
        call = ctypes.CDLL(str(found)).race_launch
    except OSError:  # of another machine
        return None
    call.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p]
    return call


@functools.cache
def driver() -> tuple[int, int] | None:
    """The addresses of cuLaunchKernel and cuMemsetD8Async; None where there is no such driver, or no library."""
    if library() is None:
        return None
    try:
        if triton.runtime.driver.active.get_current_target().backend != "cuda":
            return None
        cuda = ctypes.CDLL("libcuda.so.1")
    except (OSError, RuntimeError):  # Triton has no active driver in its interpreter
        return None
    functions = (cuda.cuLaunchKernel, cuda.cuMemsetD8Async)
    launch, clear = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    return launch, clear


def kernel_step(
    compiled: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Any],
    places: dict[int, Pair],
    memory: Pair | None = None,
) -> list[int] | None:
    """The part of a program that starts a kernel, or None where only Triton's launcher can.

    Args:
        compiled: as Triton compiled it.
        grid: one to three counts of programs.
        arguments: all of the kernel's, compile-time ones included.
        places: of the tensors among them, by their number.
        memory: the place of what Triton gives a kernel besides, for the descriptors that it makes.
    """
    about = compiled.metadata
    special = (
        "launch_cooperative_grid",
        "launch_pdl",
        "profile_scratch_size",
        "tensordesc_meta",
    )
    if getattr(about, "num_ctas", 1) != 1 or any(getattr(about, name, None) for name in special):
        return None
    types = list(compiled.src.signature.values())
    if not isinstance(compiled.function, int) or len(types) != len(arguments):
        return None
    pairs: list[Pair] = []
    for number, (kind, value) in enumerate(zip(types, arguments, strict=True)):
        if kind == "constexpr":
            continue
        pair = _pair(kind, value, places.get(number))
        if pair is None:
            return None
        pairs.append(pair)
    if getattr(about, "global_scratch_size", 0):
        if memory is None:
            return None
        pairs.append(memory)  # the first of the pointers behind a kernel's own parameters
    if len(pairs) > MOST:
        return None
    threads = about.num_warps * about.target.warp_size
    counts = (*grid, *(1,) * (3 - len(grid)))
    return [len(pairs), compiled.function, *counts, threads, about.shared, *(x for pair in pairs for x in pair)]


def _pair(kind: Any, value: Any, place: Pair | None) -> Pair | None:
    if not isinstance(kind, str):
        return None
    if kind.startswith("*"):
        return place if place is not None else (-1, 0) if value is None else None
    if kind not in _PACKED or place is not None:
        return None
    return -1, struct.unpack("=q", struct.pack("=" + _PACKED[kind], value))[0]


def zero_step(place: Pair, bytes_: int) -> list[int]:
    """The part of a program that fills memory with zeros."""
    return [-1, *place, bytes_]


def program(steps: Sequence[list[int]], functions: tuple[int, int]) -> bytes:
    """What the library runs, of the parts for each step."""
    numbers = [*functions, len(steps), *(x for step in steps for x in step)]
    return struct.pack(f"={len(numbers)}q", *numbers)


def programs(steps: list[Any], functions: tuple[int, int] | None) -> list[Any]:
    """Launches and zeros that follow each other as one program, where the driver's functions are at hand."""
    if functions is None:
        return steps
    found: list[Any] = []
    part: list[list[int]] = []

    def flush() -> None:
        if part:
            found.append(program(part, functions))
            part.clear()

    for step in steps:
        made = None
        if isinstance(step, Launch) and step.compiled is not None:
            places = {n: (place.buffer, place.offset) if place.buffer >= 0 else (-1, 0) for n, place in step.tensors}
            memory = None if step.memory is None else (step.memory.buffer, step.memory.offset)
            made = kernel_step(step.compiled, step.grid, step.arguments, places, memory)
        elif isinstance(step, Zeros):
            made = zero_step((step.place.buffer, step.place.offset), step.bytes)
        if made is None:
            flush()
            found.append(step)
        else:
            part.append(made)
    flush()
    return found


def run(steps: bytes, addresses: bytes, stream: int) -> None:
    """Runs a program on a stream of the current device.

    Raises:
        RuntimeError: with the driver's name of the error.
    """
    call = library()
    assert call is not None  # or there were no program
    status = call(steps, addresses, stream)
    if status:
        name = ctypes.c_char_p()
        ctypes.CDLL("libcuda.so.1").cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"race_attention: a kernel was not started: {(name.value or b'').decode()} ({status})")
