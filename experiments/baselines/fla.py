"""Gated linear attention and RetNet from flash-linear-attention, an optional package that needs a GPU.

They are what decay in RACE must be compared with: gated linear attention (Yang et al. 2023, arXiv 2312.06635) and
multi-scale retention (Sun et al. 2023, arXiv 2307.08621), as that library's layers implement them.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn


class _FlaMixer(nn.Module):
    """A layer of that library under the baselines' interface; causal, and without a state here.

    Args:
        options: keywords of the library's layer (``expand_k``, ``expand_v``, ``use_short_conv``...).
    """

    recurrent = False
    layer_name = ""

    def __init__(self, dim: int, heads: int, *, causal: bool, max_length: int, seed: int = 0, **options: Any) -> None:
        super().__init__()
        if not causal:
            raise ValueError("causal: got False, allowed is True: decay runs forward in time")
        try:
            layers = importlib.import_module("fla.layers")
        except ImportError as error:
            raise ValueError(
                f"{type(self).__name__} needs flash-linear-attention (pip install flash-linear-attention): {error}"
            ) from error
        self.max_length = max_length  # unused: the layer has no length of its own
        self.layer = getattr(layers, self.layer_name)(hidden_size=dim, num_heads=heads, **options)

    def forward(
        self, x: Tensor, *, key_padding_mask: Tensor | None = None, state: Any = None, return_state: bool = False
    ) -> Tensor:
        if state is not None or return_state:
            raise ValueError(f"state: {type(self).__name__} keeps none, allowed is a mixer with recurrent = True")
        mask = None if key_padding_mask is None else (~key_padding_mask).to(x.dtype)
        out: Tensor = self.layer(x, attention_mask=mask)[0]
        return out


class GatedLinearMixer(_FlaMixer):
    """Gated linear attention: a gate for each channel of the key, from the token."""

    layer_name = "GatedLinearAttention"


class RetNetMixer(_FlaMixer):
    """Multi-scale retention: a fixed decay a head, rotary positions, norm and gate."""

    layer_name = "MultiScaleRetention"
