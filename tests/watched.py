"""What kernels read and write, address by address, while Triton's interpreter runs them: a sanitizer without a GPU.

It sees what the program says, every load and store with its mask, and so complements compute-sanitizer, which sees
what the compiler made of it. Shared memory and the threads inside one operation are not here, but every kernel and
option is, on any machine, and to the element, where a GPU's allocator rounds up what it gives out.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

NOBODY, SEVERAL = -1, -2


@dataclass
class Memory:
    """One tensor's memory during one launch: who wrote and who read each byte where an element begins."""

    start: int
    size: int
    writer: np.ndarray = field(init=False)
    reader: np.ndarray = field(init=False)
    written_at: np.ndarray = field(init=False)  # how many barriers the writer had passed

    def __post_init__(self) -> None:
        self.writer, self.reader = np.full(self.size, NOBODY), np.full(self.size, NOBODY)
        self.written_at = np.zeros(self.size, np.int64)


@dataclass
class Watch:
    """``found`` says what is wrong, ``kernels`` what ran."""

    found: set[str] = field(default_factory=set)
    kernels: set[str] = field(default_factory=set)
    memories: list[Memory] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    kernel: str = ""
    barriers: int = 0

    def begin(self, kernel: str, arguments: list[Any]) -> None:
        self.kernel, self.barriers = kernel, 0
        self.kernels.add(kernel)
        storages = {s.data_ptr(): s.nbytes() for s in map(storage_of, arguments) if s is not None and s.nbytes()}
        self.memories = [Memory(start, size) for start, size in sorted(storages.items())]
        self.starts = [memory.start for memory in self.memories]

    def end(self) -> None:
        for memory in self.memories:
            both = (memory.writer >= 0) & (memory.reader != NOBODY) & (memory.reader != memory.writer)
            if both.any():
                self.found.add(f"{self.kernel}: a program reads what another one writes")
        self.memories, self.starts = [], []

    def places(self, addresses: np.ndarray, size: int, what: str) -> Iterator[tuple[Memory, np.ndarray]]:
        """Where in which tensor; an address in none of them is found, or one whose element goes past the end."""
        if addresses.size == 0:
            return
        first, last = int(addresses.min()), int(addresses.max()) + size
        at = bisect.bisect_right(self.starts, first) - 1
        if at >= 0 and last <= self.starts[at] + self.memories[at].size:  # all in one tensor, as nearly always
            yield self.memories[at], addresses - self.starts[at]
            return
        inside = np.zeros(addresses.shape, bool)
        for memory in self.memories:
            here = (addresses >= memory.start) & (addresses + size <= memory.start + memory.size)
            if here.any():
                inside |= here
                yield memory, addresses[here] - memory.start
        if not inside.all():
            self.found.add(f"{self.kernel}: {what} outside the tensors of the call")

    def read(self, addresses: np.ndarray, size: int, program: int) -> None:
        for memory, at in self.places(addresses, size, "reads"):
            before = memory.reader[at]
            memory.reader[at] = np.where((before == NOBODY) | (before == program), program, SEVERAL)
            if ((memory.writer[at] == program) & (memory.written_at[at] == self.barriers)).any():
                self.found.add(f"{self.kernel}: a program reads what it wrote, without a barrier between")

    def write(self, addresses: np.ndarray, size: int, program: int) -> None:
        for memory, at in self.places(addresses, size, "writes"):
            before = memory.writer[at]
            if ((before != NOBODY) & (before != program)).any():
                self.found.add(f"{self.kernel}: two programs write one element")
            memory.writer[at], memory.written_at[at] = program, self.barriers


def storage_of(argument: Any) -> torch.UntypedStorage | None:
    """The memory of a tensor, a descriptor's or a plain one."""
    argument = getattr(argument, "base", argument)
    return argument.untyped_storage() if isinstance(argument, torch.Tensor) else None


@contextmanager
def watched() -> Iterator[Watch]:
    """All launches inside are watched. For kernels without atomics: these would be reported as races."""
    watch, builder, executor = Watch(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    names = {builder: ("create_masked_load", "create_masked_store", "create_barrier"), executor: ("__call__",)}
    before = {(owner, name): getattr(owner, name) for owner in names for name in names[owner]}

    def calling(name: str, owner: type = builder) -> Callable[..., Any]:
        return before[owner, name]

    def program(self: Any) -> int:
        x, y, z = self.grid_idx
        _, height, depth = self.grid_dim
        return int((x * height + y) * depth + z)

    def load(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        watch.read(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)], size, program(self))
        return calling("create_masked_load")(self, ptrs, mask, *rest, **named)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        watch.write(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)], size, program(self))
        return calling("create_masked_store")(self, ptrs, value, mask, *rest, **named)

    def barrier(self: Any) -> Any:
        watch.barriers += 1
        return calling("create_barrier")(self)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch.begin(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}", [*args, *kwargs.values()])
        try:
            return calling("__call__", executor)(self, *args, **kwargs)
        finally:
            watch.end()

    replaced = {
        (builder, "create_masked_load"): load,
        (builder, "create_masked_store"): store,
        (builder, "create_barrier"): barrier,
        (executor, "__call__"): launch,
    }
    for (owner, name), function in replaced.items():
        setattr(owner, name, function)
    try:
        yield watch
    finally:
        for (owner, name), function in before.items():
            setattr(owner, name, function)
