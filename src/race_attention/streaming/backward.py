"""``stream_attention_backward``: exact gradients of attention over a stream.

The adjoint of a state is a suffix sum, as the state is a prefix sum. Causal: one sweep from the last segment
back; each segment is computed again from the state before it, and its backward pass takes the gradient of its
outputs and of its final state, and yields that of its initial state. Not causal: all queries read one state, so
one sweep sums the gradient of that state over the queries, and one gives it to the keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from race_attention.state import RaceState

from .adjoint import Adjoint, StreamGradients, pair_of
from .attention import stream_attention
from .core import Core, StreamForward, empty_state, tensors_of
from .journal import Journal
from .progress import Progress, progress_of
from .segments import Indexed, Segment, Source, as_segment, indexed, read_twice
from .sinks import as_sink
from .transfer import Writer, moved


def stream_attention_backward(
    source: Any,
    grad_source: Any,
    hyperplanes: Tensor,
    beta: float | Tensor,
    *,
    forward: StreamForward | None = None,
    grad_sink: Any = None,
    grad_state: RaceState | tuple[Tensor, Tensor] | None = None,
    causal: bool = False,
    scale: float = 1.0,
    log_decay: Tensor | None = None,
    initial_state: RaceState | None = None,
    readout: str = "global",
    backend: str = "auto",
    count: int | None = None,
    device: torch.device | str | None = None,
    keep_every: int = 1,
    keep_on: torch.device | str | None = None,
    journal: str | os.PathLike[str] | None = None,
    journal_every: int = 1,
    progress: bool | Callable[[str, int, int | None], object] = False,
) -> StreamGradients:
    """Exact gradients of :func:`stream_attention`, one segment in memory at a time.

    Args:
        source: the segments again, the same ones. Causal: read from the last back, so a sequence, a function of
            the index with ``count``, or an :class:`ArraySource`. Not causal: anything but an iterator.
        grad_source: the gradients of the outputs, [B, t, H, Dv] for each segment of ``source``; likewise.
        hyperplanes, beta, causal, scale, log_decay, initial_state, readout, backend, device: as given to
            :func:`stream_attention`.
        forward: what that returned, with ``keep_every`` if causal: saves the sweep that finds the states.
        grad_sink: takes the gradients of the segments: a function of (:class:`SegmentGradients`, position of the
            first token), a .safetensors path (arrays "query", "key", "value", and "log_decay" where segments
            have it; causal only), a dict of sinks or arrays for these names, a :class:`Sink`, or None.
        grad_state: the gradient of the final state's mass and value_sum. Default 0.
        count: the number of segments, where the sources are functions of the index.
        keep_every: without ``forward``: keeps the state before every n-th segment, and finds those between by
            one more sweep.
        keep_on: where those states wait.
        journal, journal_every, progress: as for :func:`stream_attention`.

    Returns:
        :class:`StreamGradients` of the parameters and the initial state.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed; among them a source that
            cannot be read twice.
    """
    core = Core(hyperplanes, beta, causal, scale, log_decay, readout, backend)
    read: Callable[..., Source] = indexed if causal else read_twice
    made, grads = read("source", source, count), read("grad_source", grad_source, count)
    sink = as_sink(grad_sink)
    place = None if device is None else torch.device(device)
    if forward is not None and not isinstance(forward, StreamForward):
        raise TypeError(f"forward: got {type(forward).__name__}, allowed is what stream_attention returned")
    if causal and forward is not None and forward.boundaries is None:
        raise ValueError("forward: got one without boundary states, allowed is what keep_every=n gives")
    if forward is None:
        forward = stream_attention(
            made,
            hyperplanes,
            beta,
            causal=causal,
            scale=scale,
            log_decay=log_decay,
            initial_state=initial_state,
            readout=readout,
            backend=backend,
            device=device,
            keep_every=keep_every if causal else None,
            keep_on=keep_on,
            journal=None if journal is None else Path(journal) / "states",
            journal_every=journal_every,
            progress=progress,
        )
    given = tensors_of("initial_state", initial_state)
    if grad_state is not None:
        given += tuple(pair_of(grad_state, forward.state))
    key = core.fingerprint("backward", made.count, forward.query_lengths, forward.key_lengths, *given)
    with ExitStack() as stack:
        bar = stack.enter_context(progress_of(progress))
        writer = stack.enter_context(Writer(sink))
        cls = _Causal if causal else _BothWays
        run = cls(core.to(place), made, grads, sink, writer, forward, place, Journal(journal, key, journal_every))
        return run.run(grad_state, bar)


class _Causal(Adjoint):
    """From the last segment back."""

    states: list[RaceState]  # before the segments of the present block

    def run(self, grad_state: RaceState | tuple[Tensor, Tensor] | None, bar: Progress) -> StreamGradients:
        """From the last segment back."""
        self.states = []
        total = len(self.forward.query_lengths)
        assert isinstance(self.source, Indexed)
        assert isinstance(self.grads, Indexed)
        if len(self.source) != total or len(self.grads) != total:
            raise ValueError(
                f"grad_source: got {len(self.grads)} segments for {len(self.source)} of the source and {total} of the "
                f"forward pass, allowed are equal numbers"
            )
        _, left = self.begin("backward", total, grad_state)
        start = sum(self.forward.query_lengths[:left])
        ends = self.pairs(self._backwards(left))
        for index, box in zip(reversed(range(left)), ends, strict=True):
            start -= self.forward.query_lengths[index]
            self._segment(index, *self.checked(index, box), start)
            bar.show("backward", total - index, total)
            if self.journal.due(total - index):
                self.enter("backward", index)
        self.enter("backward", 0)
        return self.end()

    def _backwards(self, left: int) -> Iterator[tuple[Any, Any]]:
        assert isinstance(self.source, Indexed)
        assert isinstance(self.grads, Indexed)
        for index in reversed(range(left)):
            yield as_segment(self.source[index]), self.grads[index]

    def _segment(self, index: int, segment: Segment, grad: Tensor, start: int) -> None:
        state = self._before(index, segment)
        leaves, tokens = self.leaves(state), self.tokens_of(segment, "query", "key", "value", "log_decay")
        with torch.enable_grad():
            inside, core = self.inside(leaves, state)
            segment = segment._replace(**tokens)
            if self.adjoint is None:
                roots, cotangents = [core.attend_only(segment, inside)], [grad]
            else:
                out, after = core.attend(segment, inside)
                roots, cotangents = [out, after.mass, after.value_sum], [grad, *self.adjoint]
        self.differentiate(roots, cotangents, leaves, tokens, start)
        self.adjoint = [self.sums.pop("mass"), self.sums.pop("value_sum")]

    def _before(self, index: int, segment: Segment) -> RaceState:
        """The state before a segment: kept, or computed from the one kept before it."""
        boundaries = self.forward.boundaries
        assert boundaries is not None
        assert isinstance(self.source, Indexed)
        if not self.states:
            first = index - index % boundaries.every
            state = boundaries.get(first, empty_state(self.core, segment))
            self.states = [state]
            with torch.no_grad():
                for between in range(first, index):
                    earlier = as_segment(self.source[between])
                    here = next(moved(iter([earlier]), segment.value.device, ahead=False))
                    state = self.core.absorb(here, state)
                    self.states.append(state)
        return self.states.pop()


class _BothWays(Adjoint):
    """The queries, whose gradients of the state add up; then the keys, which receive the sum."""

    def run(self, grad_state: RaceState | tuple[Tensor, Tensor] | None, bar: Progress) -> StreamGradients:
        """The queries, whose gradients of the state add up; then the keys, which receive the sum."""
        phase, begin = self.begin("queries", 0, grad_state)
        total = len(self.forward.query_lengths)
        if phase == "queries":
            start = sum(self.forward.query_lengths[:begin])
            for index, box in enumerate(self.pairs(self._forwards(begin, True)), begin):
                self._queries(*self.checked(index, box), start)
                start += self.forward.query_lengths[index]
                bar.show("queries", index + 1, total)
                if self.journal.due(index + 1):
                    self.enter("queries", index + 1)
            begin = 0
        start = sum(self.forward.key_lengths[:begin])
        for index, box in enumerate(self.pairs(self._forwards(begin, False)), begin):
            self._keys(self.checked(index, box, with_grad=False)[0], start)
            start += self.forward.key_lengths[index]
            bar.show("keys", index + 1, total)
            if self.journal.due(index + 1):
                self.enter("keys", index + 1)
        self.enter("keys", total)
        return self.end()

    def _forwards(self, begin: int, with_grads: bool) -> Iterator[tuple[Any, Any]]:
        segments = map(as_segment, self.source.walk(begin))
        if not with_grads:
            return map(_without, segments)
        return _together(segments, self.grads.walk(begin))

    def _queries(self, segment: Segment, grad: Tensor, start: int) -> None:
        state = self.forward.state.to(segment.value.device)
        leaves, tokens = self.leaves(state), self.tokens_of(segment, "query")
        with torch.enable_grad():
            inside, core = self.inside(leaves, state)
            assert inside is not None
            out = core.read(segment._replace(**tokens), inside)
        self.differentiate([out], [grad], leaves, tokens, start)
        new = [self.sums.pop("mass"), self.sums.pop("value_sum")]
        self.adjoint = new if self.adjoint is None else [a + b for a, b in zip(self.adjoint, new, strict=True)]

    def _keys(self, segment: Segment, start: int) -> None:
        if self.adjoint is None:
            self.adjoint = [torch.zeros_like(x) for x in (self.forward.state.mass, self.forward.state.value_sum)]
        leaves, tokens = self.leaves(None), self.tokens_of(segment, "key", "value")
        with torch.enable_grad():
            _, core = self.inside(leaves, None)
            after = core.absorb(segment._replace(**tokens), None)
        self.differentiate([after.mass, after.value_sum], self.adjoint, leaves, tokens, start)


def _together(segments: Iterator[Segment], grads: Iterator[Any]) -> Iterator[tuple[Segment, Any]]:
    """As zip, which would keep each pair until the next is made."""
    while True:
        segment, grad = next(segments, None), next(grads, None)
        if segment is None or grad is None:
            if segment is not None or grad is not None:
                raise ValueError("grad_source: got another number of segments than the source, allowed is the same")
            return
        yield segment, grad
        del segment, grad


def _without(segment: Segment) -> tuple[Segment, None]:
    return segment, None
