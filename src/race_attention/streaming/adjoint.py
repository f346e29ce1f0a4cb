"""What the two backward passes over a stream share: leaves, sums of gradients, the journal, the sink."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from race_attention.forms import is_tensor
from race_attention.state import RaceState, state_dtype

from .core import Core, StreamForward
from .journal import Journal
from .segments import Segment, Source, as_segment
from .sinks import NullSink, Sink
from .transfer import Writer, boxed, moved


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


class Adjoint:
    """One call of :func:`stream_attention_backward`: what it sums, keeps, reads and writes."""

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
        self.parameters: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.adjoint: list[Tensor] | None = None  # of mass and value_sum

    def pairs(self, items: Iterator[tuple[Any, Any]]) -> Iterator[list[tuple[Segment, Any]]]:
        """Boxes with a segment and the gradient of its outputs, on the device."""
        ahead = getattr(self.source, "device", None) is None
        return map(boxed, moved(items, self.device, ahead))

    def checked(self, index: int, box: list[tuple[Segment, Any]], with_grad: bool = True) -> tuple[Segment, Any]:
        """What is in a box, emptied: as many tokens as the forward pass had in this segment, and their gradients."""
        segment, grad = box.pop()
        lengths = list(zip(self.forward.query_lengths, self.forward.key_lengths, strict=True))
        given, allowed = (segment.query.shape[1], segment.key.shape[1]), lengths[index : index + 1]
        if [given] != allowed:
            raise ValueError(f"source: got {given} queries and keys in segment {index}, allowed is {allowed}")
        if not with_grad:
            return segment, None
        is_tensor("grad_source", grad)
        shape = (*segment.query.shape[:3], segment.value.shape[3])
        if grad.shape != shape:
            raise ValueError(f"grad_source: got shape {list(grad.shape)} in segment {index}, allowed is {list(shape)}")
        return segment, grad

    def leaves(self, state: RaceState | None) -> dict[str, Tensor]:
        """What gradients are summed for: parameters and the state before."""
        core = self.core
        if not self.parameters:
            device = core.hyperplanes.device
            self.parameters["hyperplanes"] = core.hyperplanes
            wide = None if isinstance(core.beta, Tensor) else state_dtype(device)  # float32 holds no 1.3
            self.parameters["beta"] = torch.as_tensor(core.beta, dtype=wide, device=device)
            if core.log_decay is not None:
                self.parameters["log_decay"] = core.log_decay
            for name, x in self.parameters.items():
                self.sums.setdefault(f"d.{name}", torch.zeros(x.shape, dtype=state_dtype(device), device=device))
        leaves = {name: x.detach().requires_grad_() for name, x in self.parameters.items()}
        if state is not None:
            leaves |= {name: getattr(state, name).detach().requires_grad_() for name in ("mass", "value_sum")}
        return leaves

    def tokens_of(self, segment: Segment, *names: str) -> dict[str, Tensor]:
        """The segment's tensors whose gradients somebody wants, as leaves."""
        given = {name: getattr(segment, name) for name in names if self.wanted}
        return {name: x.detach().requires_grad_() for name, x in given.items() if x is not None}

    def inside(self, leaves: dict[str, Tensor], state: RaceState | None) -> tuple[RaceState | None, Core]:
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

    def differentiate(
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

    def begin(self, phase: str, position: int, grad_state: RaceState | tuple[Tensor, Tensor] | None) -> tuple[str, int]:
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
            self.adjoint = [x.to(device) for x in pair_of(grad_state, self.forward.state)]
        return phase, position

    def _has_log_decay(self) -> bool:
        first = next(iter(self.source.walk()), None)
        return first is not None and as_segment(first).log_decay is not None

    def enter(self, phase: str, position: int) -> None:
        """All segments done so far are safe from here on."""
        if self.journal.path is None:
            return
        self.writer.drain()
        self.sink.flush()
        tensors = dict(self.sums) | {f"sink.{name}": x for name, x in self.sink.state().items()}
        if self.adjoint is not None:
            tensors |= {"adjoint.mass": self.adjoint[0], "adjoint.value_sum": self.adjoint[1]}
        self.journal.write({"phase": phase, "next": position}, tensors)

    def end(self) -> StreamGradients:
        """All is done: the results."""
        self.writer.drain()
        self.sink.finish()
        if not self.parameters:
            self.leaves(None)
        adjoint = self.adjoint or [torch.zeros_like(x) for x in (self.forward.state.mass, self.forward.state.value_sum)]
        sums = self.sums
        return StreamGradients(sums["d.hyperplanes"], sums["d.beta"], sums.get("d.log_decay"), adjoint[0], adjoint[1])


def pair_of(grad_state: RaceState | tuple[Tensor, Tensor], state: RaceState) -> list[Tensor]:
    """The gradients of a state's mass and value_sum, of its dtype.

    Raises:
        TypeError, ValueError: of something else.
    """
    pair = (grad_state.mass, grad_state.value_sum) if isinstance(grad_state, RaceState) else grad_state
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"grad_state: got {type(pair).__name__}, allowed is a RaceState, or two tensors")
    like = (state.mass, state.value_sum)
    for name, x, y in zip(("mass", "value_sum"), pair, like, strict=True):
        is_tensor(f"grad_state: {name}", x)
        if x.shape != y.shape:
            raise ValueError(f"grad_state: got {name} of shape {list(x.shape)}, allowed is {list(y.shape)}")
    return [x.to(dtype=y.dtype) for x, y in zip(pair, like, strict=True)]
