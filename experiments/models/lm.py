"""A decoder language model over bytes (or any small vocabulary), and its generation from a constant-size state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.models.blocks import Block, ModelConfig, init_weights, make_norm


@dataclass
class LMState:
    """What generation carries from token to token: one mixer state a layer, and how many tokens they hold."""

    layers: list[Any]
    tokens: int


class DecoderLM(nn.Module):
    """Embedding, causal pre-norm blocks, norm, output matrix.

    Args:
        config: sizes and the mixer.
        seed: of the weights and of the mixers' random features.
    """

    positions: nn.Embedding | None
    head: nn.Linear | None

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(config.vocab, config.dim)
            learned = config.positions == "learned"
            self.positions = nn.Embedding(config.max_length, config.dim) if learned else None
            self.blocks = nn.ModuleList(Block(config, causal=True, layer=i, seed=seed) for i in range(config.layers))
            self.norm = make_norm(config)
            tied = config.tie_embeddings
            self.head = None if tied else nn.Linear(config.dim, config.vocab, bias=False)
            init_weights(self, config.layers, config.mixer_init)
            if tied:  # unit logits at the start
                nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)
            if self.positions is not None:
                nn.init.normal_(self.positions.weight, std=0.02)

    def _embed(self, tokens: Tensor, offset: int) -> Tensor:
        x = self.embedding(tokens)
        if self.positions is None:
            return x
        end = offset + tokens.shape[1]
        if end > self.config.max_length:
            raise ValueError(f"tokens: got {end} of them, allowed are max_length = {self.config.max_length}")
        return x + self.positions.weight[offset:end]

    def _logits(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] integers -> logits [B, T, vocab] of the token after each."""
        x = self._embed(tokens, 0)
        for block in self.blocks:
            x = block(x)
        return self._logits(x)

    def step(self, tokens: Tensor, state: LMState | None = None) -> tuple[Tensor, LMState]:
        """Logits of the tokens [B, T] that follow those in ``state``, and the state after them.

        Equal to the last T rows of :meth:`forward` on all the tokens, at a cost that does not grow with the
        text when the mixer's state does not (RACE).
        """
        if state is None:
            state = LMState([None] * len(self.blocks), 0)
        x = self._embed(tokens, state.tokens)
        layers = []
        for block, before in zip(self.blocks, state.layers, strict=True):
            assert isinstance(block, Block)
            x, after = block.step(x, before)
            layers.append(after)
        return self._logits(x), LMState(layers, state.tokens + tokens.shape[1])


def sample(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """The next token [B] for logits [B, vocab]: the largest at temperature 0, else drawn with the generator."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    weights = (logits.double() / temperature).softmax(dim=-1).cpu()
    return torch.multinomial(weights, 1, generator=generator)[:, 0].to(logits.device)


@torch.no_grad()
def generate(
    model: DecoderLM,
    prompt: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    recompute: bool = False,
) -> Tensor:
    """Continues each prompt by ``length`` tokens.

    Args:
        model: in eval mode, or without dropout.
        prompt: [B, T] integers, T at least 1.
        length: tokens to add.
        temperature: 0 for the most likely token each time.
        generator: on the CPU; the same one gives the same text on any device up to rounding.
        recompute: runs the model over the whole text for each token instead of carrying its state; the text is
            the same, and the time grows with its square. For tests.

    Returns:
        [B, length] integers.
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt: got shape {tuple(prompt.shape)}, allowed is [B, T] with T at least 1")
    if temperature < 0:
        raise ValueError(f"temperature: got {temperature}, allowed is 0 or more")
    text = prompt
    state: LMState | None = None
    logits = None
    for _ in range(length):
        if recompute:
            logits = model(text)
        elif logits is None:
            logits, state = model.step(prompt)
        else:
            logits, state = model.step(text[:, -1:], state)
        text = torch.cat((text, sample(logits[:, -1], temperature, generator)[:, None]), dim=1)
    return text[:, prompt.shape[1] :]
