"""Every GPU kernel brought to Triton's intermediate code, on a machine without a GPU: where its types are checked.

    python -m tests.lowered

The interpreter multiplies a bfloat16 by a float16 without a word; the compiler refuses to. Calls go their usual way,
on tensors that lie on the CPU, up to where a kernel would be compiled and started. Prints each call that fails, and at
the end how many kernels there were.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend

import race_attention.backends.triton as backend
from benchmarks.gpu_sanitize import CASES as EVERY_KERNEL
from benchmarks.gpu_sanitize import forward_and_backward
from race_attention.backends.triton import replay, start
from race_attention.backends.triton.decode import decode, decode_

TARGET = GPUTarget("cuda", 90, 32)
COMPILER = make_backend(TARGET)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAMES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32", torch.bool: "i1",
}  # fmt: skip
_PACKED: dict[str, Any] = {"causal": True, "lengths": (0,), "decay": "token", "initial_state": True}
#: Without tokens what is kept for the backward pass is empty, and a stand-in has to have its dtype.
CASES: dict[str, dict[str, Any]] = EVERY_KERNEL | {
    "causal-nothing": {**_PACKED, "heads": 1},
    "causal-64-nothing": {**_PACKED, "heads": 1, "planes": 4, "tables": 4, "decay": None},
    "causal-wide-nothing": {**_PACKED, "heads": 1, "planes": 6},
    "full-nothing": {"lengths": (0,), "key_lengths": (0,), "heads": 1, "initial_state": True},
}
_done: set[tuple[str, ...]] = set()


def _lowered(key: Any, kernel: Any, grid: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """In the place of a start: the kernel with these types and compile-time arguments."""
    signature, constants = {}, {}
    for i, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[i,] = options[parameter.name]
        elif isinstance(args[i], torch.Tensor):
            signature[parameter.name] = "*" + NAMES[args[i].dtype]
        else:
            signature[parameter.name] = parameter.annotation_type or "fp32"  # integers have to say theirs
    name = kernel.__name__, str(signature), str(constants)
    if name in _done:
        return
    others = {name: x for name, x in options.items() if name not in signature}
    source, given = ASTSource(fn=kernel, signature=signature, constexprs=constants), COMPILER.parse_options(others)
    context = ir.context()
    ir.load_dialects(context)
    COMPILER.load_dialects(context)
    source.make_ir(TARGET, given, COMPILER.get_codegen_implementation(given), COMPILER.get_module_map(), context)
    _done.add(name)


def _decode(dtype: torch.dtype) -> None:
    for planes, tables in ((2, 2), (6, 2)):
        query, key, value = (torch.randn(2, heads, 32).to(dtype) for heads in (4, 2, 2))
        given = query, key, value, torch.randn(2, tables, planes, 32), torch.full((2,), 4.0)
        mass = torch.ones(2, 2, tables, 1 << planes, dtype=torch.float64)
        state = mass, torch.zeros(*mass.shape, 32, dtype=torch.float64)
        for decay in (None, torch.full((2, 2), -0.1)):
            decode(*given, decay, *state)
            decode_(*given, decay, *state)


def main() -> int:
    start._start = _lowered
    backend.why_not = lambda call: None  # that the tensors are not on a GPU
    failed = 0
    for dtype in DTYPES:
        for case in (*CASES, "decode"):
            replay.forget()
            try:
                forward_and_backward(CASES[case], dtype, "cpu", 1) if case in CASES else _decode(dtype)
            except Exception as error:
                failed += 1
                sys.stdout.write(f"{case} {dtype}: {type(error).__name__}: {error}\n")
    sys.stdout.write(f"{len(_done)} kernels, {failed} calls failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
