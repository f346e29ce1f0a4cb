"""The equivalence table on a GPU: every case, and in bfloat16 by every route, against the float64 oracle.

    python -m benchmarks.gpu_equivalence [--output FILE] [--workers 14]

Writes a result file. Cases, routes and error budgets are those of tests/helpers.py, with shapes of several bucket
tiles and large heads besides. Rows say the largest relative error (norm) of output and states, and of all
gradients, and whose it is. In 16 bits the gradient of beta and the value sums of a state count by the size of what
tokens add, as in the tests (helpers.Right says why); rows have them by themselves too. Exit status 1 where an error is
out of its budget.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import RESULTS, context
from race_attention import RaceState, race_attention
from race_attention.testing import BUDGETS, make_inputs, relative_error
from tests.helpers import (
    CASES,
    LONG_CASES,
    Right,
    by_oracle,
    by_ranks,
    by_segments,
    by_sequences,
    evaluate,
    in_double,
    no_tokens,
    whole,
    with_padding,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Buckets in several tiles, heads that are large, not a power of two, or as small as a layer has.
SHAPES: dict[str, dict[str, Any]] = {
    "causal-6-2": {"causal": True, "tokens": 150, "dim": 128, "planes": 6, "tables": 2, "heads": 2, "scale": 0.09},
    "causal-8-1": {
        "causal": True, "tokens": 150, "dim": 128, "planes": 8, "tables": 1, "heads": 2, "decay": "token",
        "scale": 0.09,
    },
    "causal-1024-buckets": {
        "causal": True, "tokens": 70, "dim": 32, "planes": 10, "tables": 1, "heads": 1, "scale": 0.2,
    },
    "causal-40-tables": {
        "causal": True, "lengths": (20, 0, 1, 97), "dim": 16, "planes": 1, "tables": 40, "heads": 2, "masked": 0.2,
    },
    "full-5-5": {"tokens": 90, "dim": 16, "planes": 5, "tables": 5, "heads": 2, "initial_state": True},
    "full-8-1": {
        "tokens": 90, "keys": 210, "dim": 64, "planes": 8, "tables": 1, "heads": 4, "kv_heads": 2, "scale": 0.1,
    },
    "causal-large-head": {
        "causal": True, "tokens": 70, "dim": 200, "value_dim": 144, "planes": 2, "tables": 2, "heads": 1, "scale": 0.07,
    },
    "full-256": {"tokens": 70, "dim": 256, "planes": 3, "tables": 3, "heads": 2, "scale": 0.06},
    "causal-4-4": {
        "causal": True, "batch": 2, "tokens": 500, "dim": 128, "planes": 4, "tables": 4, "heads": 4, "kv_heads": 2,
        "decay": "token", "scale": 0.09,
    },
    "full-4-4": {
        "tokens": 500, "dim": 128, "planes": 4, "tables": 4, "heads": 4, "kv_heads": 2, "scale": 0.09, "masked": 0.1,
    },
    "causal-4-4-packed": {
        "causal": True, "lengths": (3, 0, 700, *[10] * 40, 129), "dim": 128, "planes": 4, "tables": 4, "heads": 4,
        "kv_heads": 2, "scale": 0.09,
    },
    "causal-2-2-packed": {
        "causal": True, "lengths": (*[1] * 70, 300, 64, 63, 0, 65, 700), "dim": 128, "heads": 2, "decay": "token",
        "scale": 0.09, "masked": 0.1,
    },
    "full-4-4-packed": {
        "lengths": (3, 0, 400, *[10] * 40, 129), "key_lengths": (5, 1, 300, *[12] * 40, 0), "dim": 128, "planes": 4,
        "tables": 4, "heads": 4, "kv_heads": 2, "scale": 0.09,
    },
    "causal-140000": {
        "causal": True, "batch": 1, "tokens": 140_000, "dim": 32, "planes": 3, "tables": 3, "heads": 2,
        "decay": "token", "scale": 0.2,
    },
    "full-140000": {"batch": 1, "tokens": 140_000, "dim": 32, "planes": 3, "tables": 3, "heads": 2, "scale": 0.2},
}  # fmt: skip
#: Tokens past which the reference backend in float64 is what is right; the oracle compares all pairs.
PAIRS = 5000


def without_states(inputs: dict[str, Any], **how: Any) -> tuple[torch.Tensor, RaceState]:
    """Packed sequences whose states nobody asks for are cut another way."""
    return race_attention(**inputs, **how), no_tokens(inputs)


def routes_of(case: str, options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Routes other than the whole in one call."""
    if case in SHAPES:
        return
    if "lengths" in options:
        yield "each sequence alone", by_sequences
        return
    yield "padded", with_padding
    if case in LONG_CASES:
        return
    if options.get("causal"):
        yield "token by token", partial(by_segments, sizes=(1,))
        yield "segments of 1, 6, 3", partial(by_segments, sizes=(1, 6, 3))
    yield "ranks of 5 keys", partial(by_ranks, sizes=(5,))


