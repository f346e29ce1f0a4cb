"""Cases nobody chose: random shapes, options, strides and extremes against the float64 oracle, by seed.

    python -m benchmarks.fuzz --backend cpu --cases 2000 --seed 0 --workers 2
    python -m benchmarks.fuzz --backend triton --device cuda --small --alike 20 --seconds 200 --workers 12 --output FILE
    python -m benchmarks.fuzz --backend triton --device cuda --small --alike 20 --buckets 256 --having causal decay
    python -m benchmarks.fuzz --backend triton --device cuda --long --alike 50 --buckets 64 --having causal decay
    TRITON_INTERPRET=1 python -m benchmarks.fuzz --backend triton --small --cases 200
    TRITON_INTERPRET=1 python -m benchmarks.fuzz --backend triton --small --rounding --cases 200
    python -m benchmarks.fuzz --backend cpu --only 1234          # one case again, and all its errors

A seed is a case, on every machine. Each is computed by a random route (one call, segments, ranks, sequences, padding)
and asked a random question; output, states and gradients have to be within the error budgets of DESIGN.md. What is not
is looked at once more: gradients may cancel to nothing, and then no arithmetic of that width can hold a part of them.
Where hashes are extreme (all saturated, or hardly any difference between tokens) gradients only have to be finite.
So the oracle is asked again with its soft buckets, outputs and gradients rounded as that width rounds them (on a GPU
float16 as bfloat16, which the kernels' soft buckets are in, for range); what
lies within ROUNDINGS times that far is counted apart, as ill-conditioned. Exit status 1 where anything else is left.
A case may be computed several times over, in other places of the memory: passes are recorded and done again.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.fuzz_cases import DTYPES, LONG_PAIRS, asked, drawn, elsewhere, has, inputs_of, route_of
from race_attention.testing import BUDGETS, leaves, relative_error
from tests import helpers, interpreter, rounded

SERVED = {
    "reference": tuple(DTYPES),
    "cpu": ("float64", "float32", "bfloat16"),
    "triton": ("float32", "bfloat16", "float16"),
}
ROUNDINGS = 12.0
#: What autocast casts, so that its gradient comes back through the narrower dtype.
AUTOCAST = ("gradient of query", "gradient of key", "gradient of value")
#: Pairs of tokens past which the reference backend in float64 is what is right.
PAIRS = 600_000


_UNTIL_THE_END = contextlib.ExitStack()


def started(rounding: bool = False, long: bool = False) -> None:
    """What a process sets up before its first case.

    With ``rounding`` the interpreter rounds 16 bits as a GPU does; ``long`` makes runs of tokens as long as those of
    calls of a million tokens.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    if interpreter.INTERPRETED:
        warnings.simplefilter("ignore", RuntimeWarning)
        interpreter.hurry()
    if long:
        _UNTIL_THE_END.enter_context(helpers.one_run())
    if rounding:
        from tests.bfloat16 import as_on_a_gpu

        _UNTIL_THE_END.enter_context(as_on_a_gpu())


