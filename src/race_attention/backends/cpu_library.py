"""The shared library of the CPU backend: where it lies, its instruction sets, its C interface.

The library knows neither torch nor Python. A call is one structure of 64-bit integers (``Args`` in
csrc/problem.hpp): pointers, sizes and strides. Pointers must stay valid until the call returns; that is all the
library asks of its caller, and :mod:`.cpu` checks shapes, dtypes and offsets before.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from pathlib import Path
from typing import Any

LIBRARY_VARIABLE = "RACE_ATTENTION_CPU_LIBRARY"
ISA_VARIABLE = "RACE_ATTENTION_CPU_ISA"

_FILE = "libracecpu.so"
_FIELDS = 107
_RESULTS = {
    1: "not enough memory",
    3: "the shared library is of another version of the package; build it again",
    4: "the instruction set does not run on this processor",
}


_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Library:
    """The loaded library with a chosen instruction set."""

    def __init__(self, path: Path):
        self.path = path
        self._library = ctypes.CDLL(str(path))
        if self._library.race_cpu_fields() != _FIELDS:
            raise OSError(f"{path}: {_RESULTS[3]}")
        self._library.race_cpu_isa_name.restype = ctypes.c_char_p
        self.isa = self._choose_isa()
        self.forward = self._library.race_cpu_forward
        self.backward = self._library.race_cpu_backward
        for function in (self.forward, self.backward):
            function.argtypes = [ctypes.c_char_p]
        self._pack = struct.Struct(f"{_FIELDS}q").pack
        self._library.race_cpu_lend.restype = ctypes.c_void_p
        self._library.race_cpu_lend.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int]
        api = ctypes.pythonapi
        names = (api.PyGILState_Ensure, api.PyGILState_Release, api.PyErr_CheckSignals, api.PyErr_Clear)
        self._signals = tuple(ctypes.cast(function, ctypes.c_void_p).value for function in names)

    def lend(self, shape: tuple[int, ...], code: int, bits: int) -> Any:
        """A DLPack capsule of uninitialised memory that is kept for the next call when its tensor is gone.

        Args:
            shape: of the contiguous tensor.
            code: of its dtype, DLPack's.
            bits: of its dtype.

        Returns:
            The capsule, or None where the system knows no such memory.
        """
        pointer = self._library.race_cpu_lend(struct.pack("4q", *shape), code, bits)
        return None if pointer is None else _capsule(pointer, b"dltensor", None)

    def forget(self) -> None:
        """Gives the memory that is kept for the next call back to the system."""
        self._library.race_cpu_forget()

    def _name(self, isa: int) -> str | None:
        name: bytes | None = self._library.race_cpu_isa_name(isa)
        return None if name is None else name.decode()

    def isas(self) -> dict[str, int]:
        """The instruction sets that run here, the widest last: name -> number."""
        found: dict[str, int] = {}
        isa = 0
        while (name := self._name(isa)) is not None:
            if self._library.race_cpu_isa_runs(isa):
                found[name] = isa
            isa += 1
        return found

    def _choose_isa(self) -> int:
        runs = self.isas()
        wanted = os.environ.get(ISA_VARIABLE, "")
        if not wanted:
            return list(runs.values())[-1]
        if wanted not in runs:
            raise OSError(f"{ISA_VARIABLE}: got {wanted!r}, allowed on this processor is one of {', '.join(runs)}")
        return runs[wanted]

    @property
    def isa_name(self) -> str:
        """The instruction set in use."""
        return self._name(self.isa) or ""

    def call(self, backward: bool, fields: list[int]) -> None:
        """Runs a call. The interpreter's lock is released; a signal such as Ctrl-C ends a long call early.

        Raises:
            MemoryError, KeyboardInterrupt, RuntimeError: as the library reports.
        """
        packed = self._pack(_FIELDS, *fields, *self._signals)
        result = (self.backward if backward else self.forward)(packed)
        if result == 0:
            return
        if result == 2:
            raise KeyboardInterrupt
        raise (MemoryError if result == 1 else RuntimeError)(f"race_attention cpu backend: {_RESULTS[result]}")


def path() -> Path:
    """Where the library is looked for: RACE_ATTENTION_CPU_LIBRARY, else beside this file.

    In an editable install the library lies apart from the sources; both folders are on the package's path.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        return Path(named)
    beside = Path(__file__).with_name(_FILE)
    folders = sys.modules[__package__].__path__
    return next((found for folder in folders if (found := Path(folder, _FILE)).exists()), beside)


@functools.cache
def load() -> Library:
    """The library, loaded once.

    Raises:
        OSError: it was not built, does not load, or has not the instruction set asked for.
    """
    where = path()
    if not where.exists():
        raise OSError(
            f"its shared library was not built: there is no {where} (no C++ compiler was found when the package "
            f"was installed, or this is a source tree: see `make library`)"
        )
    return Library(where)


def why_not_loaded() -> str | None:
    """The reason why the library cannot be used, or None."""
    try:
        load()
    except OSError as error:
        return str(error)
    return None
