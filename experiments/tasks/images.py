"""Images as sequences of pixels or patches: FashionMNIST (784 pixels), CIFAR-10 (1,024), Food-101 (16,384)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.config import check
from experiments.data.files import from_hub, local_folder, read_idx
from experiments.data.local import read_checked
from experiments.data.pictures import as_bytes, read_cifar10, read_food101
from experiments.models.blocks import ModelConfig
from experiments.models.encoder import HeadConfig, VisionTransformer
from experiments.tasks.base import Batch, Split, SplitTask, hold_out


@dataclass(frozen=True)
class FashionOptions:
    """Options of FashionMNIST.

    Attributes:
        patch: side of the patches; 1 gives the 784 pixels.
        pool: as in :class:`~experiments.models.encoder.HeadConfig`.
        held_out: training images kept for validation, the last ones.
        limit: uses so many training and test images only; for dry runs.
    """

    patch: int = 1
    pool: str = "mean"
    held_out: int = 5000
    limit: int | None = None


class ImageTask(SplitTask):
    """Images stored as bytes [N, C, height, width]; models see them with mean 0 and variance 1."""

    def __init__(self, name: str, splits: dict[str, Split], head: HeadConfig, device: torch.device, seed: int) -> None:
        super().__init__(name, splits, device, seed)
        self.head = head
        sample = splits["train"].inputs[:2000].double() / 255
        self.mean, self.std = float(sample.mean()), max(float(sample.std()), 1e-3)

    def prepare(self, batch: Batch) -> Batch:
        return Batch((batch.inputs.float() / 255 - self.mean) / self.std, batch.targets)

    def make_model(self, config: ModelConfig, seed: int) -> nn.Module:
        return VisionTransformer(config, self.head, seed=seed)


class FashionMnist(ImageTask):
    """FashionMNIST (Xiao et al. 2017, arXiv 1708.07747): 60,000 + 10,000 images, 10 classes."""

    def __init__(
        self, name: str, options: FashionOptions, *, data_dir: str | None, device: torch.device, seed: int
    ) -> None:
        folder = local_folder("fashion_mnist", data_dir)
        train, test = (_limited(_fashion_split(folder, part), options.limit) for part in ("train", "test"))
        held_out = min(options.held_out, len(train.targets) // 2)
        train, valid = hold_out(train, held_out)
        head = HeadConfig(10, options.pool, options.patch, (28, 28), 1)
        super().__init__(name, {"train": train, "valid": valid, "test": test}, head, device, seed)


def _fashion_split(folder: Path | None, part: str) -> Split:
    if folder is None:
        return _hub_images("fashion_mnist", part, 28, "image")
    prefix = "train" if part == "train" else "t10k"
    images = read_idx(read_checked(folder, f"{prefix}-images-idx3-ubyte.gz"))
    labels = read_idx(read_checked(folder, f"{prefix}-labels-idx1-ubyte.gz"))
    return Split(images[:, None], labels.long())


@dataclass(frozen=True)
class PictureOptions:
    """Options of CIFAR-10 and Food-101, from local files or the Hugging Face hub.

    Attributes:
        side: images are cut square and scaled to so many pixels a side; 0 for the data set's own.
        grey: one channel instead of three.
        patch, pool: as in :class:`~experiments.models.encoder.HeadConfig`.
        limit: uses so many images of each split only; for dry runs.
    """

    side: int = 0
    grey: bool = True
    patch: int = 1
    pool: str = "mean"
    limit: int | None = None


class _Pictures(ImageTask):
    reader: Callable[..., tuple[Tensor, Tensor]]  # of local files
    column, classes, side, test = "image", 2, 32, "test"

    def __init__(
        self, name: str, options: PictureOptions, *, data_dir: str | None, device: torch.device, seed: int
    ) -> None:
        side = options.side or self.side
        check(side % options.patch == 0, "task_options.patch", options.patch, f"a divisor of the side, {side}")
        parts = {"train": "train", "test": self.test}
        folder = local_folder(name, data_dir)
        splits = {}
        for part, split in parts.items():
            if folder is None:
                splits[part] = _hub_images(name, split, side, self.column, options.grey, options.limit)
            else:
                splits[part] = Split(*type(self).reader(folder, part, side, options.grey, options.limit))
        splits["train"], splits["valid"] = hold_out(splits["train"], len(splits["train"].targets) // 10)
        head = HeadConfig(self.classes, options.pool, options.patch, (side, side), 1 if options.grey else 3)
        super().__init__(name, splits, head, device, seed)


class Cifar10(_Pictures):
    """CIFAR-10 (Krizhevsky 2009) as 1,024 pixels, grey as in the Long Range Arena."""

    reader = staticmethod(read_cifar10)
    column, classes, side, test = "img", 10, 32, "test"


class Food101(_Pictures):
    """Food-101 (Bossard et al. 2014), 128 x 128: 16,384 pixels."""

    reader = staticmethod(read_food101)
    column, classes, side, test = "image", 101, 128, "validation"


def _hub_images(name: str, split: str, side: int, column: str, grey: bool = True, limit: int | None = None) -> Split:
    rows = from_hub(name, split)
    rows = rows.shuffle(seed=0)  # classes lie in blocks in some sets; the same shuffle for everybody
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    images = torch.stack([as_bytes(row[column], side, grey) for row in rows])
    return Split(images, torch.tensor(list(rows["label"])))


def _limited(split: Split, limit: int | None) -> Split:
    return split if limit is None else Split(split.inputs[:limit], split.targets[:limit])