def checked(
    seed: int, backend: str, device: str, dtypes: tuple[str, ...], small: bool, alike: int, buckets: int = 0,
    long: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The row of a seed: the largest error as a share of the budget, and what was out of it."""
    torch.manual_seed(seed)
    case = drawn(seed, dtypes, small, alike, buckets, long)
    row: dict[str, Any] = {"seed": seed, "dtype": case["dtype"], "result": "within", "worst": 0.0}
    try:
        inputs = inputs_of(case, device)
        route, dtype = route_of(case, inputs, backend), DTYPES[case["dtype"]]

        def ours(given: dict[str, Any]) -> Any:
            torch.set_num_threads(case["twists"]["threads"])
            with torch.autocast(device, dtype, enabled=case["twists"]["autocast"]):
                results = route(given)
            if results[0].dtype != dtype:
                raise AssertionError(f"output is {results[0].dtype}, not {dtype}")
            return asked(case, results, given)

        again = [elsewhere(inputs, offset) for offset in case["twists"]["again"]]
        founds = [helpers.evaluate(ours, given) for given in [inputs, *again]]
        found = founds[0]
        for name, leaf in leaves(inputs).items():
            if found[f"gradient of {name}"].dtype != leaf.dtype:
                raise AssertionError(f"gradient of {name} is {found[f'gradient of {name}'].dtype}, not {leaf.dtype}")
        oracle = partial(_right, case, inputs)
        right = oracle()
        kinds = {name: x.dtype for name, x in found.items() if name != "tokens"}

        def errors(of: dict[str, Tensor]) -> dict[str, float]:
            return {name: _share(name, of[name], right, dtype, kind) for name, kind in kinds.items()}

        shares = dict.fromkeys(kinds, 0.0)
        for one in founds:
            for name, share in errors(one).items():
                held = dtype if case["twists"]["autocast"] and name in AUTOCAST else one[name].dtype
                if case["twists"]["extreme"] and "gradient" in name and _finite(one[name], right[name], held):
                    continue  # saturated: what gradients are left of may be less than any number
                shares[name] = max(shares[name], share) if share == share else share
            if not torch.equal(one["tokens"].cpu(), right["tokens"]):
                raise AssertionError(f"tokens: {one['tokens']} and not {right['tokens']}")
        row["worst"] = max(shares.values())
        out = {name: share for name, share in shares.items() if not share <= 1}
        if out:
            moved, width = [], dtype
            if backend == "triton" and dtype == torch.float16 and _in_bfloat16(dtype):
                width = torch.bfloat16
            for turn in range(3):
                with rounded.arithmetic(width, turn):
                    moved.append(errors(oracle()))
            moved.append(_flow(found, right, dtype, kinds))
            far = {name: max(shares.get(name, 0.0) for shares in moved) for name in out}
            ill = all(share <= ROUNDINGS * far[name] for name, share in out.items())
            row |= {"result": "ill-conditioned" if ill else "out", "errors": out, "rounding": far}
    except Exception as error:
        refused = isinstance(error, ValueError) and str(error).startswith("backend:")
        row |= {"result": "refused" if refused else "error", "message": f"{type(error).__name__}: {error}"[:400]}
        if not refused:
            row["where"] = traceback.format_exc()[-1200:]
    if row["result"] not in ("within", "refused"):
        row["case"] = {**case["options"], **case["twists"]}
    return row


def _right(case: dict[str, Any], inputs: dict[str, Any]) -> helpers.Right:
    """What the oracle says, or of long sequences the reference in float64; of long cases where they are."""
    device = inputs["query"].device if case["long"] else "cpu"
    batch, queries, heads, _ = inputs["query"].shape
    pairs, (_, tables, planes, _) = queries * inputs["key"].shape[1], inputs["hyperplanes"].shape
    if pairs <= PAIRS or (case["long"] and pairs * batch * heads * tables * planes <= LONG_PAIRS):
        return helpers.by_oracle(inputs, lambda results, given: asked(case, results, given), device)

    def whole(given: dict[str, Any]) -> Any:
        return asked(case, helpers.whole(given, backend="reference"), given)

    results = helpers.evaluate(whole, helpers.in_double(inputs, device))
    return helpers.Right({name: x.cpu() for name, x in results.items()}, {})


def _share(name: str, found: Tensor, right: helpers.Right, dtype: torch.dtype, kind: torch.dtype) -> float:
    """The error as a share of DESIGN.md's budget, or of what the dtype of the result, ``kind``, can hold of it."""
    direction = "backward" if name.startswith("gradient") else "forward"
    limits = torch.finfo(kind)
    budget = max(BUDGETS[dtype][direction], limits.eps / 2)
    least = limits.smallest_normal * limits.eps * found.numel() ** 0.5 / budget
    scale = max(least, 1e-25 if dtype != torch.float64 else 0.0)  # products of weights pass through float32
    if dtype in (torch.bfloat16, torch.float16):
        scale = max(scale, right.terms.get(name, 0.0))
    return relative_error(found, right[name], scale=scale) / budget


def _finite(found: Tensor, right: Tensor, held: torch.dtype) -> bool:
    """Whether it is finite wherever the dtype it was ``held`` in has numbers as large as the right ones."""
    return bool((found.isfinite().cpu() | (right.abs() > 0.9 * torch.finfo(held).max)).all())


def _in_bfloat16(dtype: torch.dtype) -> bool:
    from race_attention.backends.triton import ops

    return ops.precision_of(dtype) == "bf16"


def _flow(found: dict[str, Tensor], right: helpers.Right, dtype: torch.dtype, kinds: Any) -> dict[str, float]:
    """What rounding leaves of the gradient of log_decay, which adds up and takes away terms of the outputs' size."""
    name = "gradient of log_decay"
    if name not in kinds:
        return {}
    terms = sum(right[result].norm().item() for result in ("out", "mass", "value_sum"))
    size = torch.tensor([right[name].norm().item(), 0.0])
    return {
        name: _share(name, size + 4 * rounded.KEPT[dtype] * terms, helpers.Right({name: size}, {}), dtype, kinds[name])
    }


def _seeds(first: int, cases: int, alike: int, workers: int, fits: Callable[[int], bool]) -> Iterator[int]:
    """Every seed of the groups whose seeds ``fits``, or of all.

    Processes are at work on different groups: kernels of one they would compile at the same time.
    """
    groups = (group for group in range(first // alike, -(-(first + cases) // alike)) if fits(group * alike))
    while together := list(itertools.islice(groups, workers)):
        for seed in (group * alike + turn for turn in range(alike) for group in together):
            if first <= seed < first + cases:
                yield seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=tuple(SERVED), default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=None)
    parser.add_argument("--small", action="store_true", help="shapes that an interpreter can do")
    parser.add_argument("--long", action="store_true", help="thousands of tokens in the longest runs, on a GPU")
    parser.add_argument("--rounding", action="store_true", help="the interpreter rounds 16 bits as a GPU does")
    parser.add_argument("--buckets", type=int, default=0, help="mostly nearly so many, in place of any number")
    parser.add_argument("--having", nargs="+", default=(), help="only groups of: packed, state, decay, mask, a dtype")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no case starts later")
    parser.add_argument("--only", type=int, nargs="+", default=None, help="these cases")
    parser.add_argument("--alike", type=int, default=1, help="cases that share compiled kernels")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None, help="of all rows that are not within, as JSON")
    given = parser.parse_args()
    if given.rounding and not interpreter.INTERPRETED:
        parser.error("--rounding is the interpreter's: TRITON_INTERPRET=1")
    how: dict[str, Any] = {"small": given.small, "alike": given.alike, "buckets": given.buckets, "long": given.long}
    how["dtypes"] = tuple(given.dtypes or SERVED[given.backend])
    one = partial(checked, backend=given.backend, device=given.device, **how)

    def fits(seed: int) -> bool:
        return not given.having or has(drawn(seed, **how), tuple(given.having))

    seeds = given.only or _seeds(given.seed, given.cases, given.alike, given.workers, fits)
    end, counts, rows = time.monotonic() + given.seconds, Counter[str](), []
    written = 0.0
    with multiprocessing.get_context("spawn").Pool(given.workers, started, (given.rounding, given.long)) as pool:
        for row in pool.imap_unordered(one, seeds):
            counts[f"{row['dtype']} {row['result']}"] += 1
            if row["result"] in ("out", "error", "ill-conditioned") or given.only:
                rows.append(row)
            if row["result"] in ("out", "error") or given.only:
                print(json.dumps(row), flush=True)
            if given.output and time.monotonic() > written + 2:
                written = time.monotonic()
                given.output.write_text(json.dumps({"counts": dict(counts), "rows": rows}, indent=1) + "\n")
            if time.monotonic() > end:
                pool.terminate()
                break
    summary = {"counts": dict(sorted(counts.items())), "rows": sorted(rows, key=lambda row: row["seed"])}
    if given.output:
        given.output.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary["counts"], indent=1))
    sys.exit(any(row["result"] in ("out", "error") for row in rows))


if __name__ == "__main__":
    main()
