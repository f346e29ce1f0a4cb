"""Classes of texts: SST-2 from local files; QNLI, IMDB, Yahoo answers and arXiv documents from the hub or files."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from experiments.config import check
from experiments.data.files import HUB, from_hub, local_folder
from experiments.data.local import BrokenDataError, read_checked
from experiments.models.blocks import ModelConfig
from experiments.models.encoder import HeadConfig, SequenceClassifier
from experiments.tasks.base import Split, SplitTask, hold_out

PADDING, UNKNOWN = 0, 1


@dataclass(frozen=True)
class SentenceOptions:
    """Options of text classification.

    Attributes:
        tokens: "words" (split at spaces, lower case, those that the training set holds ``min_count`` times) or
            "bytes".
        min_count: rarer words are one token, unknown.
        vocab: the most words.
        length: tokens kept of each text, its first.
        pool: as in :class:`~experiments.models.encoder.HeadConfig`.
        limit: uses so many texts of each split only; for dry runs.
    """

    tokens: str = "words"
    min_count: int = 2
    vocab: int = 30000
    length: int = 64
    pool: str = "mean"
    limit: int | None = None

    def __post_init__(self) -> None:
        check(self.tokens in ("words", "bytes"), "task_options.tokens", self.tokens, "'words' or 'bytes'")
        for name in ("min_count", "vocab", "length"):
            check(getattr(self, name) >= 1, f"task_options.{name}", getattr(self, name), "1 or more")


Texts = dict[str, tuple[Sequence[str], Sequence[int]]]


class SentenceTask(SplitTask):
    """Texts as padded rows of tokens."""

    def __init__(self, name: str, texts: Texts, options: SentenceOptions, device: torch.device, seed: int) -> None:
        self.options = options
        limited = {part: (x[: options.limit], y[: options.limit]) for part, (x, y) in texts.items()}
        self.words = Vocabulary(limited["train"][0], options) if options.tokens == "words" else None
        splits = {part: self._encode(*pair) for part, pair in limited.items()}
        if "valid" not in splits:
            splits["train"], splits["valid"] = hold_out(splits["train"], len(splits["train"].targets) // 10)
        self.classes = int(max(split.targets.max() for split in splits.values())) + 1
        super().__init__(name, splits, device, seed)

    def make_model(self, config: ModelConfig, seed: int) -> nn.Module:
        size = 258 if self.words is None else len(self.words)
        fitted = ModelConfig(**{**vars(config), "vocab": size})
        return SequenceClassifier(fitted, HeadConfig(max(2, self.classes), self.options.pool), seed=seed)

    def _encode(self, texts: Sequence[str], labels: Sequence[int]) -> Split:
        rows = torch.full((len(texts), self.options.length), PADDING)
        for i, text in enumerate(texts):
            ids = [b + 2 for b in text.encode()] if self.words is None else self.words.encode(text)
            ids = ids[: self.options.length] or [UNKNOWN]
            rows[i, : len(ids)] = torch.tensor(ids)
        return Split(rows, torch.tensor(labels, dtype=torch.int64), rows == PADDING)


class Vocabulary:
    """Words of a training set, the most frequent first (ties by spelling)."""

    def __init__(self, texts: Sequence[str], options: SentenceOptions) -> None:
        counts = Counter(word for text in texts for word in text.lower().split())
        ranked = sorted((w for w, n in counts.items() if n >= options.min_count), key=lambda w: (-counts[w], w))
        self.ids = {word: i + 2 for i, word in enumerate(ranked[: options.vocab])}

    def __len__(self) -> int:
        return len(self.ids) + 2

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(word, UNKNOWN) for word in text.lower().split()]


class Sst2(SentenceTask):
    """SST-2 of GLUE (Socher et al. 2013): phrases to train on, 872 sentences for validation, 1,821 to test."""

    def __init__(
        self, name: str, options: SentenceOptions, *, data_dir: str | None, device: torch.device, seed: int
    ) -> None:
        folder = local_folder("sst2", data_dir)
        texts = _hub_texts("sst2") if folder is None else _sst2_files(folder)
        super().__init__(name, texts, options, device, seed)


def _sst2_files(folder: Path) -> Texts:
    files = {"train": "train.tsv.gz", "valid": "dev.tsv", "test": "test.tsv"}
    return {
        part: read_labelled(read_checked(folder, file).decode(), str(folder / file))
        for part, file in files.items()
        if part == "train" or (folder / file).exists()
    }


class HubSentences(SentenceTask):
    """A text classification set of the hub by its name, or local ``NAME/train.tsv`` and ``valid.tsv``."""

    def __init__(
        self, name: str, options: SentenceOptions, *, data_dir: str | None, device: torch.device, seed: int
    ) -> None:
        folder = local_folder(name, data_dir)
        if folder is None:
            texts = _hub_texts(name)
        else:
            parts = [
                part for part in ("train", "valid", "test") if (folder / f"{part}.tsv").exists() or part == "train"
            ]
            texts = {part: read_labelled(read_checked(folder, f"{part}.tsv").decode(), f"{part}.tsv") for part in parts}
            if "valid" not in parts:  # the last tenth is held out, which must not be one class of a sorted file
                texts["train"] = _shuffled(*texts["train"])
        super().__init__(name, texts, options, device, seed)


def _shuffled(texts: Sequence[str], labels: Sequence[int]) -> tuple[list[str], list[int]]:
    """In another order, the same for everybody."""
    order = list(range(len(texts)))
    random.Random(0).shuffle(order)
    return [texts[i] for i in order], [labels[i] for i in order]


def read_labelled(content: str, where: str) -> tuple[list[str], list[int]]:
    """Texts and labels of lines ``label<TAB>text`` after a line with the columns' names.

    Raises:
        BrokenDataError: a line of another form; the message names file and line.
    """
    texts, labels = [], []
    for number, line in enumerate(content.split("\n")[1:], start=2):
        if not line:
            continue
        label, tab, text = line.partition("\t")
        if not tab or not label.strip().isdigit():
            raise BrokenDataError(f"{where}, line {number}: got {line[:60]!r}, expected label<TAB>text")
        texts.append(text.strip())
        labels.append(int(label))
    return texts, labels


def _hub_texts(name: str) -> Texts:
    where = HUB[name]
    texts: Texts = {}
    for part, split in (("train", "train"), ("valid" if where.valid == "validation" else "test", where.valid)):
        rows = from_hub(name, split).shuffle(seed=0)
        columns = [rows[column] for column in where.column.split("+")]
        texts[part] = ([" ".join(row) for row in zip(*columns, strict=True)], list(rows[where.label]))
    return texts
