"""Local files of data sets: the folder they lie in, and their checksums."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

from experiments.config import ConfigError

#: Environment variable with the folder of local data sets, for ``data_dir=None``.
DATA_DIR = "RACE_DATA_DIR"


class DataError(FileNotFoundError):
    """A data set that is not there; the message says how to get it."""


class BrokenDataError(ConfigError):
    """A file of a data set that is not what its name says; the message names it."""


#: SHA-256 of the content of files that never change: of a .gz file unpacked, of an archive as it is.
CHECKSUMS = {
    "fashion_mnist/train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "fashion_mnist/train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "fashion_mnist/t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "fashion_mnist/t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "sst2/train.tsv.gz": "e981ceb4fe6c9acd1c79851d0d091b9e78103f1f2a399ca83dda27915d41c56c",
    "sst2/dev.tsv": "84207e6be5873fb18db798cc6faec86871f5a426554650ff64a1c34e87665f6f",
    "sst2/test.tsv": "fcd46f967b7b8efd8b5398481dadf873886298d092195167af907fd532e81e1c",
    "novels/novels.tar.xz": "b36dfaf55f0a55c7c53588264c993256e912f464962bbdb7b5bb25957c8c03e8",
    "cifar10/cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "shakespeare/input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "shakespeare/input.txt.gz": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}


def find_data_dir(data_dir: str | Path | None) -> Path | None:
    """The given folder, else the one that RACE_DATA_DIR names, else None."""
    chosen = data_dir or os.environ.get(DATA_DIR)
    return Path(chosen) if chosen else None


def read_checked(folder: Path, file: str) -> bytes:
    """The bytes of a file, of .gz (not .tar.gz) unpacked, after its checksum where one is known.

    Raises:
        DataError: absent. BrokenDataError: a checksum that does not fit.
    """
    path = folder / file
    if not path.exists():
        raise DataError(f"data {folder.name!r}: {path} is missing")
    data = path.read_bytes()
    if path.suffix == ".gz" and not file.endswith(".tar.gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise BrokenDataError(f"{path}: cannot be unpacked: {error}") from error
    found, expected = hashlib.sha256(data).hexdigest(), CHECKSUMS.get(f"{folder.name}/{file}")
    if expected is not None and found != expected:
        raise BrokenDataError(f"{path}: got content with SHA-256 {found}, expected {expected}")
    return data
