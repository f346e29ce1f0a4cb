"""``race-attention autotune``: times the Triton kernels' configurations on this GPU and keeps the best."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from .common import console


def command(
    dim: Annotated[int, typer.Option(min=1, max=256, help="D, the size of a query or key.")] = 128,
    value_dim: Annotated[
        int | None, typer.Option(min=1, max=256, help="Dv, the size of a value; D if not given.")
    ] = None,
    planes: Annotated[int, typer.Option(min=1, max=10, help="P, hyperplanes a table.")] = 4,
    tables: Annotated[int, typer.Option(min=1, help="L, hash tables.")] = 4,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Times kernel configurations for one shape class on this GPU and writes the best to your own table."""
    if dtype not in ("bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"dtype: got {dtype!r}, allowed is bfloat16, float16 or float32")
    try:
        from race_attention.backends.triton.autotune import autotune
    except ImportError as error:
        raise typer.BadParameter(f'{error}; pip install "race-attention[triton]"') from None
    out = console()
    try:
        path = autotune(dim, value_dim or dim, tables, planes, getattr(torch, dtype), report=out.print)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    out.print(f"Written to {path}", soft_wrap=True)
