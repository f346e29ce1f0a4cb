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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from race_attention.state import RaceState, state_dtype

from .attention import stream_attention
from .core import Core, StreamForward, empty_state
from .journal import Journal
from .progress import Progress, progress_of
from .segments import Indexed, Segment, Source, as_segment, indexed, read_twice
from .sinks import NullSink, Sink, as_sink
from .transfer import Writer, moved


@dataclass(frozen=True)
class StreamGradients:
    """What :func:`stream_attention_backward` returns; sums over all segments, in float64.

    Attributes:
        hyperplanes: of the given hyperplanes' shape.
        beta: of beta's shape; a scalar where beta was a number.
        log_decay: [G], where log_decay was given per head.
        initial_mass: [B, G, L, R], the gradient of the initial state (of no tokens, where none was given).
        initial_value_sum: [B, G, L, R, Dv].
    """

    hyperplanes: Tensor
    beta: Tensor
    log_decay: Tensor | None
    initial_mass: Tensor
    initial_value_sum: Tensor


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
    key = core.fingerprint("backward", made.count, forward.query_lengths, forward.key_lengths)
    with ExitStack() as stack:
        bar = stack.enter_context(progress_of(progress))
        writer = stack.enter_context(Writer(sink))
        run = _Run(core.to(place), made, grads, sink, writer, forward, place, Journal(journal, key, journal_every))
        return run.causal(grad_state, bar) if causal else run.both_ways(grad_state, bar)


