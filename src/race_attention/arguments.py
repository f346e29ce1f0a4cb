"""Checks of single arguments. Every message names the argument, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal


def size(name: str, given: int, least: int = 1, most: int | None = None) -> int:
    """``given``, an integer from ``least`` to ``most``.

    Raises:
        TypeError: it is no integer. ValueError: it is out of range.
    """
    if not isinstance(given, int) or isinstance(given, bool):
        raise TypeError(f"{name}: got {given!r}, allowed is an integer")
    if given < least or (most is not None and given > most):
        raise ValueError(f"{name}: got {given}, allowed is {least} " + ("or more" if most is None else f"to {most}"))
    return given


#: What torch's generators take.
SEEDS = -(2**63), 2**64 - 1


def flag(name: str, given: bool) -> bool:
    """``given``, a bool and nothing that passes for one.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(given, bool):
        raise TypeError(f"{name}: got {given!r}, allowed is a bool")
    return given


def number(name: str, given: float, least: float, most: float, ends: Literal["[]", "(]", "[)", "()"] = "(]") -> float:
    """``given`` as a float between ``least`` and ``most``; ``ends`` says which of the two it may be. Never NaN.

    Raises:
        TypeError: it is no number. ValueError: it is out of range.
    """
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise TypeError(f"{name}: got {given!r}, allowed is a number")
    above = given >= least if ends[0] == "[" else given > least
    below = given <= most if ends[1] == "]" else given < most
    if not (above and below):
        raise ValueError(f"{name}: got {given}, allowed is in {ends[0]}{least:g}, {most:g}{ends[1]}")
    return float(given)


def same_shape(given: Sequence[int], allowed: Sequence[int]) -> bool:
    """Size by size: tuples of which one has a number where the other has a symbol are unequal to torch.compile."""
    return len(given) == len(allowed) and all(a == b for a, b in zip(given, allowed, strict=True))
