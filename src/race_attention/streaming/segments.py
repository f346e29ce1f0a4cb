"""Where segments come from: sequences, functions of an index, iterables, arrays in memory or in files.

Indexed     can be read in any order, as often as wanted: what a backward pass needs
Repeatable  can be read from the start again: enough for what goes forward only
Once        can be read one time
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from race_attention.arguments import size
from race_attention.forms import is_tensor

from . import trees


class Segment(NamedTuple):
    """A run of adjacent tokens of all rows, as a source of :func:`stream_attention` yields it.

    A tuple of the first three (or more), or a mapping with these names, does as well. Segments may have any
    sizes. Without ``causal`` a segment's queries and keys may differ in number.

    Attributes:
        query: [B, t, H, D].
        key: [B, t, G, D].
        value: [B, t, G, Dv].
        log_decay: [B, t, G] or None; causal only.
        key_mask: [B, t] or [B, t, G] bool, True takes part, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor | None = None
    key_mask: Tensor | None = None


def as_segment(item: Any) -> Segment:
    """The segment that a source has yielded.

    Raises:
        TypeError: it is something else. ValueError: its tensors do not have four axes.
    """
    segment = _segment_of(item)
    for name in ("query", "key", "value"):
        x = getattr(segment, name)
        is_tensor(f"{name} of a segment", x)
        if x.ndim != 4:
            raise ValueError(f"{name} of a segment: got shape {list(x.shape)}, allowed is [B, t, heads, size]")
    return segment


def _segment_of(item: Any) -> Segment:
    if isinstance(item, Segment):
        return item
    if isinstance(item, Mapping):
        names = set(item)
        if not {"query", "key", "value"} <= names <= set(Segment._fields):
            raise TypeError(
                f"source: got a mapping of {sorted(names)}, allowed are query, key, value, and log_decay and key_mask"
            )
        return Segment(**item)
    if isinstance(item, (tuple, list)) and 3 <= len(item) <= 5:
        return Segment(*item)
    given = f"a {type(item).__name__}" + (f" of {len(item)}" if isinstance(item, (tuple, list)) else "")
    raise TypeError(f"source: got {given}, allowed is (query, key, value), a mapping of them, or a Segment")


class Source(ABC):
    """Segments in order. ``count``, ``tokens``: how many segments and tokens, where it is known beforehand."""

    count: int | None = None
    tokens: int | None = None

    @abstractmethod
    def walk(self, begin: int = 0) -> Iterator[Any]:
        """The segments from number ``begin`` on."""


class Indexed(Source):
    """A source that can be read in any order, as often as wanted: derive from it and give it these two."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of segments."""

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """A segment: (query, key, value) or a :class:`Segment`, or whatever a model is called on."""

    def walk(self, begin: int = 0) -> Iterator[Any]:
        """The segments from number ``begin`` on."""
        return (self[index] for index in range(begin, len(self)))


class Repeatable(Source):
    """What can be walked from the start again."""

    def __init__(self, factory: Callable[[], Iterable[Any]]):
        self.factory = factory

    def walk(self, begin: int = 0) -> Iterator[Any]:
        """The segments from number ``begin`` on."""
        return islice(iter(self.factory()), begin, None)


class Once(Source):
    """An iterator."""

    def __init__(self, iterator: Iterator[Any]):
        self.iterator, self.walked = iterator, False

    def walk(self, begin: int = 0) -> Iterator[Any]:
        """The segments from number ``begin`` on, one time."""
        if self.walked:
            raise ValueError("source: got an iterator that was read before, allowed is one read for each iterator")
        self.walked = True
        return islice(self.iterator, begin, None)


