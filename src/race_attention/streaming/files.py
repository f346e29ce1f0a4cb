"""Arrays in files, read and written piece by piece: NumPy's .npy, and safetensors.

Plain reads and writes at offsets instead of a memory map: the pages of a map count as resident, and a stream of
terabytes would fill the memory with pages that are never looked at again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NUMPY = {
    "<f8": torch.float64,
    "<f4": torch.float32,
    "<f2": torch.float16,
    "<i8": torch.int64,
    "<i4": torch.int32,
    "|u1": torch.uint8,
    "|b1": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _SAFETENSORS.items()}
_DESCRIPTIONS = {dtype: name for name, dtype in _NUMPY.items()}


@dataclass(frozen=True)
class FileArray:
    """An array [B, T, ...] that lies row by row in a file.

    Attributes:
        path: of the file.
        offset: bytes before the first number.
        shape: [B, T, ...].
        dtype: of the numbers, little endian.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return math.prod(self.shape[2:]) * self.dtype.itemsize

    def read(self, begin: int, end: int) -> Tensor:
        """Tokens begin .. end - 1 of all rows: [B, end - begin, ...]. EOFError where the file is cut short."""
        part = torch.empty(self.shape[0], end - begin, *self.shape[2:], dtype=self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            for row in range(self.shape[0]):
                view = _bytes_of(part[row])
                self._seek(file.fileno(), row, begin)
                while view:
                    count = os.readv(file.fileno(), [view])
                    if count == 0:
                        raise EOFError(f"{self.path}: cut short, row {row} ends before token {end}")
                    view = view[count:]
        return part

    def write(self, begin: int, tensor: Tensor) -> None:
        """Puts [B, t, ...] at token ``begin`` of all rows."""
        if tensor.shape[0] != self.shape[0] or tuple(tensor.shape[2:]) != self.shape[2:]:
            raise ValueError(f"{self.path}: got a piece of shape {list(tensor.shape)}, the array has {self.shape}")
        if begin + tensor.shape[1] > self.shape[1]:
            raise ValueError(
                f"{self.path}: got tokens up to {begin + tensor.shape[1]}, allowed are {self.shape[1]}, given before"
            )
        part = tensor.detach().to("cpu", self.dtype).contiguous()
        with open(self.path, "r+b", buffering=0) as file:
            for row in range(self.shape[0]):
                view = _bytes_of(part[row])
                self._seek(file.fileno(), row, begin)
                while view:
                    view = view[os.write(file.fileno(), view) :]

    def sync(self) -> None:
        """Returns when all that was written is on the disk."""
        with open(self.path, "r+b") as file:
            os.fsync(file.fileno())

    def _seek(self, file: int, row: int, token: int) -> None:
        os.lseek(file, self.offset + (row * self.shape[1] + token) * self.token_bytes, os.SEEK_SET)


def _bytes_of(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    array: Any = x.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def open_npy(path: str | os.PathLike[str]) -> FileArray:
    """The array [B, T, ...] of a .npy file, for :class:`ArraySource`.

    Raises:
        ValueError: no .npy file, Fortran order, a dtype that torch has not, or fewer than two axes.
    """
    from numpy.lib import format as npy

    with open(path, "rb") as file:
        try:
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read(file)
        except ValueError as error:
            raise ValueError(f"{path}: got a file cut short or no .npy file ({error})") from error
        offset = file.tell()
    if fortran or dtype.str not in _NUMPY or len(shape) < 2:
        raise ValueError(
            f"{path}: got {dtype} of shape {shape}{' in Fortran order' if fortran else ''}, "
            f"allowed is [B, T, ...] in C order, one of {sorted(_NUMPY)}"
        )
    return FileArray(Path(path), offset, tuple(shape), _NUMPY[dtype.str])


def open_safetensors(path: str | os.PathLike[str]) -> dict[str, FileArray]:
    """The arrays of a safetensors file by name, for :class:`ArraySource`.

    Raises:
        ValueError: the file is cut short, no safetensors file, or has arrays of fewer than two axes.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"{path}: got a file cut short or no safetensors file")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: got no safetensors file ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: got no safetensors file, whose header is a dictionary")
    found = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        begin, end = about["data_offsets"]
        if about["dtype"] not in _SAFETENSORS:
            raise ValueError(f"{path}: got dtype {about['dtype']} of {name!r}, allowed are {sorted(_SAFETENSORS)}")
        if len(about["shape"]) < 2:
            raise ValueError(f"{path}: got shape {about['shape']} of {name!r}, allowed is [B, T, ...]")
        if 8 + length + end > size:
            raise ValueError(f"{path}: got a file cut short: {name!r} ends at byte {8 + length + end} of {size}")
        found[name] = FileArray(Path(path), 8 + length + begin, tuple(about["shape"]), _SAFETENSORS[about["dtype"]])
    return found


def create(path: Path, arrays: Mapping[str, tuple[Sequence[int], torch.dtype]], *, kind: str) -> dict[str, FileArray]:
    """A new file of that kind (".npy" or ".safetensors") with room for the arrays, holding zeros.

    Raises:
        ValueError: the kind cannot hold them.
    """
    header, offsets = _npy_header(arrays) if kind == ".npy" else _safetensors_header(arrays)
    end = max((offsets[n] + math.prod(shape) * dtype.itemsize for n, (shape, dtype) in arrays.items()), default=0)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(max(end, len(header)))
    return {name: FileArray(path, offsets[name], tuple(shape), dtype) for name, (shape, dtype) in arrays.items()}


def _npy_header(arrays: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> tuple[bytes, dict[str, int]]:
    import io

    from numpy.lib import format as npy

    ((name, (shape, dtype)),) = arrays.items()
    if dtype not in _DESCRIPTIONS:
        raise ValueError(f"sink: got {dtype} for a .npy file, which NumPy has not; allowed there is .safetensors")
    buffer = io.BytesIO()
    about = {"descr": _DESCRIPTIONS[dtype], "fortran_order": False, "shape": tuple(shape)}
    npy.write_array_header_1_0(buffer, about)
    return buffer.getvalue(), {name: buffer.tell()}


def _safetensors_header(arrays: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> tuple[bytes, dict[str, int]]:
    # The format wants wider dtypes first, so that every array is aligned.
    order = sorted(arrays, key=lambda name: (-arrays[name][1].itemsize, name))
    header, end = {}, 0
    for name in order:
        shape, dtype = arrays[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: start + header[n]["data_offsets"][0] for n in order}  # type: ignore[operator]
