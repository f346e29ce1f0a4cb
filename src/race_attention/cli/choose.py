"""``race-attention choose``: how many planes and tables, from what is wished of sharpness and memory."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from race_attention.arguments import number
from race_attention.backends.triton import MOST_BUCKETS
from race_attention.forms import MAX_BETA, MAX_PLANES

from .common import Json, console, si, table, write_json

STATE_BYTES = 8  # states are float64
PAPER = ((2, 2), (3, 3), (4, 4))  # (P, L), the configurations of the paper's experiments


@dataclass(frozen=True)
class Costs:
    """What a choice of P and L costs and brings.

    Attributes:
        planes: P.
        tables: L.
        buckets: S = L 2**P.
        state_bytes: of one head's state, S (Dv + 1) numbers in float64.
        flops_per_token: of one head forward, a multiply-add as two: projections of a query and a key 4 L P D,
            buckets 4 S, adding a token to the state and reading it 4 S (Dv + 1). Kernels that work in chunks
            spend other amounts; this is the recurrent form, which decoding has.
        half_angle: the angle in degrees between a query and a key at which the expected kernel for large beta,
            (1 - angle/pi)**P, is one half.
        sampling_error: sqrt(ln(N) / L), the paper's term for a finite number of tables.
        smoothing_error: P / beta, the paper's term for a finite beta; None where beta was not given.
    """

    planes: int
    tables: int
    buckets: int
    state_bytes: int
    flops_per_token: int
    half_angle: float
    sampling_error: float
    smoothing_error: float | None


def costs(planes: int, tables: int, head_dim: int, value_dim: int, tokens: int, beta: float | None = None) -> Costs:
    """The costs of P ``planes`` and L ``tables`` for a head of D ``head_dim`` and Dv ``value_dim``.

    The errors are the terms of the paper's bound O(P/beta + sqrt(log(N)/L)) without its constants: they say how
    choices compare, not how large the error is.
    """
    buckets = tables * 2**planes
    return Costs(
        planes=planes,
        tables=tables,
        buckets=buckets,
        state_bytes=buckets * (value_dim + 1) * STATE_BYTES,
        flops_per_token=4 * tables * planes * head_dim + 4 * buckets + 4 * buckets * (value_dim + 1),
        half_angle=half_angle(planes),
        sampling_error=math.sqrt(math.log(max(tokens, 2)) / tables),
        smoothing_error=None if beta is None else planes / beta,
    )


def half_angle(planes: int) -> float:
    """The angle in degrees at which (1 - angle/pi)**P is one half."""
    return 180 * (1 - 0.5 ** (1 / planes))


def suggest(
    head_dim: int, value_dim: int, tokens: int, angle: float, state_bytes: int, beta: float | None = None
) -> Costs:
    """The fewest planes whose half angle is at most ``angle``, then as many tables as ``state_bytes`` hold.

    Planes decide what the kernel is, tables only how well it is estimated: so the planes follow the wish, and
    the tables take what memory is left.

    Raises:
        ValueError: the angle is that of no number of planes up to 10, or not even one table fits.
    """
    planes = next((p for p in range(1, MAX_PLANES + 1) if half_angle(p) <= angle <= half_angle(1)), None)
    if planes is None:
        allowed = f"{half_angle(MAX_PLANES):.1f} to {half_angle(1):.0f} degrees"
        raise ValueError(f"half-angle: got {angle:g}, allowed is {allowed}")
    one_table = 2**planes * (value_dim + 1) * STATE_BYTES
    if one_table > state_bytes:
        raise ValueError(
            f"state-kib: got {state_bytes / 1024:g}, allowed is {math.ceil(one_table / 1024)} or more: "
            f"one table of {planes} planes takes {one_table} bytes a head"
        )
    return costs(planes, state_bytes // one_table, head_dim, value_dim, tokens, beta)


def command(
    head_dim: Annotated[int, typer.Option(min=1, help="D, the size of a query or key.")] = 64,
    value_dim: Annotated[int | None, typer.Option(min=1, help="Dv, the size of a value; D if not given.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="N, the longest context.")] = 65536,
    half_angle: Annotated[
        float, typer.Option(help="The sharpness wished: the angle in degrees at which the kernel is one half.")
    ] = 40.0,
    state_kib: Annotated[
        float, typer.Option(min=0, max=2**30, help="Memory for the state of one head, in KiB.")
    ] = 32.0,
    beta: Annotated[float | None, typer.Option(help="The sharpness of the buckets, for the bound's P/beta.")] = None,
    as_json: Json = False,
) -> None:
    """Suggests (P, L) from a wished sharpness and memory, beside the configurations of the paper."""
    values = head_dim if value_dim is None else value_dim
    try:
        if beta is not None:
            number("beta", beta, 0.0, MAX_BETA)
        chosen = suggest(head_dim, values, tokens, half_angle, int(state_kib * 1024), beta)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    paper = [costs(planes, tables, head_dim, values, tokens, beta) for planes, tables in PAPER]
    if as_json:
        write_json({"suggested": asdict(chosen), "paper": [asdict(row) for row in paper]})
        return
    columns = ("", "P", "L", "S", "state", "flop", "half angle", "sqrt(ln N/L)", "P/beta")
    rows = [("suggested", *_row(chosen)), *(("paper", *_row(row)) for row in paper)]
    out = console()
    out.print(table(f"D = {head_dim}, Dv = {values}, N = {tokens}", columns, rows, right=columns[1:]))
    out.print(
        f"RaceAttention(..., planes={chosen.planes}, tables={chosen.tables}, head_dim={head_dim})", soft_wrap=True
    )
    out.print(
        "P is the sharpness of the kernel, L the number of samples that estimate it, S = L 2^P. State: of one head, "
        "float64. Flop: of one token and head, forward, as when decoding. Half angle: where the kernel for large beta "
        "is one half, in degrees. The last two are the terms of the paper's bound without constants: they compare "
        "choices and do not measure an error."
    )
    if chosen.buckets > MOST_BUCKETS:
        out.print(f"On GPUs only the reference serves more than {MOST_BUCKETS:,} buckets a head.")


def _row(row: Costs) -> tuple[str, ...]:
    return (
        str(row.planes),
        str(row.tables),
        str(row.buckets),
        f"{row.state_bytes / 1024:.1f} KiB",
        si(row.flops_per_token),
        f"{row.half_angle:.1f}",
        f"{row.sampling_error:.2f}",
        "-" if row.smoothing_error is None else f"{row.smoothing_error:.2f}",
    )
