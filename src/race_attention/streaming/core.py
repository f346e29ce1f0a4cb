"""What the passes over a stream share: the hash and options, the lengths of segments, the call of the core."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from race_attention.attention import race_attention
from race_attention.forms import is_tensor
from race_attention.state import RaceState

from .journal import Boundaries, fingerprint_of
from .segments import Segment


@dataclass
class StreamForward:
    """What :func:`stream_attention` returns, and :func:`stream_attention_backward` starts from.

    Attributes:
        state: after all tokens; float64, constant in size.
        query_lengths: tokens of each segment.
        key_lengths: likewise of keys; the same lengths when causal.
        boundaries: the states before segments, where ``keep_every`` asked for them.
    """

    state: RaceState
    query_lengths: list[int] = field(default_factory=list)
    key_lengths: list[int] = field(default_factory=list)
    boundaries: Boundaries | None = None

    @property
    def tokens(self) -> int:
        """Queries in all."""
        return sum(self.query_lengths)


@dataclass(frozen=True)
class Core:
    """The core's arguments that do not change from segment to segment."""

    hyperplanes: Tensor
    beta: float | Tensor
    causal: bool
    scale: float
    log_decay: Tensor | None
    readout: str
    backend: str

    def __post_init__(self) -> None:
        is_tensor("hyperplanes", self.hyperplanes)
        if self.hyperplanes.ndim != 4:
            raise ValueError(f"hyperplanes: got shape {list(self.hyperplanes.shape)}, allowed is [G or 1, L, P, D]")
        if self.log_decay is not None:
            is_tensor("log_decay", self.log_decay)
        if self.log_decay is not None and self.log_decay.ndim != 1:
            raise ValueError(
                f"log_decay: got shape {list(self.log_decay.shape)}, allowed is [G]; per token it is of the segments"
            )

    def to(self, device: torch.device | None) -> Core:
        """With its tensors on the device."""

        def there(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) and device is not None else x

        return Core(
            there(self.hyperplanes),
            there(self.beta),
            self.causal,
            self.scale,
            there(self.log_decay),
            self.readout,
            self.backend,
        )

    def attend(self, segment: Segment, state: RaceState | None) -> tuple[Tensor, RaceState]:
        """Outputs of a segment after ``state``, and the state after it."""
        return self._call(segment, state, return_state=True)

    def attend_only(self, segment: Segment, state: RaceState | None) -> Tensor:
        """Outputs of a segment after ``state``."""
        return self._call(segment, state, return_state=False)

    def absorb(self, segment: Segment, state: RaceState | None) -> RaceState:
        """The state after a segment's keys, without outputs where the core has a way to leave them out."""
        if self.causal and (segment.log_decay is not None or self.log_decay is not None):
            return self.attend(segment, state)[1]
        # Without decay a state does not depend on order, so that the non-causal call without queries gives it.
        keys = segment._replace(query=segment.query[:, :0])
        return self._call(keys, state, return_state=True, causal=False)[1]

    def read(self, segment: Segment, state: RaceState) -> Tensor:
        """Outputs of a segment's queries from ``state`` alone (not causal)."""
        queries = Segment(segment.query, segment.key[:, :0], segment.value[:, :0])
        return self._call(queries, state, return_state=False, causal=False)

    def _call(self, segment: Segment, state: RaceState | None, return_state: bool, causal: bool | None = None) -> Any:
        if segment.log_decay is not None and self.log_decay is not None:
            raise ValueError("log_decay: got it per head and with the segments too, allowed is one of them")
        causal = self.causal if causal is None else causal
        decay = self.log_decay if segment.log_decay is None else segment.log_decay
        if self.causal and not causal:
            decay = None
        return race_attention(
            segment.query,
            segment.key,
            segment.value,
            self.hyperplanes,
            self.beta,
            causal=causal,
            scale=self.scale,
            log_decay=decay,
            key_mask=segment.key_mask,
            initial_state=state,
            return_state=return_state,
            readout=self.readout,
            backend=self.backend,
        )

    def fingerprint(self, *more: object) -> str:
        """A digest of all of it, and of ``more``."""
        fields = (self.hyperplanes, self.beta, self.causal, self.scale, self.log_decay, self.readout)
        return fingerprint_of(*fields, *more)


def tensors_of(name: str, state: RaceState | None) -> tuple[Tensor, ...]:
    """What a given state decides of a stream's results, for its fingerprint.

    Raises:
        TypeError: it is none.
    """
    if state is None:
        return ()
    if not isinstance(state, RaceState):
        raise TypeError(f"{name}: got {type(state).__name__}, allowed is RaceState")
    return tuple(state.tensors().values())


def empty_state(core: Core, segment: Segment) -> RaceState:
    """The state of no tokens, for segments like this one."""
    tables, planes = core.hyperplanes.shape[1:3]
    batch, _, groups, value_dim = segment.value.shape
    return RaceState.zeros(batch, groups, tables, planes, value_dim, device=segment.value.device)
