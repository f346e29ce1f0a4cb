"""Doing a pass again without its host code: what it allocated and launched for tensors of some layout, recorded once.

The host code of a pass (:mod:`.passes`) depends on its tensors' shapes, strides, dtypes and alignment alone, never on
their values, and takes some 0.4 ms in Python, longer than the kernels of a short call. So the second time a layout
is met, what the pass does is written down: allocations, launches, and the few operators of torch. From then on the
same is done with other addresses: one allocation for all scratch memory, one for each result, and the launches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from . import start

#: Layouts that are kept. One more, and all are forgotten: a call that never meets a layout twice records nothing.
LAYOUTS = 1024
#: Scratch memory of all of a pass at once is at most this part of the device's.
SHARE = 32
#: Where a piece of scratch memory begins: a multiple of this many bytes, as torch's own allocations do.
ALIGNMENT = 512
_ALLOCATIONS = frozenset(
    (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    )
)
Work = Callable[..., tuple[Any, ...]]


class _CannotRepeat(Exception):
    """What happened depends on more than is written down."""


@dataclass(frozen=True)
class _Place:
    """A tensor: where it lies in which buffer (negative: none, it has no elements), and how."""

    buffer: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(eq=False)
class _Buffer:
    """Memory of its own: an input, an allocation, or the result of an operator.

    ``tensor`` keeps it from being freed, and its address from being given again, while the recording goes on.
    """

    tensor: Tensor | None
    address: int
    bytes: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    alone: bool = False  # must be a tensor and not a piece of the scratch memory


@dataclass
class _Launch:
    """``runner`` starts a kernel on its grid; an interpreted one takes tensors, a compiled one their addresses."""

    runner: Callable[..., object]
    arguments: list[Any]
    tensors: list[tuple[int, _Place]]
    interpreted: bool = False

    def __post_init__(self) -> None:
        self.slots = [(n, place.buffer, place.offset) for n, place in self.tensors]


@dataclass
class _Operator:
    """One of torch's operators; ``made`` is the buffer of its result, where that is new memory."""

    function: Any
    arguments: tuple[Any, dict[str, Any]]
    made: int | None = None


@dataclass
class _Allocation:
    buffer: int


def _bytes_of(x: Tensor) -> int:
    """From the first element of x to its last."""
    if not x.numel():
        return 0
    apart = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return (apart + 1) * x.element_size()


