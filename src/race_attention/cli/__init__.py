"""The command ``race-attention``. Needs the extra ``cli`` (Typer and Rich), and says so where it is missing."""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point of the command."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("typer", "rich", "click"):
            raise
        sys.exit(
            f"race-attention: the package {error.name!r} is missing; install it with: pip install 'race-attention[cli]'"
        )
    app()
