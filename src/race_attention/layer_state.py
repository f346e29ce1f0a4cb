"""The state of a layer: the core's, the short convolution's tail, the position."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .state import RaceState, read_safetensors, row_index, write_atomically

_FORMAT = "race_attention.RaceAttentionState.1"


@dataclass(frozen=True, eq=False)
class RaceAttentionState:
    """The state of a causal :class:`RaceAttention` after some tokens; constant in size.

    Attributes:
        core: the :class:`RaceState` of the keys so far, B rows.
        position: [B] int64, tokens so far, padding not counted; rotary positions go on from it.
        conv: [B, conv_size - 1, channels], what the short convolution saw last, or None without it.
    """

    core: RaceState
    position: Tensor
    conv: Tensor | None = None

    def __repr__(self) -> str:
        conv = None if self.conv is None else list(self.conv.shape)
        return f"RaceAttentionState(core={self.core}, position={list(self.position.shape)}, conv={conv})"

    def detach(self) -> RaceAttentionState:
        """The same numbers, cut from the autograd graph."""
        return self._map(lambda state: state.detach(), Tensor.detach)

    def clone(self) -> RaceAttentionState:
        """A copy with memory of its own."""
        return self._map(lambda state: state.clone(), Tensor.clone)

    def select(self, rows: Tensor | Sequence[int]) -> RaceAttentionState:
        """The given rows, as :meth:`RaceState.select`: for beam search."""
        index = row_index(rows, self.position.device)
        return self._map(lambda state: state.select(index), lambda x: x[index])

    def to(self, *args: Any, **kwargs: Any) -> RaceAttentionState:
        """Moves to a device, with the arguments of ``Tensor.to``; a dtype converts the core's state only."""
        core = self.core.to(*args, **kwargs)
        return RaceAttentionState(
            core, self.position.to(core.device), None if self.conv is None else self.conv.to(core.device)
        )

    def save(
        self, path: str | os.PathLike[str], *, hyperplanes: Tensor, beta: float | Tensor, scale: float = 1.0
    ) -> None:
        """Writes safetensors, atomically: ``state.save(path, **layer.hash())``.

        Args:
            path, hyperplanes, beta, scale: as for :meth:`RaceState.save`.
        """
        from safetensors.torch import save

        tensors = {f"core.{name}": x for name, x in self.core.tensors().items()} | {"position": self.position}
        if self.conv is not None:
            tensors["conv"] = self.conv
        tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        metadata = {"format": _FORMAT, "fingerprint": self.core.fingerprint(hyperplanes, beta, scale)}
        write_atomically(path, save(tensors, metadata))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        hyperplanes: Tensor,
        beta: float | Tensor,
        scale: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> RaceAttentionState:
        """Reads what :meth:`save` wrote: ``RaceAttentionState.load(path, **layer.hash())``.

        Args:
            path, hyperplanes, beta, scale, device: as for :meth:`RaceState.load`.

        Raises:
            FileNotFoundError: no such file. ValueError: cut short, foreign, or the state of another hash.
        """
        tensors, metadata = read_safetensors(path, _FORMAT)
        core = {name.removeprefix("core."): x for name, x in tensors.items() if name.startswith("core.")}
        if set(core) != set(RaceState.FIELDS) or "position" not in tensors:
            raise ValueError(f"{path}: got tensors {sorted(tensors)}, allowed are those of a RaceAttentionState")
        state = cls(RaceState(**core), tensors["position"], tensors.get("conv"))
        state.core.check_fingerprint(path, metadata, hyperplanes, beta, scale)
        return state.to(device)

    def _map(
        self, of_core: Callable[[RaceState], RaceState], of_tensor: Callable[[Tensor], Tensor]
    ) -> RaceAttentionState:
        conv = None if self.conv is None else of_tensor(self.conv)
        return RaceAttentionState(of_core(self.core), of_tensor(self.position), conv)
