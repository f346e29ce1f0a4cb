"""``stream_attention``: RACE Attention over tokens that come segment by segment and are never all in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from race_attention.state import RaceState

from .core import Core, StreamForward, empty_state, tensors_of
from .journal import Boundaries, Entry, Journal
from .progress import Progress, progress_of
from .segments import Segment, Source, as_segment, as_source, read_twice
from .sinks import NullSink, Sink, as_sink
from .transfer import Writer, boxed, moved


@torch.no_grad()
def stream_attention(
    source: Any,
    hyperplanes: Tensor,
    beta: float | Tensor,
    *,
    sink: Any = None,
    causal: bool = False,
    scale: float = 1.0,
    log_decay: Tensor | None = None,
    initial_state: RaceState | None = None,
    readout: str = "global",
    backend: str = "auto",
    count: int | None = None,
    tokens: int | None = None,
    device: torch.device | str | None = None,
    keep_every: int | None = None,
    keep_on: torch.device | str | None = None,
    journal: str | os.PathLike[str] | None = None,
    journal_every: int = 1,
    progress: bool | Callable[[str, int, int | None], object] = False,
) -> StreamForward:
    """Attention over a stream of segments: Algorithm 2 of the paper if causal, else Algorithm 1.

    The same numbers as :func:`race_attention` on all tokens at once, up to rounding, with one segment in memory
    at a time (two on a GPU, where the next is copied while one is computed). Causal: one sweep over the source.
    Not causal: two, one for the state of all keys, one for the outputs. No gradients are recorded; for those see
    :func:`stream_attention_backward`.

    Args:
        source: segments, in order: a sequence or an iterable of (query, key, value) or :class:`Segment`, an
            iterator (causal only), a function of the index with ``count``, a function without arguments that
            returns an iterable, an :class:`ArraySource` over arrays or files.
        hyperplanes, beta, causal, scale, readout, backend: as for :func:`race_attention`.
        log_decay: [G]; per token it comes with the segments.
        sink: takes the outputs, [B, t, H, Dv] a segment: a function of (out, position of its first token), the
            path of a .npy or .safetensors file (array "out"), an array [B, T, H, Dv] to be filled (a tensor, a
            NumPy array or memory map), a :class:`Sink`, or None: then outputs are not even computed.
        initial_state: of what came before: earlier tokens if causal, more keys otherwise.
        count: the number of segments, where ``source`` is a function of the index.
        tokens: how many in all, where a file sink has to know and the source does not.
        device: where to compute; default where the segments are.
        keep_every: keeps the state before every n-th segment, for the backward pass. Default: none.
        keep_on: where those states wait, "cpu" for example. Default: where they are. With a journal, in a file.
        journal: a folder; a stream that is killed and started again with the same arguments continues after the
            last segment entered there. A finished one returns at once. Other hyperplanes, options or states are
            refused; other tokens in as many segments are not seen.
        journal_every: segments between entries.
        progress: a bar (needs rich), or a function of (phase, done, total).

    Returns:
        :class:`StreamForward`: the state after all tokens, the segments' lengths, the kept states.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
    """
    core = Core(hyperplanes, beta, causal, scale, log_decay, readout, backend)
    read = as_source if causal else read_twice
    made = read("source", source, count)
    place = None if device is None else torch.device(device)
    before = tensors_of("initial_state", initial_state)
    run = _Run(core.to(place), made, as_sink(sink), place, tokens, journal, journal_every, keep_every, keep_on, before)
    with ExitStack() as stack:
        bar = stack.enter_context(progress_of(progress))
        run.writer = stack.enter_context(Writer(run.sink))
        return run.causal(initial_state, bar) if causal else run.both_ways(initial_state, bar)


class _Run:
    """One call of :func:`stream_attention`."""

    writer: Writer

    def __init__(
        self,
        core: Core,
        source: Source,
        sink: Sink,
        device: torch.device | None,
        tokens: int | None,
        journal: str | os.PathLike[str] | None,
        journal_every: int,
        keep_every: int | None,
        keep_on: torch.device | str | None,
        before: tuple[Tensor, ...],
    ):
        self.core, self.source, self.sink, self.device = core, source, sink, device
        self.tokens = source.tokens if tokens is None else tokens
        kind = ("forward", source.count, self.tokens, keep_every, *before)
        self.journal = Journal(journal, core.fingerprint(*kind), journal_every)
        self.forward = StreamForward(None)  # type: ignore[arg-type]
        if keep_every is not None and core.causal:
            file = None if journal is None else Path(journal) / "boundaries.bin"
            self.forward.boundaries = Boundaries(keep_every, keep_on, file, source.count)

    def causal(self, state: RaceState | None, bar: Progress) -> StreamForward:
        """One sweep: outputs and states together."""
        entry = self._begin()
        if entry is not None:
            state, begin = self._resume(entry), entry.numbers["next"]
            if entry.numbers["phase"] == "done":
                return self._finished(state)
        else:
            begin = 0
        wanted = not isinstance(self.sink, NullSink)
        start = self.forward.tokens
        for index, box in self._segments(begin):
            segment = box.pop()
            state = self._first(state, segment)
            if self.forward.boundaries is not None:
                self.forward.boundaries.put(index, state)
            if wanted:
                out, state = self.core.attend(segment, state)
                self.writer.write({"out": out}, start)
                del out
            else:
                state = self.core.absorb(segment, state)
            start += segment.query.shape[1]
            self._note(segment)
            bar.show("forward", index + 1, self.source.count)
            del segment
            if self.journal.due(index + 1):
                self._enter("forward", index + 1, state)
        return self._end(state)

    def both_ways(self, state: RaceState | None, bar: Progress) -> StreamForward:
        """Two sweeps: the state of all keys, then the outputs."""
        entry = self._begin()
        phase, begin = "keys", 0
        if entry is not None:
            state, phase, begin = self._resume(entry), entry.numbers["phase"], entry.numbers["next"]
            if phase == "done":
                return self._finished(state)
        if phase == "keys":
            for index, box in self._segments(begin):
                segment = box.pop()
                state = self.core.absorb(segment, self._first(state, segment))
                self._note(segment)
                del segment
                bar.show("keys", index + 1, self.source.count)
                if self.journal.due(index + 1):
                    self._enter("keys", index + 1, state)
            begin = 0
        if state is not None and not isinstance(self.sink, NullSink):
            start = sum(self.forward.query_lengths[:begin])
            for index, box in self._segments(begin):
                segment = box.pop()
                self.writer.write({"out": self.core.read(segment, state)}, start)
                start += segment.query.shape[1]
                del segment
                bar.show("queries", index + 1, self.source.count or len(self.forward.query_lengths))
                if self.journal.due(index + 1):
                    self._enter("queries", index + 1, state)
        return self._end(state)

    def _segments(self, begin: int) -> Iterator[tuple[int, list[Segment]]]:
        """Numbers and segments, each in a box to be emptied: iterators keep what they gave until the next is made."""
        ahead = getattr(self.source, "device", None) is None
        items = moved(map(as_segment, self.source.walk(begin)), self.device, ahead)
        return enumerate(map(boxed, items), begin)

    def _first(self, state: RaceState | None, segment: Segment) -> RaceState:
        if state is None:
            return empty_state(self.core, segment)
        return state if state.device == segment.value.device else state.to(segment.value.device)

    def _note(self, segment: Segment) -> None:
        self.forward.query_lengths.append(segment.query.shape[1])
        self.forward.key_lengths.append(segment.key.shape[1])

    def _begin(self) -> Entry | None:
        entry = self.journal.read()
        if entry is None or entry.numbers["phase"] != "done":
            self.sink.begin({"out": self.tokens}, resume=entry is not None)
        return entry

    def _resume(self, entry: Entry) -> RaceState:
        self.sink.restore(entry.part("sink"))
        self.forward.query_lengths = entry.tensors["query_lengths"].tolist()
        self.forward.key_lengths = entry.tensors["key_lengths"].tolist()
        state = RaceState(**entry.part("state"))
        return state if self.device is None else state.to(self.device)

    def _enter(self, phase: str, next_segment: int, state: RaceState) -> None:
        """Everything before ``next_segment`` is safe from here on."""
        if self.journal.path is None:
            return
        self.writer.drain()
        self.sink.flush()
        if self.forward.boundaries is not None:
            self.forward.boundaries.sync()
        tensors = {f"state.{name}": x for name, x in state.tensors().items()}
        tensors |= {f"sink.{name}": x for name, x in self.sink.state().items()}
        tensors["query_lengths"] = torch.tensor(self.forward.query_lengths, dtype=torch.int64)
        tensors["key_lengths"] = torch.tensor(self.forward.key_lengths, dtype=torch.int64)
        self.journal.write({"phase": phase, "next": next_segment}, tensors)

    def _end(self, state: RaceState | None) -> StreamForward:
        if state is None:
            raise ValueError("source: got no segments and no initial_state, allowed is one or more segments")
        if self.tokens not in (None, self.forward.tokens):
            raise ValueError(f"tokens: got {self.tokens}, allowed is what the source had, {self.forward.tokens}")
        self.writer.drain()
        self.sink.finish()
        self._enter("done", len(self.forward.key_lengths), state)
        return self._finished(state)

    def _finished(self, state: RaceState) -> StreamForward:
        self.forward.state = state
        return self.forward