class _Run:
    """One call of :func:`stream_attention_backward`."""

    def __init__(
        self,
        core: Core,
        source: Source,
        grads: Source,
        sink: Sink,
        writer: Writer,
        forward: StreamForward,
        device: torch.device | None,
        journal: Journal,
    ):
        self.core, self.source, self.grads, self.sink, self.writer = core, source, grads, sink, writer
        self.forward, self.device, self.journal = forward, device, journal
        self.wanted = not isinstance(sink, NullSink)
        self.states: list[RaceState] = []  # before the segments of the present block
        self.parameters: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.adjoint: list[Tensor] | None = None  # of mass and value_sum

    # ---- causal -----------------------------------------------------------------------------------------

    def causal(self, grad_state: RaceState | tuple[Tensor, Tensor] | None, bar: Progress) -> StreamGradients:
        """From the last segment back."""
        total = len(self.forward.query_lengths)
        assert isinstance(self.source, Indexed)
        assert isinstance(self.grads, Indexed)
        if len(self.source) != total or len(self.grads) != total:
            raise ValueError(
                f"grad_source: got {len(self.grads)} segments for {len(self.source)} of the source and {total} of the "
                f"forward pass, allowed are equal numbers"
            )
        _, left = self._begin("backward", total, grad_state)
        start = sum(self.forward.query_lengths[:left])
        ends = self._pairs(lambda: iter(self._backwards(left)))
        for index, (segment, grad) in zip(reversed(range(left)), ends, strict=True):
            start -= segment.query.shape[1]
            self._segment(index, segment, grad, start)
            bar.show("backward", total - index, total)
            if self.journal.due(total - index):
                self._enter("backward", index)
        self._enter("backward", 0)
        return self._end()

    def _backwards(self, left: int) -> Iterator[tuple[Any, Any]]:
        assert isinstance(self.source, Indexed)
        assert isinstance(self.grads, Indexed)
        for index in reversed(range(left)):
            yield as_segment(self.source[index]), self.grads[index]

    def _segment(self, index: int, segment: Segment, grad: Tensor, start: int) -> None:
        state = self._before(index, segment)
        leaves, tokens = self._leaves(state), self._tokens(segment, "query", "key", "value", "log_decay")
        with torch.enable_grad():
            inside, core = self._inside(leaves, state)
            segment = segment._replace(**tokens)
            if self.adjoint is None:
                roots, cotangents = [core.attend_only(segment, inside)], [grad]
            else:
                out, after = core.attend(segment, inside)
                roots, cotangents = [out, after.mass, after.value_sum], [grad, *self.adjoint]
        self._differentiate(roots, cotangents, leaves, tokens, start)
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

    # ---- not causal -------------------------------------------------------------------------------------

    def both_ways(self, grad_state: RaceState | tuple[Tensor, Tensor] | None, bar: Progress) -> StreamGradients:
        """The queries, whose gradients of the state add up; then the keys, which receive the sum."""
        phase, begin = self._begin("queries", 0, grad_state)
        total = len(self.forward.query_lengths)
        if phase == "queries":
            start = sum(self.forward.query_lengths[:begin])
            for index, (segment, grad) in enumerate(self._pairs(lambda: self._forwards(begin, True)), begin):
                self._queries(segment, grad, start)
                start += segment.query.shape[1]
                bar.show("queries", index + 1, total)
                if self.journal.due(index + 1):
                    self._enter("queries", index + 1)
            begin = 0
        start = sum(self.forward.key_lengths[:begin])
        for index, (segment, _) in enumerate(self._pairs(lambda: self._forwards(begin, False)), begin):
            self._keys(segment, start)
            start += segment.key.shape[1]
            bar.show("keys", index + 1, total)
            if self.journal.due(index + 1):
                self._enter("keys", index + 1)
        self._enter("keys", total)
        return self._end()

    def _forwards(self, begin: int, with_grads: bool) -> Iterator[tuple[Any, Any]]:
        segments = (as_segment(item) for item in self.source.walk(begin))
        if not with_grads:
            return ((segment, None) for segment in segments)
        return zip(segments, self.grads.walk(begin), strict=True)

    def _queries(self, segment: Segment, grad: Tensor, start: int) -> None:
        state = self.forward.state.to(segment.value.device)
        leaves, tokens = self._leaves(state), self._tokens(segment, "query")
        with torch.enable_grad():
            inside, core = self._inside(leaves, state)
            assert inside is not None
            out = core.read(segment._replace(**tokens), inside)
        self._differentiate([out], [grad], leaves, tokens, start)
        new = [self.sums.pop("mass"), self.sums.pop("value_sum")]
        self.adjoint = new if self.adjoint is None else [a + b for a, b in zip(self.adjoint, new, strict=True)]

    def _keys(self, segment: Segment, start: int) -> None:
        if self.adjoint is None:
            self.adjoint = [torch.zeros_like(x) for x in (self.forward.state.mass, self.forward.state.value_sum)]
        leaves, tokens = self._leaves(None), self._tokens(segment, "key", "value")
        with torch.enable_grad():
            _, core = self._inside(leaves, None)
            after = core.absorb(segment._replace(**tokens), None)
        self._differentiate([after.mass, after.value_sum], self.adjoint, leaves, tokens, start)

    # ---- both -------------------------------------------------------------------------------------------

    def _pairs(self, items: Callable[[], Iterator[tuple[Any, Any]]]) -> Iterator[tuple[Segment, Any]]:
        """Segments with the gradients of their outputs, on the device."""
        ahead = getattr(self.source, "device", None) is None
        for segment, grad in moved(items(), self.device, ahead):
            if grad is not None and not isinstance(grad, Tensor):
                raise TypeError(f"grad_source: got a {type(grad).__name__}, allowed is a Tensor for each segment")
            yield segment, grad

    def _leaves(self, state: RaceState | None) -> dict[str, Tensor]:
        """What gradients are summed for: parameters and the state before."""
        core = self.core
        if not self.parameters:
            device = core.hyperplanes.device
            wide = torch.float64 if core.hyperplanes.dtype == torch.float64 else torch.float32
            self.parameters["hyperplanes"] = core.hyperplanes
            self.parameters["beta"] = torch.as_tensor(core.beta, dtype=None, device=device)
            if not isinstance(core.beta, Tensor):
                self.parameters["beta"] = self.parameters["beta"].to(wide)
            if core.log_decay is not None:
                self.parameters["log_decay"] = core.log_decay
            for name, x in self.parameters.items():
                self.sums.setdefault(f"d.{name}", torch.zeros(x.shape, dtype=state_dtype(device), device=device))
        leaves = {name: x.detach().requires_grad_() for name, x in self.parameters.items()}
        if state is not None:
            leaves |= {name: getattr(state, name).detach().requires_grad_() for name in ("mass", "value_sum")}
        return leaves

    def _tokens(self, segment: Segment, *names: str) -> dict[str, Tensor]:
        """The segment's tensors whose gradients somebody wants, as leaves."""
        given = {name: getattr(segment, name) for name in names if self.wanted}
        return {name: x.detach().requires_grad_() for name, x in given.items() if x is not None}

    def _inside(self, leaves: dict[str, Tensor], state: RaceState | None) -> tuple[RaceState | None, Core]:
        """The state and the core made of the leaves."""
        core = self.core
        made = Core(
            leaves["hyperplanes"],
            leaves["beta"],
            core.causal,
            core.scale,
            leaves.get("log_decay"),
            core.readout,
            core.backend,
        )
        if state is None:
            return None, made
        return RaceState(leaves["mass"], leaves["value_sum"], state.log_decay, state.tokens), made

    def _differentiate(
        self,
        roots: list[Tensor],
        cotangents: list[Tensor],
        leaves: dict[str, Tensor],
        tokens: dict[str, Tensor],
        start: int,
    ) -> None:
        """Adds to the sums, leaves the state's gradients under "mass" and "value_sum", feeds the sink."""
        cotangents = [c.to(device=r.device, dtype=r.dtype) for r, c in zip(roots, cotangents, strict=True)]
        inputs = leaves | {f"token.{name}": x for name, x in tokens.items()}
        found = torch.autograd.grad(roots, list(inputs.values()), cotangents, allow_unused=True, materialize_grads=True)
        gradients = dict(zip(inputs, found, strict=True))
        del found
        for name in self.parameters:
            self.sums[f"d.{name}"] += gradients[name]
        for name in ("mass", "value_sum"):
            if name in gradients:
                self.sums[name] = gradients[name]
        if tokens:
            self.writer.write({name: gradients[f"token.{name}"] for name in tokens}, start)

    def _begin(
        self, phase: str, position: int, grad_state: RaceState | tuple[Tensor, Tensor] | None
    ) -> tuple[str, int]:
        """Where to go on: the phase and its segment."""
        entry = self.journal.read()
        lengths: dict[str, int | None] = {"query": self.forward.tokens}
        lengths |= dict.fromkeys(("key", "value"), sum(self.forward.key_lengths))
        if self.core.causal and self._has_log_decay():
            lengths["log_decay"] = self.forward.tokens
        self.sink.begin(lengths, resume=entry is not None)
        device = self.core.hyperplanes.device
        if entry is not None:
            self.sink.restore(entry.part("sink"))
            self.sums = {f"d.{name}": x.to(device) for name, x in entry.part("d").items()}
            adjoint = entry.part("adjoint")
            self.adjoint = [adjoint["mass"].to(device), adjoint["value_sum"].to(device)] if adjoint else None
            return entry.numbers["phase"], entry.numbers["next"]
        if grad_state is not None:
            pair = (grad_state.mass, grad_state.value_sum) if isinstance(grad_state, RaceState) else grad_state
            like = (self.forward.state.mass, self.forward.state.value_sum)
            for name, x, y in zip(("mass", "value_sum"), pair, like, strict=True):
                if x.shape != y.shape:
                    raise ValueError(f"grad_state: got {name} of shape {list(x.shape)}, allowed is {list(y.shape)}")
            self.adjoint = [x.to(device=device, dtype=y.dtype) for x, y in zip(pair, like, strict=True)]
        return phase, position

    def _has_log_decay(self) -> bool:
        first = next(iter(self.source.walk()), None)
        return first is not None and as_segment(first).log_decay is not None

    def _enter(self, phase: str, position: int) -> None:
        """All segments done so far are safe from here on."""
        if self.journal.path is None:
            return
        self.writer.drain()
        self.sink.flush()
        tensors = dict(self.sums) | {f"sink.{name}": x for name, x in self.sink.state().items()}
        if self.adjoint is not None:
            tensors |= {"adjoint.mass": self.adjoint[0], "adjoint.value_sum": self.adjoint[1]}
        self.journal.write({"phase": phase, "next": position}, tensors)

    def _end(self) -> StreamGradients:
        self.writer.drain()
        self.sink.finish()
        if not self.parameters:
            self._leaves(None)
        adjoint = self.adjoint or [torch.zeros_like(x) for x in (self.forward.state.mass, self.forward.state.value_sum)]
        sums = self.sums
        return StreamGradients(sums["d.hyperplanes"], sums["d.beta"], sums.get("d.log_decay"), adjoint[0], adjoint[1])
