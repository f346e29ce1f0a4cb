"""Token mixers behind one interface, so that a line of configuration swaps one for another in every model.

A mixer is a module made by :func:`make_mixer`. Its call is

    mixer(x, *, key_padding_mask=None)                                 -> [B, T, E]
    mixer(x, state=state, return_state=True)  (causal, recurrent)      -> ([B, T, E], state)

with ``x`` [B, T, E] and ``key_padding_mask`` [B, T] bool, True where padding. ``state`` is what the previous call
returned, or None before the first token; only mixers whose class says ``recurrent = True`` take one.

Letters: B batch, T tokens, E model size, H heads, D head size, R features.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from experiments.config import ConfigError

#: name -> module:class, imported on first use, so that one method's extra does not burden another.
MIXERS = {
    "race": "experiments.baselines.race:RaceMixer",
    "softmax": "experiments.baselines.softmax:SoftmaxMixer",
    "linear": "experiments.baselines.linear:LinearMixer",
    "performer": "experiments.baselines.performer:PerformerMixer",
    "linformer": "experiments.baselines.linformer:LinformerMixer",
    "sigmoid": "experiments.baselines.sigmoid:SigmoidMixer",
    "yoso": "experiments.baselines.yoso:YosoMixer",
    "angular": "experiments.baselines.angular:AngularMixer",
    "gla": "experiments.baselines.fla:GatedLinearMixer",
    "retnet": "experiments.baselines.fla:RetNetMixer",
}


def make_mixer(
    name: str, dim: int, heads: int, *, causal: bool, max_length: int, seed: int = 0, options: Mapping[str, Any]
) -> nn.Module:
    """One token mixer.

    Args:
        name: a key of :data:`MIXERS`.
        dim: E.
        heads: H; E a multiple of it.
        causal: whether token i sees only tokens up to i.
        max_length: the most tokens one call will see; only methods with a length of their own (Linformer,
            learned positions) read it.
        seed: of the mixer's random features; differs from layer to layer.
        options: of the method, as its class documents them.

    Raises:
        ConfigError: no such mixer, an option it does not have or does not allow.
    """
    if name not in MIXERS:
        raise ConfigError(f"mixer: got {name!r}, allowed are " + ", ".join(MIXERS))
    module, _, cls = MIXERS[name].partition(":")
    make = getattr(importlib.import_module(module), cls)
    try:
        return make(dim, heads, causal=causal, max_length=max_length, seed=seed, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"mixer {name} with options {dict(options)}: {error}") from error
