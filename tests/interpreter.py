"""Where the kernels' tests run: on a GPU, or in Triton's interpreter, which is spared what it does over and over.

Without that they took six times as long. Nothing here changes what is computed, but for the order of a scan's sums.
With a Triton whose interpreter looks otherwise, all is left as it is.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
#: The mark of test files whose kernels need one or the other.
KERNELS_RUN = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"
)


def hurry() -> None:
    """In this process the interpreter does without what follows; each says what it cost."""
    try:
        from triton.runtime import interpreter

        from race_attention.backends.triton import launch_states
    except ImportError:
        return
    # The scan of states works for whole tiles, most of them runs that do not exist: 13 of 23 s of a packed causal test
    # with tiles of 64 runs, 1 s with 4, from tile to tile. And of 32 elements each state made many programs.
    launch_states.SCAN_RUNS, launch_states.SCAN_ELEMENTS = 4, 256
    _look_up_types_once(interpreter)
    _patch_once(interpreter)
    # Whether an integer overflows is worked out at every sum, a third of the time, and without ``debug`` never told.
    options = getattr(getattr(interpreter, "interpreter_builder", None), "options", None)
    if hasattr(options, "sanitize_overflow") and not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    # A scan by a function of ours went element by element: half the time of a causal case with decay.
    if hasattr(getattr(interpreter, "ScanOps", None), "generic_scan"):
        interpreter.ScanOps.generic_scan = _scanned


def _look_up_types_once(interpreter: Any) -> None:
    """The table of types was built anew at each of 200,000 look-ups of a test: 4 of 23 s."""
    look_up = getattr(interpreter, "_get_np_dtype", None)
    if look_up is None:
        return
    found: dict[str, Any] = {}

    def looked_up(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.name not in found:
            found[scalar.name] = look_up(scalar)
        return found[scalar.name]

    interpreter._get_np_dtype = looked_up


def _patch_once(interpreter: Any) -> None:
    """What a function sees of triton.language was patched at each call from a kernel, after its launch: 5 of 23 s."""
    patch, executor = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "GridExecutor", None)
    if patch is None or executor is None:
        return
    launch = executor.__call__
    depth = 0
    done: set[int] = set()

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        done.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            depth -= 1
            done.clear()

    class Nothing:
        def restore(self) -> None:
            pass

    def patched_once(function: Any) -> Any:
        """At the launch, and the first time in it."""
        modules = id(function.__globals__.get("tl"))
        if depth == 1 and modules in done:
            return Nothing()
        done.add(modules)
        return patch(function)

    executor.__call__ = launched
    interpreter._patch_lang = patched_once


def _scanned(self: Any, input: Any) -> list[Any]:
    """What ScanOps.generic_scan returns, to rounding: each element with the one 1, 2, 4, ... places before it."""
    results = [x.handle.data.copy() for x in input]
    count, apart = results[0].shape[self.axis], 1
    while apart < count:
        before = [np.roll(x, apart, self.axis) for x in results]  # what comes round is left out again
        both = (self.to_tensor(x, of.dtype) for x, of in zip((*before, *results), (*input, *input), strict=True))
        combined = self.combine_fn.fn(*both)
        behind = (*(slice(None),) * self.axis, slice(apart, None))
        for result, x in zip(results, combined if isinstance(combined, tuple) else (combined,), strict=True):
            result[behind] = x.handle.data[behind]
        apart *= 2
    return [self.to_tensor(x, of.dtype) for x, of in zip(results, input, strict=True)]
