"""Doing a pass again without its host code: what it allocated and launched for tensors of some layout, recorded once.

The host code of a pass (:mod:`.passes`) depends on its tensors' shapes, strides, dtypes and alignment alone, never on
their values, and takes some 0.4 ms in Python, longer than the kernels of a short call. So the second time a layout
is met, what the pass does is written down (:mod:`.recording`). From then on the same is done with other addresses: one
allocation for all scratch memory, one for what the backward pass reads, one for each result, and one call that starts
all kernels (:mod:`.batch`).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from . import batch, start
from .launch import on
from .recording import Buffer, CannotRepeat, Launch, Operator, Place, Recorder, Zeros

#: Layouts that are kept. One more, and all are forgotten: a call that never meets a layout twice records nothing.
LAYOUTS = 1024
#: Scratch memory of all of a pass at once is at most this part of the device's.
SHARE = 32
#: Where a piece of memory begins: a multiple of this many bytes, as torch's own allocations do.
ALIGNMENT = 512
Work = Callable[..., Sequence[Any]]


@dataclass(frozen=True, eq=False)
class Layout:
    """How tensors lie in one piece of memory; a recording has one object of it."""

    places: tuple[Place | None, ...]

    def tensors(self, memory: Tensor) -> list[Tensor | None]:
        return [None if place is None else _cut(memory, place) for place in self.places]


@dataclass(frozen=True, eq=False)
class Bundle:
    """What only the backward pass reads, in one piece of memory."""

    memory: Tensor
    layout: Layout


def _cut(memory: Tensor, place: Place) -> Tensor:
    """The tensor at a place in a piece of bytes."""
    last = sum((size - 1) * step for size, step in zip(place.size, place.stride, strict=True)) + 1
    piece = memory[place.offset : place.offset + last * place.dtype.itemsize].view(place.dtype)
    return piece.as_strided(place.size, place.stride)


class _Memory:
    """How buffers lie in one allocation."""

    bytes = 0

    def add(self, buffer: Buffer) -> int:
        """The offset of the next buffer."""
        offset = self.bytes
        self.bytes += -(-buffer.bytes // ALIGNMENT) * ALIGNMENT
        return offset


class Replay:
    """A pass of one layout, to be done again.

    Memory is numbered: the inputs, then what is allocated (the scratch memory, what is bundled, each result), then the
    results of operators. All is allocated before the first step.
    """

    def __init__(self, recorder: Recorder, inputs: int, results: list[Place | None], kept: int | None) -> None:
        self.inputs = inputs
        own = {place.buffer for place in results[:kept] if place is not None}
        moved = {place.buffer for place in results[len(results) if kept is None else kept :] if place is not None}
        if kept is not None and (not moved <= set(recorder.allocated) or moved & own):
            kept, own, moved = None, own | moved, set()
        self._number(recorder, own, moved)
        steps = [self._renumbered(step) for step in recorder.steps]
        places = [place and self._moved(place) for place in results]
        self.results, self.bundle = places[:kept], None if kept is None else Layout(tuple(places[kept:]))
        self._check(steps, places[:kept])
        functions = batch.driver() if any(isinstance(x, Launch) and x.compiled for x in steps) else None
        self.steps = _batched(steps, functions)
        self.pack = struct.Struct(f"={self.count}q").pack

    def _number(self, recorder: Recorder, own: set[int], moved: set[int]) -> None:
        """Where each buffer lies: the number of its memory, and how far from the beginning."""
        buffers = recorder.buffers
        self.at = {n: (n, 0) for n in range(self.inputs)}
        self.how = [(buffer.size, buffer.stride, buffer.dtype) for buffer in buffers[: self.inputs]]
        scratch, bundle = _Memory(), _Memory()
        of_scratch, of_bundle = self.inputs, self.inputs + 1
        self.allocations: list[tuple[Any, ...]] = []
        for n in recorder.allocated:
            if n in moved:
                self.at[n] = of_bundle, bundle.add(buffers[n])
            elif n in own:
                self.at[n] = self.inputs + 2 + len(self.allocations), 0
                self.allocations.append((buffers[n].size, buffers[n].stride, buffers[n].dtype))
            else:
                self.at[n] = of_scratch, scratch.add(buffers[n])
        pieces = [((memory.bytes,), (1,), torch.uint8) for memory in (scratch, bundle)]
        self.allocations = [*pieces, *self.allocations]
        self.how += self.allocations
        for n in range(self.inputs, len(buffers)):
            if n not in self.at:  # the result of an operator
                self.at[n] = len(self.how), 0
                self.how.append((buffers[n].size, buffers[n].stride, buffers[n].dtype))
        self.count = len(self.how)

    def _moved(self, place: Place) -> Place:
        if place.buffer < 0:
            return place
        memory, offset = self.at[place.buffer]
        return replace(place, buffer=memory, offset=offset + place.offset)

    def _renumbered(self, step: Any) -> Any:
        if isinstance(step, Launch):
            tensors = [(n, self._moved(place)) for n, place in step.tensors]
            return replace(step, tensors=tensors, memory=step.memory and self._moved(step.memory))
        if isinstance(step, Zeros):
            return replace(step, place=self._moved(step.place))
        arguments = tree_map(lambda x: self._moved(x) if isinstance(x, Place) else x, step.arguments)
        return Operator(step.function, arguments, None if step.made is None else self.at[step.made][0])

    def _check(self, steps: list[Any], results: list[Place | None]) -> None:
        held = [place for place in results if place is not None]
        for step in steps:
            if isinstance(step, Operator):
                held += [x for x in tree_leaves(step.arguments) if isinstance(x, Place)]
            elif isinstance(step, Launch) and step.compiled is None:
                held += [place for _, place in step.tensors]
        for place in held:
            if place.buffer >= 0 and self.how[place.buffer][2] not in (place.dtype, torch.uint8):
                raise CannotRepeat("memory read as of another dtype")

    def __call__(self, tensors: Sequence[Tensor | None], addresses: list[int]) -> tuple[Any, ...]:
        query = tensors[0]
        assert query is not None
        device = query.device
        made = [
            torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype in self.allocations
        ]
        at = [*addresses, *[x.data_ptr() for x in made]]
        held = [*tensors, *made]
        if len(at) < self.count:
            more = self.count - len(at)
            at += [0] * more
            held += [None] * more
        if device.type == "cpu":
            self._run(held, at, device, None)
        else:
            with on(device):
                stream = triton.runtime.driver.active.get_current_stream(device.index)
                self._run(held, at, device, stream)
        results = [None if place is None else self._tensor(held, place, device) for place in self.results]
        return (*results, Bundle(made[1], self.bundle)) if self.bundle is not None else tuple(results)

    def _run(self, held: list[Tensor | None], at: list[int], device: torch.device, stream: Any) -> None:
        for step in self.steps:
            kind = type(step)
            if kind is bytes:
                batch.run(step, self.pack(*at), stream)
            elif kind is Launch:
                self._launch(step, held, at, device, stream)
            elif kind is Zeros:
                self._tensor(held, step.place, device).zero_()
            else:
                args, kwargs = tree_map(lambda x: self._argument(held, x, device), step.arguments)
                result = step.function(*args, **kwargs)
                if step.made is not None:
                    held[step.made], at[step.made] = result, result.data_ptr()

    def _launch(
        self, step: Launch, held: list[Tensor | None], at: list[int], device: torch.device, stream: Any
    ) -> None:
        arguments = step.arguments.copy()
        if step.compiled is None:
            for n, place in step.tensors:
                arguments[n] = self._tensor(held, place, device)
            step.kernel[step.grid](*arguments, **step.options)
            return
        for n, place in step.tensors:
            arguments[n] = at[place.buffer] + place.offset if place.buffer >= 0 else 0
        start.provide_memory()
        step.compiled[step.grid + (1,) * (3 - len(step.grid))](*arguments, stream=stream)

    def _argument(self, held: list[Tensor | None], x: Any, device: torch.device) -> Any:
        return self._tensor(held, x, device) if isinstance(x, Place) else x

    def _tensor(self, held: list[Tensor | None], place: Place, device: torch.device) -> Tensor:
        if place.buffer < 0:
            return torch.empty(place.size, dtype=place.dtype, device=device)
        x = held[place.buffer]
        assert x is not None
        if self.how[place.buffer] == (place.size, place.stride, place.dtype) and not place.offset:
            return x
        if x.dtype != place.dtype:
            return _cut(x, place)
        return x.as_strided(place.size, place.stride, x.storage_offset() + place.offset // x.element_size())


def _batched(steps: list[Any], functions: tuple[int, int] | None) -> list[Any]:
    """Launches and zeros that follow each other as one program, where the driver's functions are at hand."""
    if functions is None:
        return steps
    found: list[Any] = []
    part: list[list[int]] = []

    def flush() -> None:
        if part:
            found.append(batch.program(part, functions))
            part.clear()

    for step in steps:
        made = None
        if isinstance(step, Launch) and step.compiled is not None:
            places = {n: (place.buffer, place.offset) if place.buffer >= 0 else (-1, 0) for n, place in step.tensors}
            memory = None if step.memory is None else (step.memory.buffer, step.memory.offset)
            made = batch.kernel_step(step.compiled, step.grid, step.arguments, places, memory)
        elif isinstance(step, Zeros):
            made = batch.zero_step((step.place.buffer, step.place.offset), step.bytes)
        if made is None:
            flush()
            found.append(step)
        else:
            part.append(made)
    flush()
    return found


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


