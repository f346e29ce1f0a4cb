"""The gradient of log_decay on a GPU against float64, from decays that forget hardly anything to those that forget all.

    python -m benchmarks.gpu_decay [--shapes 3,20 4,8] [--dtypes bfloat16] [--workers 14] [--seconds 170]

Writes a result file. Two heads of 128, in runs as long as those of calls of a million tokens, of out alone: a state's
gradient would hide what small weights are worth. What is right the reference backend says in float64, on the same GPU.
In 16 bits the gradient of a decay by head counts by the size of what queries add, as in the tests (helpers.Right says
why); rows have it by itself too, and in float32 by the former. What is out of its budget is asked once more of float64
with soft buckets that are rounded alone (tests/rounded.py): within twice what that moves it is ill-conditioned. Exit
status 1 where an error of log_decay's gradient, or of queries', keys' or values', is neither.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import RESULTS, context
from race_attention import race_attention
from race_attention.testing import BUDGETS, make_inputs, relative_error
from tests import rounded
from tests.helpers import in_double, one_run

DTYPES = ("bfloat16", "float16", "float32")
#: (P, L): several tiles of buckets that are compared whole, those compared by halves, and one tile.
SHAPES = ((3, 20), (4, 8), (2, 40), (6, 2), (8, 1), (4, 4), (3, 3), (2, 2))
#: A token's log decay lies between 0 and minus this, a head's is half of it.
DECAYS = (0.01, 0.3, 2.0, 8.0)
#: What is asked of each: options of testing.make_inputs, and the mean of the values.
KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "by token": ({"tokens": 4500}, 0.0),
    "by head": ({"tokens": 4500, "decay": "head"}, 0.0),
    "by token, values of a mean": ({"tokens": 4500}, 3.0),
    "by token, packed": ({"lengths": (2100, 1, 0, 300, 2099)}, 0.0),
}
NAMES = ("log_decay", "query", "key", "value")


def inputs_of(planes: int, tables: int, kind: str, decay: float, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Of one call."""
    options, mean = KINDS[kind]
    given = {"causal": True, "batch": 1, "heads": 2, "dim": 128, "scale": 0.09, "decay": "token"} | options
    inputs = make_inputs(**given, planes=planes, tables=tables, dtype=dtype, device=device, requires_grad=True, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        inputs["value"] += mean
        log_decay = inputs["log_decay"]
        share = torch.rand(log_decay.shape, generator=generator) if log_decay.ndim == 3 else torch.tensor(0.5)
        log_decay.copy_(-decay * share.expand(log_decay.shape))
    return inputs


def gradients(inputs: dict[str, Any], backend: str, along: Tensor) -> dict[str, Tensor]:
    """Those of NAMES of ``along`` . out."""
    out = race_attention(**inputs, backend=backend)
    found = torch.autograd.grad(out, [inputs[name] for name in NAMES], along.to(out.dtype))
    return dict(zip(NAMES, found, strict=True))


def of_queries(inputs: dict[str, Any], along: Tensor) -> float:
    """The root of the sum of squares of what queries add to the gradient of a decay by head, of float64 inputs."""
    with torch.no_grad():
        step = 1e-5
        later, earlier = (
            race_attention(**{**inputs, "log_decay": inputs["log_decay"] + by}, backend="reference")
            for by in (step, -step)
        )
        return float(((later - earlier) * along.double()).sum(-1).norm()) / (2 * step)


def checked(
    planes: int, tables: int, kind: str, decay: float, dtype: torch.dtype, device: str = "cuda"
) -> dict[str, Any]:
    """The row of one call."""
    inputs = inputs_of(planes, tables, kind, decay, dtype, device)
    along = torch.randn(inputs["value"].shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    row: dict[str, Any] = {"part": str(dtype).removeprefix("torch."), "P": planes, "L": tables}
    row |= {"decay": kind, "log_decay down to": -decay}
    try:
        found = gradients(inputs, "triton", along)
    except Exception as error:  # a row like any other, and out of its budget
        return {**row, "error": f"{type(error).__name__}: {error}"[:200], "within": False, "ill-conditioned": False}
    exact = in_double(inputs, device)
    right = gradients(exact, "reference", along)
    scales = dict.fromkeys(NAMES, 0.0)
    errors = {name: relative_error(found[name], right[name]) for name in NAMES}
    if inputs["log_decay"].ndim == 1:
        scale = of_queries(exact, along)
        by_terms = relative_error(found["log_decay"], right["log_decay"], scale=scale)
        if dtype == torch.float32:
            row["of log_decay by what queries add"] = by_terms
        else:
            row["of log_decay by itself"] = errors["log_decay"]
            errors["log_decay"], scales["log_decay"] = by_terms, scale
    row |= {f"of {name}": error for name, error in errors.items()}
    out = [name for name, error in errors.items() if error > BUDGETS[dtype]["backward"]]
    moved = dict.fromkeys(out, 0.0)
    for turn in range(3 if out else 0):
        with rounded.arithmetic(torch.float32 if dtype == torch.float32 else torch.bfloat16, turn):
            other = gradients(exact, "reference", along)
        for name in out:
            moved[name] = max(moved[name], relative_error(other[name], right[name], scale=scales[name]))
    row |= {f"of {name} by rounded buckets": error for name, error in moved.items()}
    ill = bool(out) and all(errors[name] <= 2 * moved[name] for name in out)
    return {**row, "within": not out, "ill-conditioned": ill}


def evaluated(job: tuple[int, int, str, str], end: float) -> list[dict[str, Any]]:
    """The rows of a shape, a dtype and a kind, which compile the same kernels; none is begun after ``end``."""
    planes, tables, dtype, kind = job
    torch.set_num_threads(1)
    with one_run():
        return [checked(planes, tables, kind, decay, getattr(torch, dtype)) for decay in DECAYS if time.time() < end]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=[f"{planes},{tables}" for planes, tables in SHAPES])
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=DTYPES)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=170.0, help="begin no call after so long")
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    shapes = [tuple(map(int, pair.split(","))) for pair in given.shapes]
    jobs = [(planes, tables, dtype, kind) for kind in KINDS for planes, tables in shapes for dtype in given.dtypes]
    machine = context()
    title = f"Triton backend on one {machine['gpu']}: the gradient of log_decay against float64"
    output = given.output or RESULTS / f"gpu-decay-{machine['gpu'].lower().replace(' ', '-')}.json"
    end = time.time() + given.seconds
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        for some in pool.imap_unordered(partial(evaluated, end=end), jobs, chunksize=1):
            rows += some
            rows.sort(key=lambda row: (row["part"], row["P"], row["L"], row["decay"], -row["log_decay down to"]))
            machine["calls"] = f"{len(rows)} of {len(jobs) * len(DECAYS)}"
            output.write_text(json.dumps({"title": title, "context": machine, "rows": rows}, indent=1) + "\n")
    bad = [row for row in rows if not row["within"] and not row["ill-conditioned"]]
    ill = sum(not row["within"] for row in rows) - len(bad)
    print(f"{len(rows)} rows, {len(bad)} out of their budget, {ill} ill-conditioned", *bad, sep="\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
