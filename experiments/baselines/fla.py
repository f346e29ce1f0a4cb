"""Gated linear attention and RetNet from flash-linear-attention, an optional package that needs a GPU.

They are what decay in RACE must be compared with: gated linear attention (Yang et al. 2023, arXiv 2312.06635) and
multi-scale retention (Sun et al. 2023, arXiv 2307.08621), as that library's layers implement them.

Its kernels try 6 to 48 configurations each before they run for the first time, 275 compilations for a layer of gated
linear attention with its backward pass. Accuracy does not depend on which one is the fastest, so each takes one here
(:func:`one_configuration`), 13 compilations; times of a step with these mixers say nothing of that library's speed.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

#: The package whose layers these are.
PACKAGE = "fla"


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
            layers = importlib.import_module(f"{PACKAGE}.layers")
        except ImportError as error:
            raise ValueError(
                f"{type(self).__name__} needs flash-linear-attention (pip install flash-linear-attention): {error}"
            ) from error
        self.max_length = max_length  # unused: the layer has no length of its own
        self.layer = getattr(layers, self.layer_name)(hidden_size=dim, num_heads=heads, **options)
        one_configuration(PACKAGE)

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


def one_configuration(package: str) -> int:
    """Has each kernel of a package, loaded as it is, take one configuration in place of timing all of them.

    What the kernels themselves rule out for a shape (``early_config_prune``: some of it is known to be wrong, not
    slow) stays ruled out. Of the rest the one nearest to 4 warps, 2 stages and blocks of 64 is taken, and run once in
    place of being timed. Holds for the whole process, for shapes that were not tuned before.

    Returns:
        The number of kernels.
    """
    found = {id(tuner): tuner for tuner in _tuners(package)}
    for tuner in found.values():
        tuner.perf_model, tuner.configs_top_k, tuner.do_bench = _distance, 1, _once
    return len(found)


def _tuners(package: str) -> Iterator[Any]:
    """Triton's autotuners in the package's modules; heuristics may lie around them."""
    from triton.runtime.autotuner import Autotuner

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package:
            for value in list(vars(module).values()):
                while value is not None and not isinstance(value, Autotuner):
                    value = vars(value).get("fn") if type(value).__module__.startswith("triton.") else None
                if value is not None:
                    yield value


def _distance(**arguments: Any) -> float:
    """How far a configuration is from the wanted one, in doublings; sizes of blocks are called BK, BV, BT..."""
    blocks = [value for name, value in arguments.items() if len(name) == 2 and name[0] == "B" and value]
    far = abs(math.log2(arguments["num_warps"] / 4)) + abs(arguments["num_stages"] - 2)
    return far + sum(abs(math.log2(block / 64)) for block in blocks)


def _once(call: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
    """Stands in for a benchmark of a kernel: there is nothing to compare."""
    call()
    return [0.0] * len(quantiles)
