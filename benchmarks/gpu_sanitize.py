"""Every GPU kernel under compute-sanitizer, once a dtype and option, on shapes of a few blocks.

    python -m benchmarks.gpu_sanitize [--tools memcheck racecheck synccheck initcheck] [--workers 14] [--seconds 170]
    python -m benchmarks.gpu_sanitize --rest-of FILE     # what FILE does not have clean; its clean rows are taken over

Writes a result file: of each tool and case how it ended, the tool's summary and reports, at which commit, and the
kernels that ran.
initcheck knows nothing of memory that torch's caching allocator gives out again, so that allocator is off there, and
each dtype has a process of its own. Nor does it follow tensor descriptors: what is stored by one it calls never
written, and the exchange that puts one into its 128 bytes, whose old value nobody takes, a read. So kernels take rows
by pointers there, as on GPUs without descriptors.
Exit status 1 where something was reported, or did not end. Kernels are compiled before, without a tool.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from experiments.report import commit

TOOLS = ("racecheck", "memcheck", "synccheck", "initcheck")  # the slowest first
#: Looking up where on the host a kernel was started takes most of the time of a case with many reports.
BRIEF = ("--show-backtrace", "no", "--print-limit", "20")
#: Calls of a case. The first two run the host code; the fifth is forward and backward a recording's replay.
REPEATS = {"memcheck": 5}
DTYPES = ("bfloat16", "float16", "float32")
UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"
#: Cases that take minutes under racecheck: a process a dtype, before all else.
SLOW = ("causal-wide-256", "causal-wide-options", "causal-wide", "causal-wide-columns")
_HEAD: dict[str, Any] = {"dim": 32, "heads": 2, "scale": 0.2}
_GROUPED: dict[str, Any] = {**_HEAD, "heads": 4, "kv_heads": 2}
#: Past 128 columns all kernels are cut otherwise.
_LARGE: dict[str, Any] = {"dim": 200, "value_dim": 144, "heads": 1, "scale": 0.07}
#: Options of testing.make_inputs; ``planes_learn`` False leaves the hyperplanes out of the gradients, ``states`` False
#: does not ask for states, which has another plan where sequences are packed; ``one_run`` has runs as long as calls of
#: a million tokens have. In their order, after SLOW.
CASES: dict[str, dict[str, Any]] = {
    "causal-long-run": {
        "causal": True, "batch": 1, "tokens": 300, **_GROUPED, "decay": "token", "initial_state": True, "one_run": True,
    },
    "causal-64-long-run": {
        "causal": True, "batch": 1, "tokens": 300, **_HEAD, "planes": 4, "tables": 4, "decay": "head", "one_run": True,
    },
    "causal-joined-long-run": {
        "causal": True, "lengths": (70, 0, 1, 3, 200), **_HEAD, "decay": "token", "states": False, "one_run": True,
    },
    "causal-joined": {
        "causal": True, "lengths": (70, 0, 1, 3, 64, 130), **_HEAD, "decay": "token", "masked": 0.2, "states": False,
    },
    "causal-64-joined": {
        "causal": True, "lengths": (70, 0, 1, 3, 64, 130), **_HEAD, "planes": 4, "tables": 4, "planes_learn": False,
        "states": False,
    },
    "causal-64-joined-decay": {
        "causal": True, "lengths": (70, 0, 1, 3, 200), **_HEAD, "planes": 4, "tables": 4, "decay": "token",
        "states": False, "one_run": True,
    },
    "causal-64-joined-options": {
        "causal": True, "lengths": (70, 0, 1, 3, 64, 130), **_GROUPED, "planes": 4, "tables": 4, "decay": "token",
        "masked": 0.2, "states": False,
    },
    "causal-128-joined": {
        "causal": True, "lengths": (70, 0, 1, 3, 64, 130), "dim": 128, "heads": 2, "scale": 0.1, "planes": 3,
        "tables": 3, "decay": "head", "states": False,
    },
    "full-short": {
        "lengths": (30, 0, 1, 70), "key_lengths": (20, 2, 0, 90), **_GROUPED, "planes": 4, "tables": 4, "masked": 0.2,
        "states": False,
    },
    "full-short-and-long": {
        "lengths": (30, 0, 1030, 9, 1, 2, 5, 3), "key_lengths": (20, 2, 70, 1, 4, 0, 3, 3), **_HEAD, "planes": 4,
        "tables": 4, "masked": 0.2, "states": False,
    },
    "full-very-short": {"lengths": (9, 0, 1, 14, 16, 2), **_HEAD, "planes_learn": False, "states": False},
    "causal-64-128": {
        "causal": True, "batch": 1, "tokens": 200, "dim": 128, "heads": 2, "scale": 0.1, "planes": 4, "tables": 4,
        "planes_learn": False,
    },
    "causal-64-128-decay": {
        "causal": True, "batch": 1, "tokens": 200, "dim": 128, "heads": 2, "scale": 0.1, "planes": 4, "tables": 4,
        "decay": "token",
    },
    "full-128": {
        "batch": 1, "tokens": 200, "keys": 150, "dim": 128, "heads": 2, "scale": 0.1, "planes": 4, "tables": 4,
    },
    "causal-wide": {
        "causal": True, "batch": 1, "tokens": 270, **_HEAD, "planes": 6, "tables": 2, "planes_learn": False,
    },
    "causal-wide-options": {
        "causal": True, "lengths": (130, 0, 1, 140), **_GROUPED, "planes": 5, "tables": 5, "decay": "token",
        "masked": 0.2, "initial_state": True,
    },
    "causal-wide-columns": {  # several column tiles, 64 of float32 and 128 of 16 bits
        "causal": True, "batch": 1, "tokens": 150, **_HEAD, "heads": 1, "value_dim": 140, "planes": 3, "tables": 9,
        "decay": "token",
    },
    "causal-wide-256": {
        "causal": True, "batch": 1, "tokens": 270, "dim": 32, "heads": 1, "scale": 0.2, "planes": 8, "tables": 1,
        "decay": "token",
    },
    "causal": {"causal": True, "batch": 2, "tokens": 300, **_HEAD, "planes_learn": False},
    "causal-options": {
        "causal": True, "batch": 1, "tokens": 300, **_GROUPED, "planes": 3, "tables": 3, "decay": "token",
        "masked": 0.2, "initial_state": True,
    },
    "causal-64": {"causal": True, "batch": 1, "tokens": 300, **_HEAD, "planes": 4, "tables": 4, "decay": "head"},
    "causal-64-plain": {"causal": True, "batch": 1, "tokens": 300, **_HEAD, "planes": 4, "tables": 4},
    "causal-packed": {"causal": True, "lengths": (150, 0, 1, 140), **_HEAD, "decay": "token", "masked": 0.2},
    "causal-odd": {"causal": True, "batch": 1, "tokens": 150, "dim": 20, "value_dim": 12, "heads": 1, "scale": 0.2},
    "causal-128": {"causal": True, "batch": 1, "tokens": 270, "dim": 128, "heads": 2, "scale": 0.1, "decay": "token"},
    "full": {"batch": 2, "tokens": 200, "keys": 150, **_HEAD, "planes_learn": False},
    "full-options": {
        "lengths": (100, 0, 1, 90), "key_lengths": (80, 2, 0, 110), **_GROUPED, "planes": 4, "tables": 4, "masked": 0.2,
        "initial_state": True,
    },
    "full-wide": {"batch": 1, "tokens": 200, "keys": 150, **_GROUPED, "planes": 6, "tables": 2, "masked": 0.2},
    "causal-large-heads": {
        "causal": True, "batch": 1, "tokens": 140, **_LARGE, "planes": 3, "tables": 3, "decay": "token",
    },
    "full-large-heads": {"batch": 1, "tokens": 100, "keys": 70, **_LARGE, "planes": 4, "tables": 4},
    "causal-wide-large-heads": {
        "causal": True, "batch": 1, "tokens": 70, **_LARGE, "planes": 6, "tables": 2, "decay": "token",
    },
    "causal-tables-large-heads": {
        "causal": True, "batch": 1, "tokens": 70, **_LARGE, "planes": 3, "tables": 9, "decay": "head",
    },
    "full-wide-large-heads": {"batch": 1, "tokens": 70, "keys": 50, **_LARGE, "planes": 3, "tables": 9},
}  # fmt: skip


def run_case(name: str, dtype: torch.dtype, repeats: int) -> None:
    """Forward and backward."""
    forward_and_backward(CASES[name], dtype, "cuda", repeats)
    torch.cuda.synchronize()


def forward_and_backward(given: dict[str, Any], dtype: torch.dtype, device: str, repeats: int) -> dict[str, Any]:
    """A case by its options; the results of the last of its calls."""
    from benchmarks.gpu_equivalence import without_states
    from race_attention.testing import make_inputs
    from tests.helpers import evaluate, one_run, whole

    options = dict(given)
    if options.pop("one_run", False):
        with one_run():
            return forward_and_backward(options, dtype, device, repeats)
    learn, route = options.pop("planes_learn", True), whole if options.pop("states", True) else without_states
    inputs = make_inputs(**options, dtype=dtype, device=device, requires_grad=True, seed=1)
    inputs["hyperplanes"].requires_grad_(learn)
    results: dict[str, Any] = {}
    for _ in range(repeats):
        results = evaluate(route, inputs, backend="triton")
    return results


def run_decode(dtype: torch.dtype, device: str = "cuda") -> None:
    """A token in place, and into a new state."""
    from race_attention.backends.triton.decode import decode, decode_

    for planes, tables in ((2, 2), (4, 4), (6, 2)):
        query, key, value = (torch.randn(2, heads, 32, device=device).to(dtype) for heads in (4, 2, 2))
        hyperplanes = torch.randn(2, tables, planes, 32, device=device)
        beta, decay = torch.full((2,), 4.0, device=device), torch.full((2, 2), -0.1, device=device)
        for wide in (torch.float32, torch.float64):
            mass = torch.ones(2, 2, tables, 1 << planes, dtype=wide, device=device)
            value_sum = torch.zeros(*mass.shape, 32, dtype=wide, device=device)
            for of_decay in (None, decay):
                decode(query, key, value, hyperplanes, beta, of_decay, mass, value_sum)
                decode_(query, key, value, hyperplanes, beta, of_decay, mass, value_sum)


def here(name: str, dtypes: tuple[str, ...], repeats: int) -> None:
    """Runs one case in this process and prints the kernels that it started, and which took rows by descriptors."""
    from race_attention.backends.triton import launch, launch_causal_gradients, start

    seen: set[str] = set()
    begin = start._start

    def noted(key: Any, kernel: Any, *rest: Any) -> None:
        described = " by descriptors" if rest[-1].get("DESCRIBED") else ""
        seen.add(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}{described}")
        begin(key, kernel, *rest)

    start._start = noted
    if os.environ.get(UNCACHED):
        for module in (launch, launch_causal_gradients):
            module.describes = lambda device: False
    for dtype in dtypes:
        if name == "decode":
            run_decode(getattr(torch, dtype))
            torch.cuda.synchronize()
        else:
            run_case(name, getattr(torch, dtype), repeats)
    print("kernels:", ", ".join(sorted(seen)), flush=True)


def sanitized(tool: str | None, name: str, dtypes: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """One case in a process of its own, under a tool."""
    command = [sys.executable, "-m", "benchmarks.gpu_sanitize", "--here", name, "--dtypes", *dtypes]
    command += ["--repeats", str(REPEATS.get(tool or "", 1))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    row: dict[str, Any] = {"part": tool or "no tool", "case": name, "commit": (commit() or "")[:9]}
    if dtypes != DTYPES:
        row["dtypes"] = list(dtypes)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        if tool is not None:
            command = ["compute-sanitizer", "--tool", tool, "--log-file", str(log), *BRIEF, *command]
            if tool == "initcheck":
                environment[UNCACHED] = "1"
        begin = time.monotonic()
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=max(1.0, seconds), check=False
            )
            row["status"] = done.returncode
            ran = re.search(r"kernels: (.*)", done.stdout)
            row["kernels"] = ran.group(1).split(", ") if ran else []
            if done.returncode:
                row["error"] = done.stderr[-600:]
        except subprocess.TimeoutExpired:
            row["status"] = "its time was up"
        row["seconds"] = round(time.monotonic() - begin, 1)
        text = log.read_text(errors="replace") if log.exists() else ""
        lines = [line.removeprefix("=========").strip() for line in text.splitlines()]
        row["summary"] = ", ".join(line for line in lines if "SUMMARY" in line)
        reports = [line for line in lines if line and "SUMMARY" not in line and line != "COMPUTE-SANITIZER"][:60]
        row |= {"reports": reports} if reports else {}
    return row


def twice(tool: str | None, name: str, dtypes: tuple[str, ...], end: float) -> dict[str, Any]:
    """:func:`sanitized`, and once more where the process did its work and died while it shut down.

    So it does about once in twenty times with torch's allocator off, in whichever case, and never without a tool.
    """
    row = sanitized(tool, name, dtypes, end - time.monotonic())
    if row["status"] in (0, 1, "its time was up") or not row["kernels"]:
        return row
    return sanitized(tool, name, dtypes, end - time.monotonic()) | {"died in the end": row["error"][-200:]}


def clean(row: dict[str, Any]) -> bool:
    """Whether a case ended and nothing was reported."""
    quiet = re.search(r"SUMMARY: 0 (errors|hazards)", row["summary"])
    return row["status"] == 0 and (row["part"] == "no tool" or quiet is not None)


Job = tuple[str | None, str, tuple[str, ...]]


def jobs_of(tools: list[str], cases: list[str], dtypes: tuple[str, ...]) -> list[Job]:
    """Tool, case and dtypes of each process; the slowest first."""
    apart = [name for name in SLOW if name in cases and "racecheck" in tools]
    jobs: list[Job] = [("racecheck", name, (dtype,)) for name in apart for dtype in reversed(dtypes)]
    for tool in tools:
        for name in cases:
            if tool == "initcheck":
                jobs += [(tool, name, (dtype,)) for dtype in dtypes]
            elif tool != "racecheck" or name not in apart:
                jobs.append((tool, name, dtypes))
    return jobs


def key_of(tool: str | None, case: str, dtypes: tuple[str, ...]) -> tuple[str | None, str, tuple[str, ...]]:
    return tool, case, tuple(sorted(dtypes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--cases", nargs="*", choices=(*CASES, "decode"), default=[*CASES, "decode"])
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=170.0, help="of the whole; what runs then is ended")
    parser.add_argument("--rest-of", type=Path, default=None, help="a result file")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--here", default=None, help="one case in this process")
    parser.add_argument("--repeats", type=int, default=1, help="calls of that case")
    given = parser.parse_args()
    if given.here:
        here(given.here, tuple(given.dtypes), given.repeats)
        return
    from benchmarks.gpu import RESULTS, context

    machine = context()
    output = given.output or RESULTS / f"gpu-sanitize-{machine['gpu'].lower().replace(' ', '-')}.json"
    title = f"Triton backend on one {machine['gpu']} under compute-sanitizer"
    end, rows = time.monotonic() + given.seconds, []
    kernels: set[str] = set()
    if given.rest_of:
        before = json.loads(given.rest_of.read_text(encoding="utf-8"))
        of_before = {"commit": (before["context"]["commit"] or "")[:9]}
        rows = [of_before | row for row in before["rows"] if row["clean"] and row["part"] != "no tool"]
        kernels.update(before["kernels"])
    done = {key_of(row["part"], row["case"], tuple(row.get("dtypes", DTYPES))) for row in rows}
    with ThreadPoolExecutor(given.workers) as pool:

        def noted(job: Job) -> dict[str, Any]:
            row = twice(*job, end)
            row["clean"] = clean(row)
            kernels.update(row.pop("kernels", ()))
            rows.append(row)
            rows.sort(key=lambda row: (row["part"], row["case"]))
            output.write_text(
                json.dumps({"title": title, "context": machine, "kernels": sorted(kernels), "rows": rows}, indent=1)
                + "\n"
            )
            print(*job[:2], *row.get("dtypes", ()), row["status"], f"{row['seconds']} s", row["summary"], flush=True)
            return row

        dtypes = tuple(given.dtypes)
        jobs = [job for job in jobs_of(given.tools, given.cases, dtypes) if key_of(*job) not in done]
        list(pool.map(noted, [(None, name, dtypes) for name in given.cases if name in {job[1] for job in jobs}]))
        found = list(pool.map(noted, jobs))
    sys.exit(not all(row["clean"] for row in found))


if __name__ == "__main__":
    main()
