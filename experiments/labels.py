"""What a row of a table is called: the method and what stands around it, from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METHODS = {
    "softmax": "softmax",
    "linear": "linear (elu + 1)",
    "performer": "Performer",
    "linformer": "Linformer",
    "sigmoid": "sigmoid",
    "gla": "gated linear attention",
    "retnet": "RetNet",
}

#: Option, value (... for any that is true) -> words, in the order they are said.
WORDS: tuple[tuple[str, Any, str], ...] = (
    ("scale", 1.0, "scale 1"),
    ("beta", ..., "beta from {}"),
    ("learn_beta", False, "beta fixed"),
    ("orthogonal", True, "orthogonal planes"),
    ("learn_hyperplanes", True, "learned planes"),
    ("hyperplanes_per_head", False, "one draw for all heads"),
    ("readout", "bucket", "mean of each bucket"),
    ("head_dim", ..., "keys of {}"),
    ("key_dim", ..., "keys of {}"),
    ("qk_norm", True, "norm of queries and keys"),
    ("contrast", True, "contrast"),
    ("wide_core", True, "float32 core"),
    ("rope", ..., "rotary"),
    ("conv_size", ..., "convolution"),
    ("decay", "per_token", "decay"),
    ("decay", "multiscale", "fixed decays"),
    ("decay", "learned", "a learned decay a head"),
    ("norm_gate", True, "gate"),
)


def label(model: Mapping[str, Any], usual_heads: int | None = None) -> str:
    """The name of a model of :class:`~experiments.models.blocks.ModelConfig`'s fields.

    Args:
        model: its fields.
        usual_heads: in the table; another number is said.
    """
    other = bool(usual_heads) and model.get("heads", usual_heads) != usual_heads
    return ", ".join([_method(model), *([f"{model['heads']} heads"] if other else []), *_words(model)])


def change(model: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """What is different in a model from another of its kind."""
    mine, its = _words(model), _words(base)
    with_decay = any("decay" in word for word in mine)
    gone = [word for word in its if word not in mine and not (with_decay and "decay" in word)]
    parts = [] if _method(model) == _method(base) else [_method(model).rpartition(" ")[2]]
    return ", ".join([*parts, *(word for word in mine if word not in its), *(f"no {word}" for word in gone)])


def _words(model: Mapping[str, Any]) -> list[str]:
    options = model.get("mixer_options", {})
    words = []
    for option, value, text in WORDS:
        given = options.get(option)
        if given is not None and (given == value or (value is ... and given)):
            words.append(text.format(f"{given:g}" if isinstance(given, float) else given))
    return words


def _method(model: Mapping[str, Any]) -> str:
    mixer, options = str(model.get("mixer", "race")), model.get("mixer_options", {})
    if mixer == "race":
        return f"RACE ({options.get('planes', 4)},{options.get('tables', 4)})"
    if mixer == "yoso":
        return "YOSO, sampled" if options.get("hashes", 32) else "YOSO, expectation"
    if mixer == "angular":
        return f"angular, gamma {options.get('gamma', 8.0):g}"
    return METHODS.get(mixer, mixer)
