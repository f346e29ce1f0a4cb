"""Byte-level text: Python's own standard library, novels, tiny Shakespeare; windows of it for training."""

from __future__ import annotations

import functools
import hashlib
import io
import sysconfig
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from experiments.config import ConfigError
from experiments.data.local import DATA_DIR, DataError, find_data_dir, read_checked

#: Folders of a standard library that hold somebody else's code, tests, or no code (the help texts of pydoc_data).
EXCLUDED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__", "lib-dynload"}
)


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes held out.

    Attributes:
        name: of the data set.
        train, valid: uint8 tensors, one dimension.
        source: where it was read from.
        sha256: of train followed by valid, so that results name their data.
        test: uint8 tensor of bytes that nothing is chosen by, where the data has such a part.
    """

    name: str
    train: Tensor
    valid: Tensor
    source: str
    sha256: str
    test: Tensor | None = None


def load_text(name: str, data_dir: str | Path | None = None) -> Text:
    """A text data set by name.

    Args:
        name: "stdlib" (needs no file), "novels", "shakespeare", or "file:PATH" for any one text file.
        data_dir: folder with ``novels/`` or ``shakespeare/``; default the environment variable RACE_DATA_DIR.

    Raises:
        DataError: the files are absent; the message names both ways to get them.
        ConfigError: no such data set, or one too small to split.
    """
    if name.startswith("file:"):
        data = Path(name[5:]).read_bytes()
        return text_of(name, *_split_bytes(data), name[5:])
    if name not in LOADERS:
        raise ConfigError(f"data: got {name!r}, allowed are " + ", ".join(LOADERS) + " and file:PATH")
    return LOADERS[name](find_data_dir(data_dir))


def load_split_files(name: str, data_dir: Path | None) -> Text:
    """A text in files: ``NAME/train.txt``, ``NAME/valid.txt`` and, where there is one, ``NAME/test.txt``."""
    folder = _existing(data_dir, name, f"put {name}/train.txt and {name}/valid.txt there")
    missing = [part for part in ("train", "valid") if not (folder / f"{part}.txt").exists()]
    if missing:
        raise DataError(f"data {name!r}: {folder} holds no {missing[0]}.txt")
    train, valid = ((folder / f"{part}.txt").read_bytes() for part in ("train", "valid"))
    test = (folder / "test.txt").read_bytes() if (folder / "test.txt").exists() else b""
    return text_of(name, train, valid, str(folder), test)


def stdlib_files(root: Path | None = None) -> list[Path]:
    """The .py files of this Python's standard library, sorted by name, without tests and installed packages."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files = (path for path in root.rglob("*.py") if not EXCLUDED.intersection(path.relative_to(root).parts))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def load_stdlib(data_dir: Path | None = None, *, root: Path | None = None) -> Text:
    """Every 20th file of the standard library is held out; files follow each other in order of name."""
    files = stdlib_files(root)
    if len(files) < 40:
        where = root or sysconfig.get_path("stdlib")
        raise DataError(
            f"data 'stdlib': {where} holds {len(files)} Python files, too few to train on (a stripped Python?). "
            "Use a full Python, or another text with data=file:PATH"
        )
    train: list[bytes] = []
    valid: list[bytes] = []
    for index, path in enumerate(files):
        (valid if index % 20 == 10 else train).append(path.read_bytes())
    return text_of("stdlib", b"".join(train), b"".join(valid), str(root or sysconfig.get_path("stdlib")))


def load_novels(data_dir: Path | None) -> Text:
    """Novels split by book: ``novels/{train,valid,test}/*.txt`` (no test is needed), or ``novels/novels.tar.xz``."""
    folder = _existing(data_dir, "novels", "put text files in novels/train and novels/valid, one book a file")
    archive = folder / "novels.tar.xz"
    if archive.exists():
        with tarfile.open(fileobj=io.BytesIO(read_checked(folder, archive.name)), mode="r:xz") as tar:
            books = {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}  # type: ignore[union-attr]
    else:
        books = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.txt"))}
    parts = {}
    for part in ("train", "valid"):
        names = sorted(name for name in books if part in PurePosixPath(name).parts[:-1])
        if not names:
            raise DataError(f"data 'novels': {folder} holds no {part}/*.txt")
        parts[part] = b"".join(books[name] for name in names)
    test = b"".join(books[name] for name in sorted(books) if "test" in PurePosixPath(name).parts[:-1])
    return text_of("novels", parts["train"], parts["valid"], str(folder), test)


