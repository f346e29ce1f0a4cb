"""Data sets by name: their local folder, or the same set from the Hugging Face hub; and the IDX format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.data.local import DATA_DIR, BrokenDataError, DataError, find_data_dir


@dataclass(frozen=True)
class Hub:
    """Where a data set lies on the Hugging Face hub: repository, configuration, columns, names of the held-out splits.

    Attributes:
        column: of the text or picture; several texts, joined by spaces, with a + between them.
        label: column of the class; None for texts to model.
        valid: the split to choose by; "test" where there is no other, which is then used for testing only.
        test: another split that nothing is chosen by, of texts to model.
    """

    repository: str
    configuration: str | None
    column: str
    label: str | None = None
    valid: str = "validation"
    test: str | None = None


#: Data sets that are fetched by name where their local files are not given.
HUB = {
    "sst2": Hub("stanfordnlp/sst2", None, "sentence", "label"),
    "qnli": Hub("nyu-mll/glue", "qnli", "question+sentence", "label"),
    "imdb": Hub("stanfordnlp/imdb", None, "text", "label", valid="test"),
    "yahoo": Hub("community-datasets/yahoo_answers_topics", None, "question_title+question_content", "topic", "test"),
    "arxiv": Hub("ccdv/arxiv-classification", "no_ref", "text", "label"),
    "wikitext-103": Hub("Salesforce/wikitext", "wikitext-103-raw-v1", "text", test="test"),
    "ptb": Hub("ptb-text-only/ptb_text_only", None, "sentence", test="test"),
    "tinystories": Hub("roneneldan/TinyStories", None, "text"),
    "fashion_mnist": Hub("zalando-datasets/fashion_mnist", None, "image", "label", valid="test"),
    "cifar10": Hub("uoft-cs/cifar10", None, "img", "label", valid="test"),
    "food101": Hub("ethz/food101", None, "image", "label"),
}


def local_folder(name: str, data_dir: str | Path | None) -> Path | None:
    """The folder ``name`` in the data folder, or None where there is none."""
    root = find_data_dir(data_dir)
    folder = None if root is None else root / name
    return folder if folder is not None and folder.is_dir() else None


def from_hub(name: str, split: str) -> Any:
    """A split of a data set from the Hugging Face hub.

    Raises:
        DataError: it cannot be had; the message names both ways, the hub and local files.
    """
    where = HUB[name]
    ways = both_ways(name)
    try:
        import datasets  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise DataError(f"data {name!r}: no local files, and the package datasets is not installed. {ways}") from error
    try:
        return _load(datasets, where, split)
    except Exception as error:  # whatever the network, the hub or its cache raise
        raise DataError(f"data {name!r}: {type(error).__name__}: {error}. {ways}") from error


def both_ways(name: str) -> str:
    """How to get a data set of the hub: from local files, or by its name."""
    return (
        f"Give the folder that holds {name}/ with --data-dir (or {DATA_DIR}), or be online with "
        f"'pip install datasets' to fetch {HUB[name].repository} by name"
    )


def _load(datasets: Any, where: Hub, split: str) -> Any:
    """The split; of sets that are a program, which newer versions of the package do not run, the hub's conversion."""
    try:
        return datasets.load_dataset(where.repository, where.configuration, split=split)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        return datasets.load_dataset(
            where.repository, where.configuration, split=split, revision="refs/convert/parquet"
        )


def read_idx(data: bytes) -> Tensor:
    """An array in the IDX format of MNIST: uint8, any number of dimensions.

    Raises:
        BrokenDataError: not that format, or cut short.
    """
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise BrokenDataError(f"idx: got the header {data[:4]!r}, expected 00 00 08 and the number of dimensions")
    start = 4 + 4 * data[3]
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    array = torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8)
    count = int(torch.tensor(shape).prod())
    if len(array) != count:
        raise BrokenDataError(f"idx: got {len(array)} bytes for an array of shape {shape}")
    return array.reshape(shape)
