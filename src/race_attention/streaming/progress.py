"""A bar for those who wait, a function for those who log, nothing by default."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any


class Progress:
    """Shows nothing; what others derive from. A context manager."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, phase: str, done: int, total: int | None) -> None:
        """``done`` of ``total`` segments (None: not known) of a phase are finished."""


class _Function(Progress):
    def __init__(self, function: Callable[[str, int, int | None], object]):
        self.function = function

    def show(self, phase: str, done: int, total: int | None) -> None:
        self.function(phase, done, total)


class _Bar(Progress):
    """A line for each phase, on standard error."""

    def __init__(self) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Rich
        except ImportError as error:
            raise ImportError("progress: got True, which needs the package rich: pip install rich") from error
        columns = (TextColumn("{task.description:9}"), BarColumn(), MofNCompleteColumn())
        self.rich: Any = Rich(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        self.rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rich.stop()

    def show(self, phase: str, done: int, total: int | None) -> None:
        if phase not in self.tasks:
            self.tasks[phase] = self.rich.add_task(phase, total=total)
        self.rich.update(self.tasks[phase], completed=done, total=total)


def progress_of(given: bool | Progress | Callable[[str, int, int | None], object]) -> Progress:
    """What a ``progress`` argument asks for.

    Raises:
        ImportError: a bar without rich. TypeError: neither a bool nor callable.
    """
    if isinstance(given, Progress):
        return given
    if given is True:
        return _Bar()
    if given is False:
        return Progress()
    if callable(given):
        return _Function(given)
    raise TypeError(f"progress: got {given!r}, allowed is a bool or a function of (phase, done, total)")
