"""How tensors lie in one piece of memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .recording import Buffer, Place

#: Where a piece of memory begins: a multiple of this many bytes, as torch's own allocations do.
ALIGNMENT = 512


@dataclass(frozen=True, eq=False)
class Layout:
    """How tensors lie in one piece of memory; a recording has one object of it.

    ``after`` has the recordings of the pass that reads it: by the layouts of what that one is given besides, and flags.
    """

    places: tuple[Place | None, ...]
    after: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def tensors(self, memory: Tensor) -> list[Tensor | None]:
        return [None if place is None else cut(memory, place) for place in self.places]


@dataclass(frozen=True, eq=False)
class Bundle:
    """What only the backward pass reads, in one piece of memory."""

    memory: Tensor
    layout: Layout


def cut(memory: Tensor, place: Place) -> Tensor:
    """The tensor at a place in a piece of bytes."""
    last = sum((size - 1) * step for size, step in zip(place.size, place.stride, strict=True)) + 1
    piece = memory[place.offset : place.offset + last * place.dtype.itemsize].view(place.dtype)
    return piece.as_strided(place.size, place.stride)


class Memory:
    """How buffers lie in one allocation."""

    bytes = 0

    def add(self, buffer: Buffer) -> int:
        """The offset of the next buffer."""
        offset = self.bytes
        self.bytes += -(-buffer.bytes // ALIGNMENT) * ALIGNMENT
        return offset
