"""What the commands share: options, tables, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables, for other programs to read.")]


@contextmanager
def enough_memory(options: str) -> Iterator[None]:
    """Names ``options`` where memory does not suffice, in place of a traceback."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch raises a plain RuntimeError for the CPU's
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        raise typer.BadParameter(f"{options}: got more than memory holds: {reason}") from None


def write_json(data: Any) -> None:
    """Prints ``data`` as JSON, whatever the width of the terminal."""
    typer.echo(json.dumps(data, indent=2))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> Table:
    """A table of text; the columns named in ``right`` are aligned there, as numbers are."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def console() -> Console:
    """Of standard output, at the time of the call: tests and pipes replace it."""
    return Console(highlight=False)


def si(number: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 65536 -> '65.5 k'."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(number) >= 10**power:
            return f"{number / 10**power:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()
