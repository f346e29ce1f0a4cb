"""The body that every model shares: pre-norm blocks of a token mixer and an MLP.

Letters: B batch, T tokens, E model size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from experiments.baselines import MIXERS, make_mixer
from experiments.config import check


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of a model.

    Attributes:
        dim: E.
        layers: blocks.
        heads: of the mixer.
        mixer: a key of :data:`experiments.baselines.MIXERS`.
        mixer_options: keywords of that mixer.
        mlp: "swiglu" (Shazeer 2020, arXiv 2002.05202) or "gelu".
        mlp_ratio: hidden size of a GELU MLP over E; SwiGLU gets 2/3 of it, for equal parameters.
        norm: "rms" (Zhang and Sennrich 2019) or "layer".
        positions: "none" or "learned", added to the embedding; rotary ones are an option of the mixer.
        tie_embeddings: whether the output matrix of a language model is the embedding.
        vocab: tokens; 256 for bytes.
        max_length: of learned positions and of mixers with a length of their own.
        dropout: on the output of mixer and MLP.
        mixer_init: "own" leaves RACE's layer the weights it gave itself; "shared" gives its projections the start that
            all other mixers' have, for comparisons.
    """

    dim: int = 128
    layers: int = 2
    heads: int = 4
    mixer: str = "race"
    mixer_options: dict[str, Any] = field(default_factory=dict)
    mlp: str = "swiglu"
    mlp_ratio: float = 4.0
    norm: str = "rms"
    positions: str = "none"
    tie_embeddings: bool = False
    vocab: int = 256
    max_length: int = 65536
    dropout: float = 0.0
    mixer_init: str = "own"

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "vocab", "max_length"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        check(self.dim % self.heads == 0, "heads", self.heads, f"a divisor of dim, {self.dim}")
        check(self.mixer in MIXERS, "mixer", self.mixer, "one of " + ", ".join(MIXERS))
        check(self.mlp in ("swiglu", "gelu"), "mlp", self.mlp, "'swiglu' or 'gelu'")
        check(self.mlp_ratio > 0, "mlp_ratio", self.mlp_ratio, "above 0")
        check(self.norm in ("rms", "layer"), "norm", self.norm, "'rms' or 'layer'")
        check(self.positions in ("none", "learned"), "positions", self.positions, "'none' or 'learned'")
        check(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        check(self.mixer_init in ("own", "shared"), "mixer_init", self.mixer_init, "'own' or 'shared'")


class SwiGLU(nn.Module):
    """(silu(x W_gate) * x W_up) W_down."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Gelu(nn.Module):
    """gelu(x W_up) W_down."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def make_mlp(config: ModelConfig) -> nn.Module:
    hidden = config.mlp_ratio * config.dim
    if config.mlp == "gelu":
        return Gelu(config.dim, round(hidden))
    return SwiGLU(config.dim, max(8, 8 * round(hidden * 2 / 3 / 8)))


def make_norm(config: ModelConfig) -> nn.Module:
    return nn.RMSNorm(config.dim, eps=1e-6) if config.norm == "rms" else nn.LayerNorm(config.dim)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, *, causal: bool, layer: int, seed: int) -> None:
        super().__init__()
        self.mixer_norm, self.mlp_norm = make_norm(config), make_norm(config)
        self.mixer = make_mixer(
            config.mixer,
            config.dim,
            config.heads,
            causal=causal,
            max_length=config.max_length,
            seed=seed * 1000 + layer,
            options=config.mixer_options,
        )
        self.mlp = make_mlp(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
        """X [B, T, E], padding [B, T] True where padding -> [B, T, E]."""
        x = x + self.dropout(self.mixer(self.mixer_norm(x), key_padding_mask=key_padding_mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next tokens x [B, T, E] after those that ``state`` holds -> [B, T, E] and the state after them."""
        mixed, state = self.mixer(self.mixer_norm(x), state=state, return_state=True)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.mlp_norm(x))), state


def init_weights(model: nn.Module, layers: int, mixer_init: str = "own") -> None:
    """Normal(0, 1/sqrt(fan-in)) linears, those that add to the residual stream scaled by 1/sqrt(2 layers).

    A mixer with a ``reset_parameters`` of its own (RACE) keeps what that gave, or with "shared" only its decay.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0 if module.num_embeddings <= 4096 else 0.5)
        elif isinstance(module, nn.Linear):
            if _owned_by_mixer(name, model) and (mixer_init == "own" or name.endswith("decay_proj")):
                continue
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if name.endswith(("mlp.down", "mixer.out", "mixer.out_proj", "mixer.layer.o_proj")):
                nn.init.normal_(module.weight, std=(module.in_features * 2 * layers) ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _owned_by_mixer(name: str, model: nn.Module) -> bool:
    parent, _, _ = name.rpartition(".")
    return bool(parent) and hasattr(model.get_submodule(parent), "reset_parameters")


def count_parameters(model: nn.Module) -> int:
    """Trained numbers of a model."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
