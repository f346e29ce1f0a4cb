"""Where results go: a function, files, nowhere.

A file sink writes under another name, ``.NAME.unfinished``, and takes its own name when every token is there: a
file of that name is whole, whatever happened before. What a resumed stream finds in an unfinished file beyond
its journal is written again.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from race_attention.state import sync_directory

from .files import FileArray, create, open_npy, open_safetensors


class SegmentGradients(NamedTuple):
    """What a gradient sink that is a function receives: a segment's gradients.

    A causal pass hands on all at once; one that is not hands on the query's in one sweep (key and value None),
    and key's and value's in another. ``log_decay`` is None unless segments carry one.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    log_decay: Tensor | None = None


class Sink(ABC):
    """Takes the results of segments, each with the position of its first token.

    Attributes:
        on_cpu: whether pieces are wanted on the CPU; otherwise they come where they were computed.
    """

    on_cpu = False

    def begin(self, tokens: Mapping[str, int | None], resume: bool) -> None:
        """Called first, with the length of each array to come, where known; ``resume``: after a kill."""
        return

    @abstractmethod
    def write(self, pieces: Mapping[str, Tensor], start: int) -> None:
        """A segment's pieces [B, t, ...] by name: "out"; or "query", "key", "value", "log_decay" for gradients."""

    def flush(self) -> None:
        """Returns when what was written would survive a crash."""
        return

    def finish(self) -> None:
        """Called when all was written."""
        return

    def state(self) -> dict[str, Tensor]:
        """What the sink itself has to remember for a resumed stream (a running sum, for example)."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what :meth:`state` gave."""
        return


class NullSink(Sink):
    """Nowhere."""

    def write(self, pieces: Mapping[str, Tensor], start: int) -> None:
        """Nothing."""


class FunctionSink(Sink):
    """Calls ``function(out, start)``, or ``function(SegmentGradients, start)`` for gradients."""

    def __init__(self, function: Callable[[Any, int], object]):
        self.function = function

    def write(self, pieces: Mapping[str, Tensor], start: int) -> None:
        """Hands on."""
        self.function(pieces["out"] if "out" in pieces else SegmentGradients(**pieces), start)


class ArraySink(Sink):
    """An array [B, T, ...] with room for all: a tensor, a NumPy array, a writable memory map."""

    def __init__(self, array: Any):
        self.array = array
        self.tensor: Tensor = array if isinstance(array, Tensor) else torch.from_numpy(array)
        if not self.tensor.is_floating_point():
            raise TypeError(f"sink: got an array of {self.tensor.dtype}, allowed is a floating dtype")
        self.on_cpu = self.tensor.device.type == "cpu"

    def write(self, pieces: Mapping[str, Tensor], start: int) -> None:
        """Copies the one piece into its place."""
        if len(pieces) != 1:
            raise ValueError(f"sink: got one array for {sorted(pieces)}, allowed is a dict with an array for each")
        (piece,) = pieces.values()
        room = self.tensor[:, start : start + piece.shape[1]]
        if room.shape != piece.shape:
            given = [*piece.shape[:1], f"{start} to {start + piece.shape[1]}", *piece.shape[2:]]
            raise ValueError(f"sink: got an array of shape {list(self.tensor.shape)} for a piece {given}")
        room.copy_(piece)

    def flush(self) -> None:
        """Of a memory map."""
        if hasattr(self.array, "flush"):
            self.array.flush()