class Recorder(TorchDispatchMode):
    """Writes down what goes on while it is entered, as the calling thread does it."""

    def __init__(self, inputs: Sequence[Tensor | None], limit: int) -> None:
        super().__init__()
        self.buffers = [_Recorded(x) for x in inputs]
        self.inputs = len(inputs)
        self.steps: list[_Launch | _Operator | _Allocation] = []
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
            except _CannotRepeat as error:
                self._give_up(str(error))
        return result

    def launched(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any], found: Any
    ) -> None:
        """A kernel was started; ``found`` is it compiled, with its compile-time arguments, or None."""
        if self.failed is not None:
            return
        try:
            tensors = [(n, self._place(x)) for n, x in enumerate(args) if isinstance(x, Tensor)]
        except _CannotRepeat as error:
            self._give_up(str(error))
            return
        arguments = [None if isinstance(x, Tensor) else x for x in args]
        if found is None:
            call = functools.partial(kernel[grid], **options)
            self.steps.append(_Launch(call, arguments, tensors, interpreted=True))
        else:
            compiled, constants = found
            runner = compiled[grid + (1,) * (3 - len(grid))]
            self.steps.append(_Launch(runner, [*arguments, *constants], tensors))

    def finished(self, results: Sequence[Tensor | None]) -> Replay | None:
        """What was recorded, with the places of the results; None where it cannot be done again."""
        if self.failed is None:
            try:
                places = [None if x is None else self._place(x) for x in results]
                return Replay(self.buffers, self.inputs, self.steps, places)
            except _CannotRepeat:
                pass
            finally:
                self._give_up("over")
        return None

    def _give_up(self, why: str) -> None:
        self.failed = why
        for buffer in self.buffers:
            buffer.tensor = None

    def _operator(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        if function in _ALLOCATIONS:
            self._new(result)
            self.steps.append(_Allocation(len(self.buffers) - 1))
        elif not function.is_view:
            if not isinstance(result, Tensor):
                raise _CannotRepeat(f"{function} has no one result")
            arguments = tree_map(self._argument, (args, kwargs))
            made = None
            if result.numel() and self._buffer_at(result.data_ptr()) is None:
                self._new(result)
                made = len(self.buffers) - 1
            self.steps.append(_Operator(function, arguments, made))

    def _new(self, x: Tensor) -> None:
        self.buffers.append(_Recorded(x))
        self.room -= self.buffers[-1].bytes
        if self.room < 0:
            raise _CannotRepeat("too much memory at once")

    def _argument(self, x: Any) -> Any:
        return self._place(x) if isinstance(x, Tensor) else x

    def _place(self, x: Tensor) -> _Place:
        how = tuple(x.shape), x.stride(), x.dtype
        if not x.numel():
            return _Place(-1, 0, *how)
        address = x.data_ptr()
        found = self._buffer_at(address)
        if found is None:
            raise _CannotRepeat("a tensor from elsewhere")
        return _Place(found, address - self.buffers[found].address, *how)

    def _buffer_at(self, address: int) -> int | None:
        """The buffer that an address lies in; of inputs the one that begins there, or the only one."""
        within = [n for n, x in enumerate(self.buffers) if x.address <= address < x.address + x.bytes]
        beginning = [n for n in within if self.buffers[n].address == address]
        if beginning:
            return beginning[0]
        if len(within) > 1:
            raise _CannotRepeat("a part of inputs that share memory")
        return within[0] if within else None


def _Recorded(x: Tensor | None) -> _Buffer:
    if x is None:
        return _Buffer(None, 0, 0, (), (), torch.float32)
    return _Buffer(x, x.data_ptr(), _bytes_of(x), tuple(x.shape), x.stride(), x.dtype)


class Replay:
    """A pass of one layout, to be done again."""

    def __init__(self, buffers: list[_Buffer], inputs: int, steps: list[Any], results: list[_Place | None]) -> None:
        self.inputs, self.results = inputs, results
        self._check(buffers, steps, results)
        for place in self._held_by_tensors(steps, results):
            if place.buffer >= 0:
                buffers[place.buffer].alone = True
        # Scratch memory, as offsets into one allocation; the rest is allocated where it was.
        self.pieces: list[tuple[int, int]] = []
        self.scratch = 0
        self.steps: list[Any] = []
        self.made = len(buffers) - inputs
        for step in steps:
            if not isinstance(step, _Allocation):
                self.steps.append(step)
                continue
            buffer = buffers[step.buffer]
            if not buffer.bytes:
                continue
            if buffer.alone:
                self.steps.append((step.buffer, buffer.size, buffer.stride, buffer.dtype))
            else:
                self.pieces.append((step.buffer, self.scratch))
                self.scratch += -(-buffer.bytes // ALIGNMENT) * ALIGNMENT
        self.whole = [(buffer.size, buffer.stride, buffer.dtype) for buffer in buffers]

    @staticmethod
    def _held_by_tensors(steps: list[Any], results: list[_Place | None]) -> list[_Place]:
        held = [place for place in results if place is not None]
        for step in steps:
            if isinstance(step, _Operator):
                held += [x for x in tree_leaves(step.arguments) if isinstance(x, _Place)]
            elif isinstance(step, _Launch) and step.interpreted:
                held += [place for _, place in step.tensors]
        return held

    @staticmethod
    def _check(buffers: list[_Buffer], steps: list[Any], results: list[_Place | None]) -> None:
        for place in Replay._held_by_tensors(steps, results):
            if place.buffer >= 0 and place.dtype != buffers[place.buffer].dtype:
                raise _CannotRepeat("memory read as of another dtype")

    def __call__(self, tensors: Sequence[Tensor | None], addresses: list[int]) -> tuple[Tensor | None, ...]:
        query = tensors[0]
        assert query is not None
        device = query.device
        held = [*tensors, *[None] * self.made]
        at = [*addresses, *[0] * self.made, 0]  # the last is the address of what has no elements
        if self.scratch:
            scratch = torch.empty(self.scratch, dtype=torch.uint8, device=device)
            base = scratch.data_ptr()
            for n, offset in self.pieces:
                at[n] = base + offset
        stream = None if device.type == "cpu" else triton.runtime.driver.active.get_current_stream(device.index)
        for step in self.steps:
            kind = type(step)
            if kind is _Launch:
                arguments = step.arguments.copy()
                if step.interpreted:
                    for n, place in step.tensors:
                        arguments[n] = self._tensor(held, place, device)
                    step.runner(*arguments)
                else:
                    for n, buffer, offset in step.slots:
                        arguments[n] = at[buffer] + offset
                    step.runner(*arguments, stream=stream)
            elif kind is tuple:
                n, size, stride, dtype = step
                held[n] = made = torch.empty_strided(size, stride, dtype=dtype, device=device)
                at[n] = made.data_ptr()
            else:
                args, kwargs = tree_map(lambda x: self._argument(held, x, device), step.arguments)
                result = step.function(*args, **kwargs)
                if step.made is not None:
                    held[step.made], at[step.made] = result, result.data_ptr()
        return tuple([None if place is None else self._tensor(held, place, device) for place in self.results])

    def _argument(self, held: list[Tensor | None], x: Any, device: torch.device) -> Any:
        return self._tensor(held, x, device) if isinstance(x, _Place) else x

    def _tensor(self, held: list[Tensor | None], place: _Place, device: torch.device) -> Tensor:
        if place.buffer < 0:
            return torch.empty(place.size, dtype=place.dtype, device=device)
        x = held[place.buffer]
        assert x is not None
        if not place.offset and self.whole[place.buffer][:2] == (place.size, place.stride):
            return x
        return x.as_strided(place.size, place.stride, x.storage_offset() + place.offset // x.element_size())


_known: dict[tuple[Any, ...], Any] = {}


def forget() -> None:
    """Forgets all recordings: configurations have changed."""
    _known.clear()


@functools.cache
def _limit(device: torch.device) -> int:
    """The most bytes that a recorded pass allocates."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // SHARE
    return 1 << 30


def repeated(work: Work, tensors: Sequence[Tensor | None], flags: tuple[Any, ...]) -> tuple[Any, ...]:
    """``work(*tensors, *flags)``: its host code the first two times a layout is met, and again without it.

    Args:
        work: allocates, launches and calls operators of torch, and reads no value of a tensor.
        tensors: the first one is; None where there is none. Nothing is written to them.
        flags: hashable.

    Returns:
        the tensors that ``work`` returns, or None in their place.
    """
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    layout = [
        None if x is None else (x.shape, x.stride(), x.dtype, address & 15)
        for x, address in zip(tensors, addresses, strict=True)
    ]
    one = [address for address in addresses if address]
    same = None if len(set(one)) == len(one) else tuple(map(addresses.index, addresses))  # the same tensor twice
    query = tensors[0]
    assert query is not None
    key = (work, flags, query.get_device(), same, *layout)
    found = _known.get(key)
    if found is None:
        if len(_known) >= LAYOUTS:
            _known.clear()
        _known[key] = 1
        return work(*tensors, *flags)
    if found == 1:
        recorder = Recorder(tensors, _limit(query.device))
        with recorder:
            results = work(*tensors, *flags)
        _known[key] = recorder.finished(results) or 2
        return results
    if found == 2:
        return work(*tensors, *flags)
    return found(tensors, addresses)
