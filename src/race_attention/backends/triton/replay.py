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
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from . import batch, start
from .launch import on
from .memory import Bundle, Layout, Memory, cut
from .recording import Buffer, CannotRepeat, Launch, Operator, Place, Recorder, Zeros

#: Layouts that are kept. One more, and all are forgotten: a call that never meets a layout twice records nothing.
LAYOUTS = 1024
#: Scratch memory of all of a pass at once is at most this part of the device's.
SHARE = 32
Work = Callable[..., Sequence[Any]]


class Replay:
    """A pass of one layout, to be done again.

    Memory is numbered: the inputs, then what is allocated (the scratch memory, what is bundled, each result), then the
    results of operators. All is allocated before the first step.
    """

    def __init__(self, recorder: Recorder, inputs: int, results: list[Place | None], kept: int | None) -> None:
        self.inputs = inputs
        own = {place.buffer for place in results[:kept] if place is not None}
        moved = {place.buffer for place in results[len(results) if kept is None else kept :] if place is not None}
        if kept is not None and (not moved or not moved <= set(recorder.allocated) or moved & own):
            kept, own, moved = None, own | moved, set()
        self._number(recorder, own, moved)
        steps = [self._renumbered(step) for step in recorder.steps]
        places = [place and self._moved(place) for place in results]
        self.results, self.bundle = places[:kept], None if kept is None else Layout(tuple(places[kept:]))
        self._check(steps, places[:kept])
        functions = batch.driver() if any(isinstance(x, Launch) and x.compiled for x in steps) else None
        self.steps = batch.programs(steps, functions)
        self.pack = struct.Struct(f"={self.count}q").pack
        self._simplify()

    def _number(self, recorder: Recorder, own: set[int], moved: set[int]) -> None:
        """Where each buffer lies: the number of its memory, and how far from the beginning."""
        buffers = recorder.buffers
        self.at = {n: (n, 0) for n in range(self.inputs)}
        self.how = [(buffer.size, buffer.stride, buffer.dtype) for buffer in buffers[: self.inputs]]
        self.allocations: list[tuple[Any, ...]] = []
        used = [n for n in recorder.allocated if buffers[n].bytes]
        self._piece(buffers, [n for n in used if n not in moved and n not in own])
        self.bundled = len(self.allocations)
        self._piece(buffers, [n for n in used if n in moved])
        for n in used:
            if n in own:
                self.at[n] = self.inputs + len(self.allocations), 0
                self.allocations.append((buffers[n].size, buffers[n].stride, buffers[n].dtype))
        self.how += self.allocations
        for n in range(self.inputs, len(buffers)):
            if n not in self.at and n not in recorder.allocated:  # the result of an operator
                self.at[n] = len(self.how), 0
                self.how.append((buffers[n].size, buffers[n].stride, buffers[n].dtype))
        self.count = len(self.how)

    def _piece(self, buffers: list[Buffer], numbers: list[int]) -> None:
        """One allocation of several buffers."""
        if numbers:
            memory = Memory()
            for n in numbers:
                self.at[n] = self.inputs + len(self.allocations), memory.add(buffers[n])
            self.allocations.append(((memory.bytes,), (1,), torch.uint8))

    def _simplify(self) -> None:
        """Where all steps are one program and each result is an allocation: which program, and which allocations."""
        self.program: bytes | None = None
        self.whole: list[int | None] = []
        for place in self.results:
            if place is not None:
                number = place.buffer - self.inputs
                how = place.size, place.stride, place.dtype
                if place.offset or not 0 <= number < len(self.allocations) or self.allocations[number] != how:
                    return
            self.whole.append(None if place is None else place.buffer - self.inputs)
        if len(self.steps) == 1 and isinstance(self.steps[0], bytes):
            self.program = self.steps[0]

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
        if self.program is not None:
            with on(device):
                batch.run(self.program, self.pack(*at), _stream(device))
            results = [None if n is None else made[n] for n in self.whole]
            return (*results, Bundle(made[self.bundled], self.bundle)) if self.bundle is not None else tuple(results)
        held = [*tensors, *made]
        if len(at) < self.count:
            more = self.count - len(at)
            at += [0] * more
            held += [None] * more
        with on(device):
            self._run(held, at, device, _stream(device))
        results = [None if place is None else self._tensor(held, place, device) for place in self.results]
        return (*results, Bundle(made[self.bundled], self.bundle)) if self.bundle is not None else tuple(results)

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
            return cut(x, place)
        return x.as_strided(place.size, place.stride, x.storage_offset() + place.offset // x.element_size())


def _stream(device: torch.device) -> int:
    """The current stream of a device, which is current; of the CPU none."""
    return 0 if device.type == "cpu" else int(triton.runtime.driver.active.get_current_stream(device.index))


_known: dict[tuple[Any, ...], Any] = {}
#: How often all was forgotten.
generation = 0


def forget() -> None:
    """Forgets all recordings: configurations have changed."""
    global generation
    generation += 1
    _known.clear()


@functools.cache
def _limit(device: torch.device) -> int:
    """The most bytes that a recorded pass allocates."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // SHARE
    return 1 << 30


def repeated(
    work: Work,
    tensors: Sequence[Tensor | None],
    flags: tuple[Any, ...],
    kept: int | None = None,
    at_once: tuple[dict[tuple[Any, ...], Replay], tuple[Any, ...]] | None = None,
) -> tuple[Any, ...]:
    """``work(*tensors, *flags)``: its host code the first two times a layout is met, and again without it.

    Args:
        work: allocates, launches and calls operators of torch, and reads no value of a tensor.
        tensors: the first one is; None where there is none. Nothing is written to them.
        flags: hashable.
        kept: from this result on they may come as one :class:`Bundle`, and do once the layout is known.
        at_once: writes it down the first time already, and leaves the recording in this table under this name.

    Returns:
        the tensors that ``work`` returns, or None in their place.
    """
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    one = [address for address in addresses if address]
    same = None if len(set(one)) == len(one) else tuple(map(addresses.index, addresses))  # the same tensor twice
    query = tensors[0]
    assert query is not None
    key = _key_of(work, flags, tensors, addresses, same)
    found = _known.get(key, None if at_once is None else 1)
    if found is None:
        if len(_known) >= LAYOUTS:
            _known.clear()
        _known[key] = 1
    elif found == 1:
        recorder = Recorder(tensors, _limit(query.device))
        with recorder:
            results = tuple(work(*tensors, *flags))
        made = _finished(recorder, len(tensors), results, kept)
        _known[key] = made or 2
        if made is not None and at_once is not None and same is None:
            at_once[0][at_once[1]] = made
        return results
    elif found != 2:
        return found(tensors, addresses)
    return tuple(work(*tensors, *flags))


def _key_of(
    work: Work, flags: tuple[Any, ...], tensors: Sequence[Tensor | None], addresses: list[int], same: Any
) -> tuple[Any, ...]:
    layout = [
        None if x is None else (x.shape, x.stride(), x.dtype, address & 15)
        for x, address in zip(tensors, addresses, strict=True)
    ]
    assert tensors[0] is not None
    return (work, flags, tensors[0].get_device(), same, *layout)


def key_of_aligned(work: Work, flags: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """For :func:`recording_of`: tensors like these, at multiples of 16 bytes."""
    return _key_of(work, flags, tensors, [0] * len(tensors), None)


def recording_of(key: tuple[Any, ...]) -> Replay | None:
    """The recording that :func:`repeated` has made.

    It reads its tensors only, so that two of them may also be one.
    """
    found = _known.get(key)
    return found if isinstance(found, Replay) else None


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