class FileSink(Sink):
    """A .npy file (one array) or a .safetensors file (several), written as segments come.

    Args:
        path: its ending says which. An existing file is replaced when the new one is whole.
        tokens: T of all arrays, needed where the source does not know its length.
        arrays: names of the arrays to keep; default all that come. A .npy file takes one.

    Raises:
        ValueError: another ending.
    """

    on_cpu = True

    def __init__(self, path: str | os.PathLike[str], tokens: int | None = None, arrays: tuple[str, ...] | None = None):
        self.path, self.tokens, self.names = Path(path), tokens, arrays
        if self.path.suffix not in (".npy", ".safetensors"):
            raise ValueError(f"sink: got {str(path)!r}, allowed are names that end in .npy or .safetensors")
        self.unfinished = self.path.with_name(f".{self.path.name}.unfinished")
        self.arrays: dict[str, FileArray] = {}
        self._lengths: dict[str, int | None] = {}

    def begin(self, tokens: Mapping[str, int | None], resume: bool) -> None:
        """Opens the unfinished file again, or forgets one that is there."""
        self.arrays = {}
        self._lengths = {n: self.tokens or t for n, t in tokens.items() if self.names is None or n in self.names}
        unknown = [name for name, length in self._lengths.items() if length is None]
        if unknown:
            raise ValueError(f"sink: {self.path} needs the number of tokens: FileSink(path, tokens=...)")
        if self.path.suffix == ".npy" and len(self._lengths) != 1:
            raise ValueError(
                f"sink: {self.path} takes one array of {sorted(self._lengths)}; name it (arrays=...), or use "
                f".safetensors"
            )
        if not resume:
            return
        found = self.unfinished if self.unfinished.exists() else self.path  # it may have been finished just before
        if found.exists():
            if self.path.suffix == ".npy":
                self.arrays = {next(iter(self._lengths)): open_npy(found)}
            else:
                self.arrays = open_safetensors(found)

    def write(self, pieces: Mapping[str, Tensor], start: int) -> None:
        """Writes; the file is made when every array's shape is known."""
        kept = {name: x for name, x in pieces.items() if name in self._lengths}
        if not self.arrays:
            lengths = {name: length or 0 for name, length in self._lengths.items()}
            shapes = {n: ([x.shape[0], lengths[n], *x.shape[2:]], x.dtype) for n, x in kept.items()}
            if len(shapes) < len(self._lengths):
                raise ValueError(
                    f"sink: {self.path} got {sorted(kept)} alone, allowed are {sorted(self._lengths)} together; a pass "
                    f"that is not causal yields gradients in two sweeps: give a dict of sinks, a file for each name"
                )
            self.arrays = create(self.unfinished, shapes, kind=self.path.suffix)
        for name, x in kept.items():
            self.arrays[name].write(start, x)

    def flush(self) -> None:
        """Syncs the file."""
        for array in list(self.arrays.values())[:1]:  # all lie in one file
            array.sync()

    def finish(self) -> None:
        """Gives the file its name."""
        self.flush()
        if self.unfinished.exists():
            os.replace(self.unfinished, self.path)
            sync_directory(self.path.parent)
        self.arrays = {}


class SplitSink(Sink):
    """A sink for each name: {"query": FileSink("dq.npy"), "key": ...}."""

    def __init__(self, sinks: Mapping[str, Any]):
        self.sinks = {name: as_sink(sink) for name, sink in sinks.items()}
        self.on_cpu = any(sink.on_cpu for sink in self.sinks.values())

    def begin(self, tokens: Mapping[str, int | None], resume: bool) -> None:
        """Of each."""
        unknown = sorted(set(self.sinks) - set(tokens))
        if unknown:
            raise ValueError(f"sink: got sinks for {unknown}, allowed are {sorted(tokens)}")
        for name, sink in self.sinks.items():
            sink.begin({name: tokens[name]}, resume)

    def write(self, pieces: Mapping[str, Tensor], start: int) -> None:
        """To each its own."""
        for name, sink in self.sinks.items():
            if name in pieces:
                sink.write({name: pieces[name]}, start)

    def flush(self) -> None:
        """Of each."""
        for sink in self.sinks.values():
            sink.flush()

    def finish(self) -> None:
        """Of each."""
        for sink in self.sinks.values():
            sink.finish()

    def state(self) -> dict[str, Tensor]:
        """Of each, under its name."""
        return {f"{name}.{key}": x for name, sink in self.sinks.items() for key, x in sink.state().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Of each."""
        for name, sink in self.sinks.items():
            sink.restore({key[len(name) + 1 :]: x for key, x in state.items() if key.startswith(f"{name}.")})


def as_sink(given: Any) -> Sink:
    """The sink that an argument means: None, a Sink, a path of a file, an array, a dict of sinks, a function.

    Raises:
        TypeError: none of these.
    """
    if given is None:
        return NullSink()
    if isinstance(given, Sink):
        return given
    if isinstance(given, (str, os.PathLike)):
        return FileSink(given)
    if isinstance(given, Mapping):
        return SplitSink(given)
    if isinstance(given, Tensor) or hasattr(given, "__array_interface__"):
        return ArraySink(given)
    if callable(given):
        return FunctionSink(given)
    raise TypeError(
        f"sink: got {type(given).__name__}, allowed is None, a function, the path of a .npy or .safetensors file, "
        f"an array with room, a dict of sinks, or a Sink"
    )
