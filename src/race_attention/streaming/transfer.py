"""Between the host and a device: the next segment is read and copied while the present one is computed.

On the CPU nothing is read ahead, so that one segment is in memory at a time; on a GPU two are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from . import trees
from .sinks import Sink


def moved(items: Iterator[Any], device: torch.device | None, ahead: bool = True) -> Iterator[Any]:
    """The items with their tensors on ``device``; on CUDA, with ``ahead``, copied by a thread and a stream aside.

    Args:
        items: tensors, or tuples, lists, dicts of them.
        device: None leaves them where they are.
        ahead: False for items made on the device itself.
    """
    if device is None or device.type != "cuda" or not ahead:
        # No name for the item, here or in what walks sources: the last one would stay while the next is made.
        yield from items if device is None else map(partial(trees.move, device=device), items)
        return
    side = torch.cuda.Stream(device)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(_fetch, items, device, side)
        while True:
            fetched = coming.result()
            if fetched is None:
                return
            item, arrived = fetched
            coming = thread.submit(_fetch, items, device, side)
            torch.cuda.current_stream(device).wait_event(arrived)
            for x in trees.leaves(item):
                x.record_stream(torch.cuda.current_stream(device))
            del fetched, x
            yield item
            del item


def boxed(item: Any) -> list[Any]:
    """The item in a list of one, from which it can be taken away."""
    return [item]


def _fetch(items: Iterator[Any], device: torch.device, side: torch.cuda.Stream) -> tuple[Any, torch.cuda.Event] | None:
    """The next item on its way to the device, and the event of its arrival; None after the last."""
    with torch.cuda.stream(side):  # a source may compute on the device too
        try:
            item = next(items)
        except StopIteration:
            return None
        item = trees.tree_map(lambda x: _to_device(x, device), item)
        arrived = torch.cuda.Event()
        arrived.record(side)
    return item, arrived


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    if x.device.type != "cpu":
        return x.to(device)
    return (x if x.is_pinned() else x.pin_memory()).to(device, non_blocking=True)


class Writer:
    """Feeds a sink; what a GPU computed and the sink wants on the CPU is copied and written by a thread aside."""

    def __init__(self, sink: Sink):
        self.sink = sink
        self._thread = ThreadPoolExecutor(1)
        self._side: torch.cuda.Stream | None = None
        self._pending: Future[None] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.drain()
        finally:
            self._thread.shutdown()

    def write(self, pieces: Mapping[str, Tensor], start: int) -> None:
        """Hands on a segment's pieces; returns before they are written, where a copy is needed."""
        if not (self.sink.on_cpu and any(x.is_cuda for x in pieces.values())):
            self.sink.write(pieces, start)
            return
        device = next(x.device for x in pieces.values() if x.is_cuda)
        self._side = side = self._side or torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            host = {name: self._to_host(x, side) for name, x in pieces.items()}
            arrived = torch.cuda.Event()
            arrived.record(side)
        self.drain()
        self._pending = self._thread.submit(self._finish, host, start, arrived)

    def drain(self) -> None:
        """Waits for all to be with the sink."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _finish(self, host: Mapping[str, Tensor], start: int, arrived: torch.cuda.Event) -> None:
        arrived.synchronize()
        self.sink.write(host, start)

    @staticmethod
    def _to_host(x: Tensor, side: torch.cuda.Stream) -> Tensor:
        if not x.is_cuda:
            return x
        x.record_stream(side)
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
