"""What a stream remembers: the states at its boundaries, and, for resuming after a kill, how far it has come.

A journal is a folder. ``journal.safetensors`` is replaced atomically, after the sinks and the boundary states
have reached the disk: it never says more than what is there. What lies beyond it is written again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from race_attention.state import RaceState, read_safetensors, write_atomically

_FORMAT = "race_attention.stream.1"


@dataclass
class Entry:
    """A line of the journal: numbers and tensors."""

    numbers: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix`` and a dot, without it."""
        return {n[len(prefix) + 1 :]: x for n, x in self.tensors.items() if n.startswith(prefix + ".")}


class Journal:
    """Of one pass. Without a folder it remembers nothing.

    Args:
        folder: made if need be; a journal of another computation in it is an error.
        fingerprint: says which computation this is.
        every: segments between entries.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, fingerprint: str, every: int = 1):
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"journal_every: got {every!r}, allowed is an integer, 1 or more")
        self.path = None if folder is None else Path(folder) / "journal.safetensors"
        self.fingerprint, self.every = fingerprint, every
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def due(self, done: int) -> bool:
        """Whether to make an entry after ``done`` segments."""
        return self.path is not None and done % self.every == 0

    def read(self) -> Entry | None:
        """The last entry, or None.

        Raises:
            ValueError: it is of another computation.
        """
        if self.path is None or not self.path.exists():
            return None
        tensors, metadata = read_safetensors(self.path, _FORMAT)
        if metadata["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"journal: {self.path.parent} has the journal of another stream (other hyperplanes, beta, options or "
                f"number of segments); allowed is that of this one, or an empty folder"
            )
        return Entry(json.loads(metadata["numbers"]), tensors)

    def write(self, numbers: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replaces the entry."""
        from safetensors.torch import save

        if self.path is None:
            return
        metadata = {"format": _FORMAT, "fingerprint": self.fingerprint, "numbers": json.dumps(numbers)}
        whole = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        write_atomically(self.path, save(whole, metadata))


def fingerprint_of(*parts: object) -> str:
    """A digest of tensors, numbers and strings."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{list(part.shape)} {part.dtype}".encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(part).encode())
        digest.update(b"|")
    return digest.hexdigest()


class Boundaries:
    """The states before segments: all, or before every n-th; in memory, or in a file.

    States are kept as records of bytes, in memory in a few large blocks: thousands of small tensors that stay
    between large ones that go keep an allocator from reusing the gaps (1 GB in a million tokens, seen with
    glibc and segments of 16 MB).

    Args:
        every: n.
        device: where states wait; None where they are.
        file: keeps them there instead.
        count: of segments, where it is known: all are then one block.
    """

    def __init__(
        self,
        every: int,
        device: torch.device | str | None = None,
        file: Path | None = None,
        count: int | None = None,
    ):
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"keep_every: got {every!r}, allowed is an integer, 1 or more")
        self.every, self.device, self.file = every, device, file
        self._next_block = 64 if count is None else max(1, -(-count // every))
        self._blocks: list[Tensor] = []  # [records, bytes of a record] uint8
        self._places: list[tuple[int, int]] = []  # of each record: block, row
        if file is not None:
            file.touch()

    def put(self, index: int, state: RaceState) -> None:
        """Keeps the state before segment ``index`` if it is one to keep; states come in order."""
        if index % self.every:
            return
        record = torch.cat([x.detach().contiguous().flatten().view(torch.uint8) for x in state.tensors().values()])
        number = index // self.every
        if self.file is not None:
            with open(self.file, "r+b") as file:
                file.seek(number * len(record))
                file.write(record.cpu().numpy().tobytes())
            return
        if number == len(self._places):
            block, row = (self._places[-1][0], self._places[-1][1] + 1) if self._places else (0, 0)
            if not self._blocks or row == len(self._blocks[block]):
                device = record.device if self.device is None else self.device
                self._blocks.append(torch.empty(self._next_block, len(record), dtype=torch.uint8, device=device))
                self._next_block, block, row = 2 * self._next_block, len(self._blocks) - 1, 0
            self._places.append((block, row))
        block, row = self._places[number]
        self._blocks[block][row] = record

    def get(self, index: int, like: RaceState) -> RaceState:
        """The state before segment ``index``, a multiple of ``every``; ``like`` has its shapes and device."""
        number, fields = index // self.every, like.tensors()
        sizes = [x.numel() * x.element_size() for x in fields.values()]
        if self.file is not None:
            with open(self.file, "rb") as file:
                file.seek(number * sum(sizes))
                record = torch.frombuffer(bytearray(file.read(sum(sizes))), dtype=torch.uint8).to(like.device)
        else:
            block, row = self._places[number]
            record = self._blocks[block][row].to(like.device)
        parts = zip(fields.items(), record.split(sizes), strict=True)
        return RaceState(**{name: part.clone().view(x.dtype).view(x.shape) for (name, x), part in parts})

    def sync(self) -> None:
        """Returns when what was put would survive a crash."""
        if self.file is not None:
            with open(self.file, "r+b") as file:
                os.fsync(file.fileno())
