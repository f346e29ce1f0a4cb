"""RaceState: a run of tokens, summarised in constant size, and the algebra of runs."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .arguments import size
from .features import FLOOR

_FORMAT = "race_attention.RaceState.1"


def state_dtype(device: torch.device) -> torch.dtype:
    """float64, in which 2**27 tokens still count; float32 on devices that have no float64 (mps)."""
    return torch.float32 if device.type == "mps" else torch.float64


def row_index(rows: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """Rows to select: [n] integers, or [B] booleans; none at all of an empty list.

    Raises:
        TypeError: neither.
    """
    index = torch.as_tensor(rows, device=device)
    if index.numel() == 0 and index.dtype != torch.bool:
        index = index.long()
    if index.ndim != 1 or index.is_floating_point() or index.is_complex():
        raise TypeError(f"rows: got {index.dtype} of shape {list(index.shape)}, allowed is [n] integers or [B] bool")
    return index


@dataclass(frozen=True, eq=False)
class RaceState:
    """The state of RACE Attention over a run of tokens: all that later queries need of it.

    A state holds sums, so the states of adjacent runs merge into the state of both: ``left + right`` is
    exp(right.log_decay) * left + right. States are values: no method changes one in place.

    Attributes:
        mass: [B, G, L, R], sum over keys of phi_{l,r}(k_j), decayed.
        value_sum: [B, G, L, R, Dv], sum over keys of phi_{l,r}(k_j) v_j, decayed.
        log_decay: [B, G], the run's total log_decay; 0 without decay.
        tokens: [B] int64, the keys that took part.

    B counts sequences: the batch, or the packed sequences of ``cu_seqlens``. Floating fields share one dtype,
    float32 or wider; :func:`race_attention` returns float64, since plain float32 addition of single tokens
    stops counting at 2**24.

    Raises:
        TypeError, ValueError: fields whose dtypes or shapes do not belong together.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("mass", "value_sum", "log_decay", "tokens")

    mass: Tensor
    value_sum: Tensor
    log_decay: Tensor
    tokens: Tensor

    def __post_init__(self) -> None:
        shape = self.mass.shape
        if len(shape) != 4:
            raise ValueError(f"mass: got shape {list(shape)}, allowed is [B, G, L, R]")
        expected = {"value_sum": (*shape, "Dv"), "log_decay": shape[:2], "tokens": shape[:1]}
        for name, allowed in expected.items():
            given = getattr(self, name).shape
            if len(given) != len(allowed) or any(a != g for a, g in zip(allowed, given, strict=True) if a != "Dv"):
                raise ValueError(f"{name}: got shape {list(given)}, allowed is {list(allowed)}")
        for name in ("mass", "value_sum", "log_decay"):
            dtype = getattr(self, name).dtype
            if dtype not in (torch.float32, torch.float64) or dtype != self.mass.dtype:
                raise TypeError(f"{name}: got {dtype}, allowed is one of float32 and float64 for all of a state")
        if self.tokens.dtype != torch.int64:
            raise TypeError(f"tokens: got {self.tokens.dtype}, allowed is torch.int64")
        devices = {str(x.device) for x in self.tensors().values()}
        if len(devices) > 1:
            raise ValueError(f"state: got fields on {sorted(devices)}, allowed is one device")

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={list(x.shape)}" for name, x in self.tensors().items())
        return f"RaceState({shapes}, dtype={self.dtype}, device='{self.device}')"

    @classmethod
    def zeros(
        cls,
        batch: int,
        heads: int,
        tables: int,
        planes: int,
        value_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> RaceState:
        """The state of no tokens, neutral in ``+``: B, G, L, P and Dv give the shape (R = 2**P).

        Raises:
            TypeError, ValueError: a size that is none.
        """
        size("batch", batch, least=0)
        sizes = {"heads": heads, "tables": tables, "planes": planes, "value_dim": value_dim}
        for name, given in sizes.items():
            size(name, given)
        device = torch.device(device) if device is not None else torch.get_default_device()
        dtype = dtype or state_dtype(device)
        mass = torch.zeros(batch, heads, tables, 2**planes, dtype=dtype, device=device)
        return cls(
            mass=mass,
            value_sum=torch.zeros(*mass.shape, value_dim, dtype=dtype, device=device),
            log_decay=torch.zeros(batch, heads, dtype=dtype, device=device),
            tokens=torch.zeros(batch, dtype=torch.int64, device=device),
        )

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.mass.shape[0]

    @property
    def device(self) -> torch.device:
        """Where all fields are."""
        return self.mass.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the floating fields."""
        return self.mass.dtype

    def merge(self, later: RaceState) -> RaceState:
        """The state of this run followed by ``later``, which must be of the same hash.

        Raises:
            TypeError: not a RaceState. ValueError: another shape, dtype or device.
        """
        if not isinstance(later, RaceState):
            raise TypeError(f"merge: got {type(later).__name__}, allowed is RaceState")
        for name in ("value_sum", "mass"):
            given, allowed = getattr(later, name), getattr(self, name)
            if given.shape != allowed.shape or given.dtype != allowed.dtype or given.device != allowed.device:
                raise ValueError(
                    f"merge: got {name} {list(given.shape)} {given.dtype} on {given.device}, "
                    f"allowed is {list(allowed.shape)} {allowed.dtype} on {allowed.device}"
                )
        left = later.log_decay.exp()[..., None, None]
        return RaceState(
            mass=left * self.mass + later.mass,
            value_sum=left[..., None] * self.value_sum + later.value_sum,
            log_decay=self.log_decay + later.log_decay,
            tokens=self.tokens + later.tokens,
        )

    def __add__(self, later: object) -> RaceState:
        if not isinstance(later, RaceState):
            return NotImplemented
        return self.merge(later)

    def detach(self) -> RaceState:
        """The same numbers, cut from the autograd graph."""
        return self._map(Tensor.detach)

    def clone(self) -> RaceState:
        """A copy with memory of its own."""
        return self._map(Tensor.clone)

    def requires_grad_(self, requires_grad: bool = True) -> RaceState:
        """Marks mass, value_sum and log_decay as leaves whose gradients are wanted; returns self."""
        for name in ("mass", "value_sum", "log_decay"):
            getattr(self, name).requires_grad_(requires_grad)
        return self

    def to(self, *args: Any, **kwargs: Any) -> RaceState:
        """Moves or converts, with the arguments of ``torch.Tensor.to``; tokens stay int64."""
        moved = {name: x.to(*args, **kwargs) for name, x in self.tensors().items() if x.is_floating_point()}
        return RaceState(**moved, tokens=self.tokens.to(moved["mass"].device))

    def select(self, rows: Tensor | Sequence[int]) -> RaceState:
        """The given rows in the given order, repeated ones too: beams forked, dropped, reordered.

        Args:
            rows: [n] integers in [-B, B), or [B] booleans.

        Raises:
            IndexError: a row does not exist.
        """
        index = row_index(rows, self.device)
        return self._map(lambda x: x[index])

    def save(
        self, path: str | os.PathLike[str], *, hyperplanes: Tensor, beta: float | Tensor, scale: float = 1.0
    ) -> None:
        """Writes the state as safetensors, atomically, with the fingerprint of its hash.

        Args:
            path: of the file; a file already there is replaced only by a whole one.
            hyperplanes: [G or 1, L, P, D], those that the state was made with.
            beta: likewise.
            scale: likewise.
        """
        from safetensors.torch import save

        tensors = {name: x.detach().cpu().contiguous() for name, x in self.tensors().items()}
        metadata = {"format": _FORMAT, "fingerprint": self.fingerprint(hyperplanes, beta, scale)}
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
    ) -> RaceState:
        """Reads a state written by :meth:`save`.

        Args:
            path: of the file.
            hyperplanes: [G or 1, L, P, D], those that later tokens are hashed with.
            beta: likewise, a number, a scalar tensor or [G].
            scale: likewise.
            device: where the state is wanted.

        Returns:
            The state, in the dtype in which it was saved.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is cut short, is no state, or is of another hash (hyperplanes, beta or scale).
        """
        tensors, metadata = read_safetensors(path, _FORMAT)
        if set(tensors) != set(cls.FIELDS):
            raise ValueError(f"{path}: got tensors {sorted(tensors)}, allowed are {list(cls.FIELDS)}")
        state = cls(**tensors)
        state.check_fingerprint(path, metadata, hyperplanes, beta, scale)
        return state.to(device)

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name."""
        return {name: getattr(self, name) for name in self.FIELDS}

    def check_fingerprint(
        self,
        path: str | os.PathLike[str],
        metadata: dict[str, str],
        hyperplanes: Tensor,
        beta: float | Tensor,
        scale: float,
    ) -> None:
        """Raises ValueError where a file's metadata name another hash than the given one."""
        given, expected = metadata.get("fingerprint"), self.fingerprint(hyperplanes, beta, scale)
        if given != expected:
            raise ValueError(
                f"{path}: got a state of another hash (fingerprint {given}), allowed is one made with the given "
                f"hyperplanes, beta and scale (fingerprint {expected})"
            )

    def fingerprint(self, hyperplanes: Tensor, beta: float | Tensor, scale: float = 1.0) -> str:
        """A digest of all that decides in which bucket a token falls: 64 hexadecimal digits.

        Args:
            hyperplanes: [G or 1, L, P, D].
            beta: a number, a scalar tensor or [G].
            scale: of the projections.

        Raises:
            ValueError: hyperplanes that cannot have made this state.
        """
        _, groups, tables, buckets = self.mass.shape
        if hyperplanes.ndim != 4 or hyperplanes.shape[0] not in (1, groups) or hyperplanes.shape[1] != tables:
            raise ValueError(
                f"hyperplanes: got shape {list(hyperplanes.shape)}, allowed is [{groups} or 1, {tables}, P, D]"
            )
        if 2 ** hyperplanes.shape[2] != buckets:
            raise ValueError(f"hyperplanes: got {hyperplanes.shape[2]} planes, allowed is log2({buckets}) of them")
        return _digest(hyperplanes, beta, scale, groups)

    def _map(self, function: Callable[[Tensor], Tensor]) -> RaceState:
        return RaceState(**{name: function(x) for name, x in self.tensors().items()})


def _digest(hyperplanes: Tensor, beta: float | Tensor, scale: float, heads: int) -> str:
    """Equal for equal hashes however given: hyperplanes shared or repeated, beta a number or a tensor; in float32."""
    planes = hyperplanes.detach().to("cpu", torch.float32)
    betas = torch.as_tensor(beta).detach().to("cpu", torch.float32).reshape(-1)
    digest = hashlib.sha256(f"{FLOOR} {float(torch.tensor(scale, dtype=torch.float32))}".encode())
    for tensor in (planes.expand(heads, *planes.shape[1:]), betas.expand(heads)):
        digest.update(f"{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file so that whoever reads ``path``, after a crash too, finds the old or the new, whole."""
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with open(unfinished, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)


def sync_directory(path: Path) -> None:
    """Makes a renaming in a directory outlast a loss of power, where the system can."""
    if os.name != "posix":
        return
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(directory)


def read_safetensors(path: str | os.PathLike[str], form: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file whose metadata say ``format: form``.

    Raises:
        FileNotFoundError: there is no such file. ValueError: cut short, foreign, or of another format.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: got a file cut short or no safetensors file ({error})") from error
    if metadata.get("format") != form:
        raise ValueError(f"{path}: got format {metadata.get('format')!r}, allowed is {form!r}")
    return tensors, metadata