class _Sequence(Indexed):
    def __init__(self, items: Sequence[Any]):
        self.items, self.count = items, len(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class _Function(Indexed):
    def __init__(self, function: Callable[[int], Any], count: int):
        self.function, self.count = function, count

    def __len__(self) -> int:
        return self.count or 0

    def __getitem__(self, index: int) -> Any:
        return self.function(index)


class ArraySource(Indexed):
    """Arrays with all tokens, cut into segments: tensors, NumPy arrays and memory maps, arrays in files.

    Args:
        arrays: by name ("query", "key", "value", "log_decay", "key_mask"), each [B, T, ...]; or one array
            alone, whose segments are tensors. Arrays of files (:func:`open_npy`, :func:`open_safetensors`) are
            read piece by piece and never mapped, so that the pages of a long file do not fill the memory.
        segment: tokens a segment (the last may be shorter), or the sizes of all.
        device: where segments are put; by default they stay.

    Raises:
        ValueError: arrays of different lengths, or sizes that do not sum to it.
    """

    def __init__(self, arrays: Any, segment: int | Sequence[int], *, device: torch.device | str | None = None):
        self.arrays: dict[str, Any] = dict(arrays) if isinstance(arrays, Mapping) else {"": arrays}
        self.device = device
        lengths = {name: int(x.shape[1]) for name, x in self.arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"arrays: got lengths {lengths}, allowed is one length")
        self.tokens = next(iter(lengths.values()))
        self.bounds = [0, *accumulate(segment_sizes(self.tokens, segment))]
        self.count = len(self.bounds) - 1

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> Any:
        begin, end = self.bounds[index], self.bounds[index + 1]
        parts = {name: _slice(x, begin, end, self.device) for name, x in self.arrays.items()}
        return parts[""] if list(parts) == [""] else parts


def segment_sizes(tokens: int, segment: int | Sequence[int]) -> list[int]:
    """The sizes of the segments of ``tokens`` tokens: all ``segment``, the last the rest; or those given, checked."""
    if not isinstance(segment, Iterable):
        size("segment", segment)
        full, rest = divmod(tokens, segment)
        return [segment] * full + [rest] * (rest > 0)
    sizes = [int(tokens_of_one) for tokens_of_one in segment]
    if sum(sizes) != tokens or min(sizes, default=0) < 0:
        raise ValueError(f"segment: got sizes that sum to {sum(sizes)}, allowed are sizes that sum to {tokens}")
    return sizes


def cut(tokens: Any, segment: int | Sequence[int], dim: int = 1) -> list[Any]:
    """Tensors cut along their tokens: views, for :func:`stream_backward`.

    Args:
        tokens: a tensor [B, T, ...], or a tuple, list or dict of those, of one T.
        segment: tokens a segment, or the sizes of all.
        dim: the axis of tokens.

    Returns:
        A list of what was given, each with a segment's tokens.

    Raises:
        ValueError: tensors of several lengths, or segments that do not add up to them.
    """
    lengths = {int(x.shape[dim]) for x in trees.leaves(tokens)}
    if len(lengths) != 1:
        raise ValueError(f"tokens: got lengths {sorted(lengths)} along axis {dim}, allowed is one length")
    bounds = [0, *accumulate(segment_sizes(lengths.pop(), segment))]
    return [_narrow(tokens, dim, begin, end) for begin, end in pairwise(bounds)]


def _narrow(tree: Any, dim: int, begin: int, end: int) -> Any:
    return trees.tree_map(lambda x: x.narrow(dim, begin, end - begin), tree)


def _slice(array: Any, begin: int, end: int, device: torch.device | str | None) -> Tensor:
    from .files import FileArray

    if isinstance(array, FileArray):
        part = array.read(begin, end)
    elif isinstance(array, Tensor):
        part = array[:, begin:end]
    else:
        import numpy

        part = torch.from_numpy(numpy.array(array[:, begin:end]))
    return part if device is None else part.to(device)


def as_source(name: str, given: Any, count: int | None = None) -> Source:
    """The source that an argument means.

    A :class:`Source`; a sequence; a function of the index with ``count``; a function without arguments that
    returns an iterable; an iterable; an iterator.

    Raises:
        TypeError: none of these. ValueError: another ``count`` than there are.
    """
    source = _as_source(name, given, count)
    if count is not None and source.count not in (None, size("count", count, least=0)):
        raise ValueError(f"count: got {count}, allowed is None or what {name} has, {source.count} segments")
    return source


def _as_source(name: str, given: Any, count: int | None) -> Source:
    if isinstance(given, Source):
        return given
    if isinstance(given, Iterator):
        return Once(given)
    if isinstance(given, Sequence) and not isinstance(given, str):
        return _Sequence(given)
    if hasattr(given, "__len__") and hasattr(given, "__getitem__") and not isinstance(given, (str, Tensor, Mapping)):
        return _Sequence(given)
    if callable(given):
        return Repeatable(given) if count is None else _Function(given, count)
    if isinstance(given, Iterable) and not isinstance(given, (str, Tensor, Mapping)):
        return Repeatable(lambda: given)
    raise TypeError(
        f"{name}: got {type(given).__name__}, allowed is a sequence, an iterable, a function of the index with their "
        f"count, a function that returns an iterable, or a Source (ArraySource for arrays and files)"
    )


def indexed(name: str, given: Any, count: int | None = None) -> Indexed:
    """A source that can be read from the last segment back.

    Raises:
        ValueError: it cannot. TypeError: it is no source.
    """
    source = as_source(name, given, count)
    if isinstance(source, Indexed):
        return source
    what = "an iterator, which can be read once" if isinstance(source, Once) else "what can be read forward only"
    raise ValueError(
        f"{name}: got {what}; a backward pass reads segments again, from the last back: allowed are a sequence, a "
        f"function of the index with their count, or an ArraySource"
    )


def read_twice(name: str, given: Any, count: int | None = None) -> Source:
    """A source that can be read from the start again.

    Raises:
        ValueError: it is an iterator. TypeError: it is no source.
    """
    source = as_source(name, given, count)
    if isinstance(source, Once):
        raise ValueError(
            f"{name}: got an iterator, which can be read once, and it has to be read again: allowed are a sequence, "
            f"an iterable or a function that returns one, a function of the index with their count, or an ArraySource"
        )
    return source
