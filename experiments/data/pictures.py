"""Sets of pictures from local files, as their authors pack them: CIFAR-10 (binary version) and Food-101 (folders)."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.data.local import BrokenDataError, DataError, read_checked

CIFAR_FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
CIFAR_ARCHIVE, CIFAR_FOLDER = "cifar-10-binary.tar.gz", "cifar-10-batches-bin"
CIFAR_RECORD = 1 + 3 * 32 * 32  # a label, then red, green, blue


def read_cifar10(folder: Path, split: str, side: int, grey: bool, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Pictures [N, C, side, side] uint8 and labels [N] of ``cifar-10-binary.tar.gz``, packed or unpacked.

    Raises:
        DataError: absent. BrokenDataError: a checksum that does not fit, or a file that is no CIFAR-10.
    """
    archive = folder / CIFAR_ARCHIVE
    if archive.exists():
        packed = io.BytesIO(read_checked(folder, CIFAR_ARCHIVE))
        with tarfile.open(fileobj=packed, mode="r:gz") as tar:
            files = [tar.extractfile(f"{CIFAR_FOLDER}/{name}").read() for name in CIFAR_FILES[split]]  # type: ignore[union-attr]
    else:
        inner = folder / CIFAR_FOLDER
        files = [read_checked(inner if inner.is_dir() else folder, name) for name in CIFAR_FILES[split]]
    data = np.frombuffer(b"".join(files), dtype=np.uint8)
    if len(data) == 0 or len(data) % CIFAR_RECORD or data[::CIFAR_RECORD].max() > 9:
        raise BrokenDataError(
            f"{folder}: got {len(data)} bytes that are no records of a label below 10 and {CIFAR_RECORD - 1} pixels"
        )
    records = data.reshape(-1, CIFAR_RECORD)[:limit]
    pictures = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    if (side, grey) == (32, False):
        stacked = torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())
    else:
        from PIL import Image

        stacked = torch.stack([as_bytes(Image.fromarray(picture), side, grey) for picture in pictures])
    return stacked, torch.from_numpy(records[:, 0].astype(np.int64))


def read_food101(folder: Path, split: str, side: int, grey: bool, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Pictures and labels of ``food-101.tar.gz`` unpacked: ``images/CLASS/ID.jpg`` as ``meta/SPLIT.txt`` lists them.

    Classes lie one after the other in the lists, so they are shuffled, the same way for everybody.

    Raises:
        DataError: absent, the list or a picture of it.
    """
    from PIL import Image

    root = folder / "food-101" if (folder / "food-101").is_dir() else folder
    names = read_checked(root / "meta", f"{split}.txt").decode().split()
    classes = {name: number for number, name in enumerate(sorted({name.partition("/")[0] for name in names}))}
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))[:limit]
    pictures = []
    for name in (names[i] for i in order):
        path = root / "images" / f"{name}.jpg"
        if not path.exists():
            raise DataError(f"data 'food101': {path} is missing, which meta/{split}.txt lists")
        with Image.open(path) as picture:
            pictures.append(as_bytes(picture, side, grey))
    return torch.stack(pictures), torch.tensor([classes[names[i].partition("/")[0]] for i in order])


def as_bytes(picture: object, side: int, grey: bool) -> Tensor:
    """A PIL picture as bytes [C, side, side], cut square in the middle."""
    from PIL import Image, ImageOps

    assert isinstance(picture, Image.Image)
    picture = ImageOps.fit(picture.convert("L" if grey else "RGB"), (side, side))
    array = torch.from_numpy(np.array(picture))
    return array[None] if grey else array.permute(2, 0, 1).contiguous()