def evaluated(job: tuple[str, torch.dtype, bool]) -> list[dict[str, Any]]:
    """The rows of a case in a dtype: in one call, or by the other routes."""
    case, dtype, others = job
    torch.set_num_threads(1)
    options = (CASES | LONG_CASES | SHAPES)[case]
    inputs = make_inputs(**options, dtype=dtype, device="cuda", requires_grad=True, seed=len(case))
    if inputs["query"].shape[1] <= PAIRS:
        right: dict[str, torch.Tensor] = by_oracle(inputs)
    else:
        right = evaluate(whole, in_double(inputs), backend="reference")
    here: list[tuple[str, Any, dict[str, torch.Tensor]]] = [("whole", whole, right)]
    if others:
        here = [(name, route, right) for name, route in routes_of(case, options)]
    elif "lengths" in options and not options.get("initial_state"):
        here.append(("without states", without_states, by_oracle(inputs, lambda found, x: (found[0], no_tokens(x)))))
    rows = []
    for name, route, right in here:
        row = {"part": str(dtype).removeprefix("torch."), "case": case, "route": name}
        worst: dict[str, Any] = {"forward": 0.0, "backward": 0.0}
        try:
            found = evaluate(route, inputs, backend="triton")
        except Exception as error:  # a row like any other, and out of its budget
            rows.append({**row, "error": f"{type(error).__name__}: {error}"[:200], "within": False})
            continue
        for what, value in right.items():
            direction = "backward" if what.startswith("gradient") else "forward"
            scale = right.terms.get(what, 0.0) if isinstance(right, Right) and dtype != torch.float32 else 0.0
            error = relative_error(found[what].cpu(), value.cpu(), scale=scale)
            if error > worst[direction]:
                worst |= {direction: error, f"worst {direction}": what}
            if scale > 0:
                worst[f"{what} by itself"] = relative_error(found[what].cpu(), value.cpu())
        within = all(worst[direction] <= BUDGETS[dtype][direction] for direction in ("forward", "backward"))
        rows.append({**row, **worst, "within": within})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--cases", nargs="*", default=None, help="of SHAPES and tests/helpers.py; else all")
    given = parser.parse_args()
    names = [name for name in (*SHAPES, *LONG_CASES, *CASES) if not name.endswith("-bucket")]  # the longest first
    names = [name for name in names if given.cases is None or name in given.cases]
    jobs = [(name, dtype, False) for dtype in DTYPES for name in names]
    jobs += [(name, DTYPES[0], True) for name in names if name not in SHAPES]
    machine = context()
    title = f"Triton backend on one {machine['gpu']}: errors against the float64 oracle"
    output = given.output or RESULTS / f"gpu-equivalence-{machine['gpu'].lower().replace(' ', '-')}.json"
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        for done, some in enumerate(pool.imap_unordered(evaluated, jobs, chunksize=1), 1):
            rows += some
            rows.sort(key=lambda row: (row["part"], row["case"], row["route"]))
            machine["cases"] = f"{done} of {len(jobs)}"
            output.write_text(json.dumps({"title": title, "context": machine, "rows": rows}, indent=1) + "\n")
    bad = [row for row in rows if not row["within"]]
    print(f"{len(rows)} rows, {len(bad)} out of their budget", *bad, sep="\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