def load_shakespeare(data_dir: Path | None) -> Text:
    """Tiny Shakespeare, the last tenth held out."""
    hint = "get input.txt of karpathy/char-rnn's tinyshakespeare as shakespeare/input.txt"
    folder = _existing(data_dir, "shakespeare", hint)
    data = read_checked(folder, "input.txt.gz" if (folder / "input.txt.gz").exists() else "input.txt")
    return text_of("shakespeare", *_split_bytes(data), str(folder))


LOADERS: dict[str, Callable[[Path | None], Text]] = {
    "stdlib": load_stdlib,
    "novels": load_novels,
    "shakespeare": load_shakespeare,
    **{name: functools.partial(load_split_files, name) for name in ("wikitext-103", "ptb", "tinystories")},
}


def _existing(data_dir: Path | None, name: str, how: str) -> Path:
    if data_dir is not None and (data_dir / name).is_dir():
        return data_dir / name
    given = f"{data_dir} has no folder {name}" if data_dir else "no data folder was given"
    raise DataError(
        f"data {name!r}: {given}. Name the folder that holds {name}/ with --data-dir (or {DATA_DIR}); {how}"
    )


def _split_bytes(data: bytes) -> tuple[bytes, bytes]:
    cut = len(data) - len(data) // 10
    return data[:cut], data[cut:]


def text_of(name: str, train: bytes, valid: bytes, source: str, test: bytes = b"") -> Text:
    """A :class:`Text` of bytes to train on and bytes held out."""
    if len(train) < 2 or len(valid) < 2:
        raise ConfigError(f"data {name!r}: got {len(train)} bytes to train on and {len(valid)} held out")
    digest = hashlib.sha256(train + valid).hexdigest()
    as_tensor = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (train, valid)]
    tested = torch.frombuffer(bytearray(test), dtype=torch.uint8) if test else None
    return Text(name, as_tensor[0], as_tensor[1], source, digest, tested)


class WindowSampler:
    """Training windows: each epoch shifts the text by a random offset and visits every window once, shuffled.

    Which window comes at which position depends on seed and position alone, so a run resumes from one number.

    Args:
        text: [N] uint8, on any device; windows come from where it lies.
        context: tokens a window; N at least context + 1.
        seed: of order and offsets.
    """

    def __init__(self, text: Tensor, context: int, seed: int = 0) -> None:
        if text.ndim != 1 or len(text) < context + 1:
            raise ConfigError(f"context: got {context}, allowed is at most {len(text) - 1}, the length of the text - 1")
        self.text, self.context, self.seed = text, context, seed
        self.windows = max(1, (len(text) - 1) // context - 1)  # one less leaves room for the offset
        self._epoch, self._starts = -1, torch.empty(0, dtype=torch.int64)

    def _starts_of(self, epoch: int) -> Tensor:
        """Where the windows of an epoch begin, in its order, on the text's device: steps then wait for no copy."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            room = len(self.text) - 1 - self.windows * self.context
            offset = int(torch.randint(room + 1, (1,), generator=generator))
            order = torch.randperm(self.windows, generator=generator)
            self._epoch, self._starts = epoch, (order * self.context + offset).to(self.text.device)
        return self._starts

    def batch(self, position: int, size: int) -> tuple[Tensor, Tensor]:
        """Windows number ``position`` to ``position + size``: inputs and targets, [size, context] int64 each."""
        parts, end = [], position + size
        while position < end:
            epoch, first = divmod(position, self.windows)
            parts.append(self._starts_of(epoch)[first : first + end - position])
            position += len(parts[-1])
        starts = torch.cat(parts)
        rows = self.text[starts[:, None] + torch.arange(self.context + 1, device=self.text.device)].long()
        return rows[:, :-1], rows[:, 1:]


def evaluation_windows(text: Tensor, context: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``count`` windows spread evenly over a text (fewer where it is short): inputs, targets, [context] int64."""
    room = len(text) - 1 - context
    if room < 0:
        raise ConfigError(f"context: got {context}, allowed is at most {len(text) - 1}, the length of the text - 1")
    count = min(count, room + 1)
    for i in range(count):
        start = room * i // max(1, count - 1) if count > 1 else room // 2
        row = text[start : start + context + 1].long()
        yield row[:-1], row[1:]