def repeated(
    work: Work, tensors: Sequence[Tensor | None], flags: tuple[Any, ...], kept: int | None = None, at_once: bool = False
) -> tuple[Any, ...]:
    """``work(*tensors, *flags)``: its host code the first two times a layout is met, and again without it.

    Args:
        work: allocates, launches and calls operators of torch, and reads no value of a tensor.
        tensors: the first one is; None where there is none. Nothing is written to them.
        flags: hashable.
        kept: from this result on they may come as one :class:`Bundle`, and do once the layout is known.
        at_once: writes it down the first time already.

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
    found = _known.get(key, 1 if at_once else None)
    if found is None:
        if len(_known) >= LAYOUTS:
            _known.clear()
        _known[key] = 1
    elif found == 1:
        recorder = Recorder(tensors, _limit(query.device))
        with recorder:
            results = tuple(work(*tensors, *flags))
        _known[key] = _finished(recorder, len(tensors), results, kept) or 2
        return results
    elif found != 2:
        return found(tensors, addresses)
    return tuple(work(*tensors, *flags))


def _finished(recorder: Recorder, inputs: int, results: Sequence[Tensor | None], kept: int | None) -> Replay | None:
    """What was recorded; None where it cannot be done again."""
    if recorder.failed is not None:
        return None
    try:
        return Replay(recorder, inputs, [None if x is None else recorder.place(x) for x in results], kept)
    except CannotRepeat:
        return None
    finally:
        recorder.give_up("over")
