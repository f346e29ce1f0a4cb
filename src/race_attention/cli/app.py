"""The application: one command for each module named in ``COMMANDS``.

A command is a module of this package with a function ``command``, whose signature Typer reads and whose
docstring it shows. To add one, write the module and add its name.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from race_attention._version import __version__

COMMANDS = ("info", "choose", "bench", "stream", "autotune")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"race-attention {__version__}")
        raise typer.Exit


app = typer.Typer(name="race-attention", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _race_attention(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """RACE Attention: attention in strictly linear time (arXiv 2510.04008)."""


for _name in COMMANDS:
    app.command(_name)(import_module(f"{__package__}.{_name}").command)
