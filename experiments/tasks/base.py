"""What a task is, and the parts that classification tasks share.

Letters: N examples, B batch, T tokens, K classes.
"""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.models.blocks import ModelConfig

#: A target that no loss or score counts.
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Inputs [B, ...], targets [B] or [B, T] int64 (IGNORED where nothing is asked), padding [B, T] bool or None."""

    inputs: Tensor
    targets: Tensor
    padding: Tensor | None = None


class Task(ABC):
    """Data with the model that fits it, its loss and its score.

    Attributes:
        name: of the task.
        metric: name of the score that ``evaluate`` returns for each split and that tables show.
        higher_is_better: of the score.
        data_sha256: of what is scored, so that only results on the same data are compared.
    """

    name: str
    metric: str
    higher_is_better: bool
    data_sha256: str

    @abstractmethod
    def make_model(self, config: ModelConfig, seed: int) -> nn.Module:
        """The model for a body of that configuration."""

    @abstractmethod
    def steps_per_epoch(self, batch: int) -> int:
        """Steps that visit the training data once."""

    @abstractmethod
    def batch(self, step: int, size: int) -> Batch:
        """Training batch number ``step``: a function of the seed and the step alone, so that runs resume."""

    @abstractmethod
    def evaluate(self, model: nn.Module, size: int) -> dict[str, float]:
        """Scores by split, such as {"valid": 0.91, "test": 0.90}; ``size`` examples at a time."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean nats of the targets that count."""
        logits = predict(model, batch)
        return F.cross_entropy(logits.flatten(0, -2).float(), batch.targets.flatten(), ignore_index=IGNORED)


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [B, K] or [B, T, K]."""
    logits: Tensor = model(batch.inputs) if batch.padding is None else model(batch.inputs, batch.padding)
    return logits


@dataclass(frozen=True)
class Split:
    """Examples: inputs [N, ...], targets [N] or [N, T], padding [N, T] or None; on the device of the task."""

    inputs: Tensor
    targets: Tensor
    padding: Tensor | None = None

    def to(self, device: torch.device) -> Split:
        padding = None if self.padding is None else self.padding.to(device)
        return Split(self.inputs.to(device), self.targets.to(device), padding)

    def take(self, index: Tensor | slice) -> Batch:
        padding = None if self.padding is None else self.padding[index]
        return Batch(self.inputs[index], self.targets[index], padding)


class SplitTask(Task):
    """A task over finite splits that lie on the device: shuffled epochs, accuracy."""

    metric, higher_is_better = "accuracy", True

    def __init__(self, name: str, splits: dict[str, Split], device: torch.device, seed: int) -> None:
        self.name, self.seed = name, seed
        self.data_sha256 = _digest(split for key, split in sorted(splits.items()) if key != "train")
        self.splits = {key: split.to(device) for key, split in splits.items()}
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def prepare(self, batch: Batch) -> Batch:
        """From how examples are stored to what the model takes."""
        return batch

    def steps_per_epoch(self, batch: int) -> int:
        return max(1, len(self.splits["train"].targets) // batch)

    def batch(self, step: int, size: int) -> Batch:
        train = self.splits["train"]
        epoch, index = divmod(step, self.steps_per_epoch(size))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(train.targets), generator=generator)
            self._epoch, self._order = epoch, order.to(train.targets.device)
        return self.prepare(train.take(self._order[index * size : (index + 1) * size]))

    def evaluate(self, model: nn.Module, size: int) -> dict[str, float]:
        names = [name for name in self.splits if name != "train"]
        return {name: accuracy(model, self.batches(name, size)) for name in names}

    def batches(self, name: str, size: int) -> Iterator[Batch]:
        """All of a split, in order."""
        split = self.splits[name]
        for start in range(0, len(split.targets), size):
            yield self.prepare(split.take(slice(start, start + size)))


def _digest(splits: Iterable[Split]) -> str:
    digest = hashlib.sha256()
    for split in splits:
        for part in (split.inputs, split.targets):
            digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterator[Batch]) -> float:
    """Share of the targets that the model ranks first."""
    with evaluating(model):
        right: Tensor | float = 0.0
        count: Tensor | float = 0.0
        for batch in batches:
            counted = batch.targets != IGNORED
            right = right + ((predict(model, batch).argmax(-1) == batch.targets) & counted).sum().double()
            count = count + counted.sum().double()
        return float(right) / max(1.0, float(count))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the mode of before after it."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def hold_out(split: Split, count: int) -> tuple[Split, Split]:
    """All but the last ``count`` examples, and those: a validation set where the data has none."""
    cut = len(split.targets) - count
    padding = (None, None) if split.padding is None else (split.padding[:cut], split.padding[cut:])
    first = Split(split.inputs[:cut], split.targets[:cut], padding[0])
    return first, Split(split.inputs[cut:], split.targets[cut:], padding[1])
