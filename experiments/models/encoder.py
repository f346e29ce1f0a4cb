"""Models that see all of a sequence: masked language model, sequence classifier, vision transformer.

Letters: B batch, T tokens, E model size, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.config import check
from experiments.models.blocks import Block, ModelConfig, init_weights, make_norm


class Encoder(nn.Module):
    """Positions added to embedded tokens, pre-norm blocks that see both directions, norm."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        learned = config.positions == "learned"
        self.positions = nn.Parameter(torch.empty(config.max_length, config.dim)) if learned else None
        self.blocks = nn.ModuleList(Block(config, causal=False, layer=i, seed=seed) for i in range(config.layers))
        self.norm = make_norm(config)
        if self.positions is not None:
            nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Embedded tokens [B, T, E] and padding [B, T] bool, True where padding -> [B, T, E]."""
        if self.positions is not None:
            if x.shape[1] > len(self.positions):
                raise ValueError(f"x: got {x.shape[1]} tokens, allowed are max_length = {len(self.positions)}")
            x = x + self.positions[: x.shape[1]].to(x.dtype)
        for block in self.blocks:
            x = block(x, key_padding_mask=padding)
        return self.norm(x)


class MaskedLM(nn.Module):
    """Predicts the tokens at masked places from both sides (Devlin et al. 2018, arXiv 1810.04805).

    Args:
        config: ``vocab`` counts the mask token, its last one.
        seed: of weights and random features.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(config.vocab, config.dim)
            self.encoder = Encoder(config, seed)
            self.head = nn.Linear(config.dim, config.vocab, bias=False)
            init_weights(self, config.layers, config.mixer_init)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Tokens [B, T] -> logits [B, T, vocab]."""
        return self.head(self.encoder(self.embedding(tokens), padding))


@dataclass(frozen=True)
class HeadConfig:
    """Input and output of a classifier.

    Attributes:
        classes: K.
        pool: "mean" over the tokens that are not padding, or "first": a learned token put before the others.
        patch: side of the square patches that a vision transformer cuts; 1 for pixels.
        image: height and width.
        channels: of an image.
    """

    classes: int
    pool: str = "mean"
    patch: int = 1
    image: tuple[int, ...] = (28, 28)
    channels: int = 1

    def __post_init__(self) -> None:
        check(self.classes >= 2, "classes", self.classes, "2 or more")
        check(self.pool in ("mean", "first"), "pool", self.pool, "'mean' or 'first'")
        check(len(self.image) == 2, "image", self.image, "height and width")
        fits = self.patch >= 1 and all(side % self.patch == 0 for side in self.image)
        check(fits, "patch", self.patch, f"a divisor of the sides of the image, {self.image}")


class _Classifier(nn.Module):
    """What classifiers share: an encoder, pooling, a linear head."""

    def __init__(self, config: ModelConfig, head: HeadConfig, seed: int) -> None:
        super().__init__()
        self.settings = head
        self.encoder = Encoder(config, seed)
        self.first = nn.Parameter(torch.zeros(config.dim)) if head.pool == "first" else None
        self.head = nn.Linear(config.dim, head.classes)

    def classify(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Embedded tokens [B, T, E] -> logits [B, K]."""
        if self.first is not None:
            x = torch.cat((self.first.to(x.dtype).expand(len(x), 1, -1), x), dim=1)
            if padding is not None:
                padding = nn.functional.pad(padding, (1, 0), value=False)
            return self.head(self.encoder(x, padding)[:, 0])
        x = self.encoder(x, padding)
        if padding is None:
            return self.head(x.mean(dim=1))
        kept = (~padding).unsqueeze(-1).to(x.dtype)
        return self.head((x * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1))


class SequenceClassifier(_Classifier):
    """Classes of token sequences."""

    def __init__(self, config: ModelConfig, head: HeadConfig, *, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(config, head, seed)
            self.embedding = nn.Embedding(config.vocab, config.dim)
            init_weights(self, config.layers, config.mixer_init)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Tokens [B, T] integers, padding [B, T] bool -> logits [B, K]."""
        return self.classify(self.embedding(tokens), padding)


class VisionTransformer(_Classifier):
    """Classes of images cut into patches (Dosovitskiy et al. 2020, arXiv 2010.11929), or pixel by pixel."""

    def __init__(self, config: ModelConfig, head: HeadConfig, *, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(config, head, seed)
            self.embedding = nn.Linear(head.channels * head.patch**2, config.dim)
            init_weights(self, config.layers, config.mixer_init)

    def forward(self, images: Tensor, padding: Tensor | None = None) -> Tensor:
        """Images [B, channels, height, width], real numbers -> logits [B, K]."""
        if padding is not None:
            raise ValueError("padding: got a mask, allowed is None: images have none")
        p = self.settings.patch
        patches = images.unfold(2, p, p).unfold(3, p, p)  # [B, C, H/p, W/p, p, p]
        tokens = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return self.classify(self.embedding(tokens), None)
