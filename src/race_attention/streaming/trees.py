"""States as trees: what a layer carries from segment to segment, taken apart into tensors and put together again.

A state is None, a tensor, a number, or a tuple, list, dict or dataclass of states. It is kept as it is; only
its tensors are looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def tree_map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same state with ``function`` applied to every tensor, in the order of :func:`leaves`.

    Raises:
        TypeError: something in it is none of the allowed.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, dict):
        return {name: tree_map(function, part) for name, part in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(tree_map(function, part) for part in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(tree_map(function, part) for part in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        changed = {f.name: tree_map(function, getattr(tree, f.name)) for f in dataclasses.fields(tree) if f.init}
        return dataclasses.replace(tree, **changed)
    raise TypeError(
        f"state: got {type(tree).__name__} in it, allowed are None, tensors, numbers, and tuples, lists, dicts and "
        f"dataclasses of them"
    )


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a state, in a fixed order."""
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    tree_map(note, tree)
    return found


def with_leaves(tree: Any, tensors: Iterator[Tensor]) -> Any:
    """The state with its tensors replaced by the next ones of ``tensors``."""
    return tree_map(lambda _: next(tensors), tree)


def detach(tree: Any) -> Any:
    """The same numbers, cut from the autograd graph."""
    return tree_map(Tensor.detach, tree)


def compact(x: Tensor) -> Tensor:
    """The same numbers, cut from the graph, in memory of their own: a view keeps all that it is a view of."""
    x = x.detach()
    return x if x.untyped_storage().nbytes() <= 2 * x.numel() * x.element_size() else x.clone()


def move(tree: Any, device: torch.device | str) -> Any:
    """The state on another device."""
    return tree_map(lambda x: x.to(device), tree)


def as_leaves(tree: Any) -> Any:
    """The state with its floating tensors as leaves of autograd that want a gradient."""
    return tree_map(lambda x: x.detach().requires_grad_() if is_float(x) else x.detach(), tree)


def is_float(x: Tensor) -> bool:
    """Whether gradients can flow through ``x``."""
    return x.is_floating_point() or x.is_complex()
