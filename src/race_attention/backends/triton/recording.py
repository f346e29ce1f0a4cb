"""Writing down what a pass does while it runs: its allocations, its launches, its operators of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from . import start

_ALLOCATIONS = frozenset(
    (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    )
)
_OF_ZEROS = frozenset((torch.ops.aten.new_zeros.default, torch.ops.aten.zeros.default))


class CannotRepeat(Exception):
    """What happened depends on more than is written down."""


@dataclass(frozen=True)
class Place:
    """A tensor: where it lies in which buffer (negative: none, it has no elements), and how."""

    buffer: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(eq=False)
class Buffer:
    """Memory of its own: an input, an allocation, or the result of an operator.

    ``tensor`` keeps it from being freed, and its address from being given again, while the recording goes on.
    """

    tensor: Tensor | None
    address: int
    bytes: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Launch:
    """A kernel started on its grid; ``compiled`` is None in Triton's interpreter. ``arguments`` without tensors.

    ``memory`` is what Triton gives it besides, for the descriptors that it makes.
    """

    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    options: dict[str, Any]
    arguments: list[Any]
    tensors: list[tuple[int, Place]]
    memory: Place | None = None


@dataclass(frozen=True)
class Zeros:
    """Contiguous memory filled with zeros."""

    place: Place
    bytes: int


@dataclass(frozen=True)
class Operator:
    """One of torch's operators; ``made`` is the buffer of its result, where that is new memory."""

    function: Any
    arguments: tuple[Any, dict[str, Any]]
    made: int | None = None


Step = Launch | Zeros | Operator


def bytes_of(x: Tensor) -> int:
    """From the first element of x to its last."""
    if not x.numel():
        return 0
    apart = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return (apart + 1) * x.element_size()


class Recorder(TorchDispatchMode):
    """Writes down what goes on while it is entered, as the calling thread does it.

    Attributes:
        buffers: the inputs first. allocated: the numbers of those that were allocated.
    """

    def __init__(self, inputs: Sequence[Tensor | None], limit: int) -> None:
        super().__init__()
        self.buffers = [_buffer(x) for x in inputs]
        self.allocated: list[int] = []
        self.steps: list[Step] = []
        self.room = limit
        self.failed: str | None = None

    def __enter__(self) -> Recorder:
        self.before, start.recording.launched = start.recording.launched, self.launched
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        start.recording.launched = self.before
        super().__exit__(*error)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if self.failed is None:
            try:
                self._operator(function, args, kwargs or {}, result)
            except CannotRepeat as error:
                self.give_up(str(error))
        return result

    def launched(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any], found: Any,
        memory: Tensor | None,
    ) -> None:  # fmt: skip
        """A kernel was started; ``found`` is it compiled, with its compile-time arguments, or None."""
        if self.failed is not None:
            return
        try:
            besides = None if memory is None else self.place(memory)
            tensors = [(n, self.place(x)) for n, x in enumerate(args) if isinstance(x, Tensor)]
        except CannotRepeat as error:
            self.give_up(str(error))
            return
        compiled, constants = (None, ()) if found is None else found
        arguments = [*(None if isinstance(x, Tensor) else x for x in args), *constants]
        self.steps.append(Launch(kernel, compiled, grid, options, arguments, tensors, besides))

    def give_up(self, why: str) -> None:
        self.failed = why
        for buffer in self.buffers:
            buffer.tensor = None

    def _operator(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        if function in _ALLOCATIONS or function in _OF_ZEROS:
            self.allocated.append(self._new(result))
            if function in _OF_ZEROS:
                self._zeros(result)
        elif function is torch.ops.aten.zero_.default and result.is_contiguous():
            self._zeros(result)
        elif not function.is_view:
            if not isinstance(result, Tensor):
                raise CannotRepeat(f"{function} has no one result")
            arguments = tree_map(lambda x: self.place(x) if isinstance(x, Tensor) else x, (args, kwargs))
            made = self._new(result) if result.numel() and self._buffer_at(result.data_ptr()) is None else None
            self.steps.append(Operator(function, arguments, made))

    def _zeros(self, x: Tensor) -> None:
        if x.numel():
            self.steps.append(Zeros(self.place(x), bytes_of(x)))

    def _new(self, x: Tensor) -> int:
        self.buffers.append(_buffer(x))
        self.room -= self.buffers[-1].bytes
        if self.room < 0:
            raise CannotRepeat("too much memory at once")
        return len(self.buffers) - 1

    def place(self, x: Tensor) -> Place:
        """Where a tensor lies."""
        how = tuple(x.shape), x.stride(), x.dtype
        if not x.numel():
            return Place(-1, 0, *how)
        address = x.data_ptr()
        found = self._buffer_at(address)
        if found is None:
            raise CannotRepeat("a tensor from elsewhere")
        return Place(found, address - self.buffers[found].address, *how)

    def _buffer_at(self, address: int) -> int | None:
        """The buffer that an address lies in; of inputs the one that begins there, or the only one."""
        within = [n for n, x in enumerate(self.buffers) if x.address <= address < x.address + x.bytes]
        beginning = [n for n in within if self.buffers[n].address == address]
        if beginning:
            return beginning[0]
        if len(within) > 1:
            raise CannotRepeat("a part of inputs that share memory")
        return within[0] if within else None


def _buffer(x: Tensor | None) -> Buffer:
    if x is None:
        return Buffer(None, 0, 0, (), (), torch.float32)
    return Buffer(x, x.data_ptr(), bytes_of(x), tuple(x.shape), x.stride(), x.dtype)
