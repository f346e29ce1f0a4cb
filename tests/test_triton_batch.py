"""Programs of kernels to start: the C++ library does to the driver's functions what a program says."""

from __future__ import annotations

import ctypes
import struct
import threading
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")
from race_attention.backends.triton import batch

pytestmark = pytest.mark.skipif(batch.library() is None, reason="the library that starts kernels was not built")

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    *[ctypes.c_uint] * 7,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)
_CLEAR = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_void_p)


class Driver:
    """Functions of the driver's signatures that write down how they are called; ``read`` has the parameters' types."""

    def __init__(self, read: list[Any], status: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.read, self.status = read, status
        self._kept = _LAUNCH(self._launch), _CLEAR(self._clear)
        launch, clear = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in self._kept)
        self.functions = launch, clear

    def _launch(self, function: int, *rest: Any) -> int:
        *numbers, stream, parameters, extra = rest
        values = [ctypes.cast(parameters[n], ctypes.POINTER(kind))[0] for n, kind in enumerate(self.read)]
        spare = [ctypes.cast(parameters[len(self.read) + n], ctypes.POINTER(ctypes.c_uint64))[0] for n in range(2)]
        self.calls.append(("kernel", function, tuple(numbers), stream, values, spare, extra))
        return self.status

    def _clear(self, *arguments: Any) -> int:
        self.calls.append(("zeros", *arguments))
        return self.status


def compiled(*types: str, **metadata: Any) -> Any:
    about = {"num_warps": 4, "num_ctas": 1, "shared": 96, "target": SimpleNamespace(warp_size=32), **metadata}
    signature = {f"x{n}": kind for n, kind in enumerate(types)}
    return SimpleNamespace(function=77, metadata=SimpleNamespace(**about), src=SimpleNamespace(signature=signature))


TYPES = ("*bf16", "i32", "constexpr", "i64", "fp32", "*fp32", "fp64", "u1", "*i64")
ARGUMENTS = [None, -5, 64, -(1 << 40), 0.1, None, 1e-300, True, None]
PLACES = {0: (1, 512), 5: (0, 0)}
READ = [
    ctypes.c_uint64, ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_uint64, ctypes.c_double, ctypes.c_bool,
    ctypes.c_uint64,
]  # fmt: skip
FLOAT = struct.unpack("f", struct.pack("f", 0.1))[0]


def test_kernels_and_zeros_in_order() -> None:
    driver = Driver(READ)
    step = batch.kernel_step(compiled(*TYPES), (3, 2), ARGUMENTS, PLACES)
    assert step is not None
    program = batch.program([batch.zero_step((1, 8), 100), step, step], driver.functions)
    run = batch.library()
    assert run is not None
    assert run(program, struct.pack("=2q", 1 << 40, 1 << 50), 9) == 0
    kernel = (
        "kernel", 77, (3, 2, 1, 128, 1, 1, 96), 9,
        [(1 << 50) + 512, -5, -(1 << 40), FLOAT, 1 << 40, 1e-300, True, 0], [0, 0], None,
    )  # fmt: skip
    assert driver.calls == [("zeros", (1 << 50) + 8, 0, 100, 9), kernel, kernel]


def test_a_failure_ends_the_program_with_its_status() -> None:
    driver = Driver(READ, status=7)
    step = batch.kernel_step(compiled(*TYPES), (1,), ARGUMENTS, PLACES)
    assert step is not None
    run = batch.library()
    assert run is not None
    assert run(batch.program([step, step], driver.functions), struct.pack("=2q", 0, 0), 0) == 7
    assert len(driver.calls) == 1


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        (compiled("i32", num_ctas=2), [1]),
        (compiled("i32", global_scratch_size=8), [1]),
        (compiled("i32", launch_pdl=True), [1]),
        (compiled("fp16"), [1.0]),
        (compiled("i32"), [1, 2]),
        (compiled(*["i32"] * (batch.MOST + 1)), [1] * (batch.MOST + 1)),
    ],
)
def test_what_only_tritons_launcher_can_start(given: Any, arguments: list[Any]) -> None:
    assert batch.kernel_step(given, (1,), arguments, {}) is None


def test_memory_for_descriptors_comes_behind_the_arguments() -> None:
    driver = Driver([ctypes.c_int32, ctypes.c_uint64])
    step = batch.kernel_step(compiled("i32", global_scratch_size=8), (1,), [3], {}, (1, 64))
    assert step is not None
    run = batch.library()
    assert run is not None
    assert run(batch.program([step], driver.functions), struct.pack("=2q", 0, 1 << 40), 0) == 0
    assert driver.calls[0][4] == [3, (1 << 40) + 64]


def test_threads_run_one_program_at_once() -> None:
    driver = Driver([ctypes.c_uint64])
    step = batch.kernel_step(compiled("*fp32"), (1,), [None], {0: (0, 1)})
    assert step is not None
    program, run = batch.program([step], driver.functions), batch.library()
    assert run is not None

    def many(address: int) -> None:
        for _ in range(50):
            run(program, struct.pack("=q", address), address)

    threads = [threading.Thread(target=many, args=(address,)) for address in (100, 200, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((call[3], call[4][0]) for call in driver.calls) == sorted(
        (a, a + 1) for a in (100, 200, 300) for _ in range(50)
    )
