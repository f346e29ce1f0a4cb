"""Where the kernels' tests run: on a GPU, or in Triton's interpreter, which is spared what it does over and over.

Without that they took three times as long. Nothing here changes what is computed. With a Triton whose interpreter
looks otherwise, all is left as it is.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
#: The mark of test files whose kernels need one or the other.
KERNELS_RUN = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"
)


def hurry() -> None:
    """In this process: types are looked up once, and what a launch has patched is not patched again at each call.

    Of a packed causal test of 23 s: 4 s were the table of types, built anew at each of 200,000 look-ups, and 5 s the
    search through triton.language for functions to patch, at each call of a function from a kernel, which the
    kernel's launch had done before. The scan takes its elements one by one, in 13 s, most of them runs that do not
    exist: with tiles of 4 runs it takes 1 s, and goes from tile to tile.
    """
    try:
        from triton.runtime import interpreter

        from race_attention.backends.triton import launch_states
    except ImportError:
        return
    launch_states.SCAN_RUNS = 4
    look_up = getattr(interpreter, "_get_np_dtype", None)
    if look_up is not None:
        found: dict[str, Any] = {}

        def looked_up(dtype: Any) -> Any:
            scalar = dtype.scalar
            if scalar.name not in found:
                found[scalar.name] = look_up(scalar)
            return found[scalar.name]

        interpreter._get_np_dtype = looked_up
    patch, executor = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "GridExecutor", None)
    if patch is None or executor is None:
        return
    launch = executor.__call__
    depth = 0

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

    done: set[int] = set()

    def patched_once(function: Any) -> Any:
        """What one function sees of triton.language: patched at the launch, and the first time in it."""
        modules = id(function.__globals__.get("tl"))
        if depth == 1 and modules in done:
            return Nothing()
        done.add(modules)
        return patch(function)

    executor.__call__ = launched
    interpreter._patch_lang = patched_once
