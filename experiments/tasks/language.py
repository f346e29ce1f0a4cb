"""Language models over bytes: left to right, and with masked places."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.config import check
from experiments.data import Text, WindowSampler, evaluation_windows, load_text
from experiments.data.files import HUB, from_hub, local_folder
from experiments.data.text import text_of
from experiments.models.blocks import ModelConfig
from experiments.models.encoder import MaskedLM
from experiments.models.lm import DecoderLM
from experiments.tasks.base import IGNORED, Batch, Task, evaluating, predict


@dataclass(frozen=True)
class LanguageOptions:
    """Options of language modelling.

    Attributes:
        data: "novels", "stdlib", "shakespeare", "file:PATH", or from the hub "wikitext-103", "ptb", "tinystories".
        context: bytes a window.
        valid_bytes: held-out bytes that are scored, in windows spread evenly; the first of a window count too. As
            many of the part that nothing is chosen by ("test"), where the data has one.
    """

    data: str = "novels"
    context: int = 1024
    valid_bytes: int = 262144

    def __post_init__(self) -> None:
        check(self.context >= 1, "task_options.context", self.context, "1 or more")
        check(self.valid_bytes >= 1, "task_options.valid_bytes", self.valid_bytes, "1 or more")


class _Windows(Task):
    """What both kinds share: windows of a text that lies on the device, bits a byte."""

    metric, higher_is_better = "bits", False

    def __init__(
        self, name: str, options: LanguageOptions, *, data_dir: str | None, device: torch.device, seed: int
    ) -> None:
        self.name, self.options, self.seed = name, options, seed
        self.text = _text(options.data, data_dir)
        self.data_sha256 = self.text.sha256
        self.sampler = WindowSampler(self.text.train.to(device), options.context, seed)
        count = max(1, options.valid_bytes // options.context)
        self.held_out = {}
        for part, text in (("valid", self.text.valid), ("test", self.text.test)):
            if text is not None:
                pairs = list(evaluation_windows(text.to(device), options.context, count))
                self.held_out[part] = (torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs]))

    def steps_per_epoch(self, batch: int) -> int:
        return max(1, self.sampler.windows // batch)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, size: int) -> dict[str, float]:
        with evaluating(model):
            return {part: self._bits(model, part, size) for part in self.held_out}

    def _bits(self, model: nn.Module, part: str, size: int) -> float:
        nats: Tensor | float = 0.0
        count: Tensor | float = 0.0
        for batch in self.batches(part, size):
            logits = predict(model, batch).flatten(0, 1).float()
            losses = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")
            nats = nats + losses.double()
            count = count + (batch.targets != IGNORED).sum().double()
        return float(nats) / float(count) / math.log(2)

    def batches(self, part: str, size: int) -> Iterator[Batch]:
        """All of a held-out part, in order."""
        raise NotImplementedError


class LanguageModel(_Windows):
    """The next byte of each."""

    def make_model(self, config: ModelConfig, seed: int) -> nn.Module:
        return DecoderLM(config, seed=seed)

    def batch(self, step: int, size: int) -> Batch:
        return Batch(*self.sampler.batch(step * size, size))

    def batches(self, part: str, size: int) -> Iterator[Batch]:
        inputs, targets = self.held_out[part]
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            yield Batch(x, y)


@dataclass(frozen=True)
class MaskedOptions(LanguageOptions):
    """Options of masked language modelling.

    Attributes:
        rate: share of the bytes that are predicted (BERT's 15 %); 80 % of them are masked, 10 % another byte, 10 %
            as they are.
    """

    data: str = "tinystories"
    rate: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.rate < 1, "task_options.rate", self.rate, "in (0, 1)")


class MaskedLanguageModel(_Windows):
    """Bytes at masked places, from both sides (Devlin et al. 2018, arXiv 1810.04805, section 3.1)."""

    options: MaskedOptions
    MASK = 256

    def make_model(self, config: ModelConfig, seed: int) -> nn.Module:
        return MaskedLM(ModelConfig(**{**vars(config), "vocab": 257}), seed=seed)

    def batch(self, step: int, size: int) -> Batch:
        tokens, _ = self.sampler.batch(step * size, size)
        return self._masked(tokens, self.seed * 1_000_003 + step)

    def batches(self, part: str, size: int) -> Iterator[Batch]:
        for i, tokens in enumerate(self.held_out[part][0].split(size)):
            yield self._masked(tokens, -1 - i)

    def _masked(self, tokens: Tensor, seed: int) -> Batch:
        generator = torch.Generator(tokens.device).manual_seed(seed)
        chosen, how = torch.rand(2, *tokens.shape, device=tokens.device, generator=generator)
        other = torch.randint(256, tokens.shape, device=tokens.device, generator=generator)
        asked = chosen < self.options.rate
        inputs = torch.where(asked & (how < 0.8), self.MASK, tokens)
        inputs = torch.where(asked & (how >= 0.8) & (how < 0.9), other, inputs)
        return Batch(inputs, tokens.masked_fill(~asked, IGNORED))


def _text(name: str, data_dir: str | None) -> Text:
    if name not in HUB or local_folder(name, data_dir) is not None:
        return load_text(name, data_dir)
    where = HUB[name]
    splits = ("train", where.valid, *([where.test] if where.test else []))
    train, valid, *test = ("\n".join(from_hub(name, split)[where.column]).encode() for split in splits)
    return text_of(name, train, valid, where.repository, *test)
