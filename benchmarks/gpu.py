"""Speed of the Triton backend on one GPU: the table of targets, lengths, peers, decode, memory.

    python -m benchmarks.gpu                                   # everything, into benchmarks/results/
    python -m benchmarks.gpu --only table decode --output /tmp/x.json
    python -m benchmarks.gpu --plot benchmarks/results/gpu-NAME.json

The floor is the time to copy the bytes that any implementation must read and write once (forward: q, k, v, out;
forward and backward: 11 such tensors) at the bandwidth of a large device copy measured in the same run. Times are
medians of CUDA events after warm-up, host time included; those marked ``graph`` are of a captured graph. Peers are
torch's scaled_dot_product_attention with its flash and cuDNN backends, flash-linear-attention where it is installed,
and the reference backend, which is plain torch. All bfloat16, B = 1, H = 4, D = Dv = 128 unless a row says otherwise.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts import PARTS, bandwidth, compiled, freed, jobs_of
from benchmarks.gpu_peers import DIM, HEADS
from benchmarks.gpu_plot import plot

RESULTS = Path(__file__).parent / "results"


def compile_all(only: list[str]) -> None:
    """In processes of their own: fills Triton's cache on disk."""
    jobs = jobs_of(only)
    if jobs:
        with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
            pool.map(compiled, jobs, chunksize=1)


def _said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def context(commit: str | None) -> dict[str, Any]:
    """The machine, the versions, the commit and the date."""
    import triton

    from race_attention.backends.triton.start import ptxas_version

    try:
        linear: str | None = importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:
        linear = None
    return {
        "gpu": torch.cuda.get_device_properties(0).name,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "ptxas": ptxas_version(),
        "flash_linear_attention": linear,
        "commit": commit or _said("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def floor_of(row: dict[str, Any], bytes_per_second: float) -> float | None:
    """Milliseconds to move what a row must move."""
    if "tokens" not in row:
        return None
    tensors = 11 if row.get("backward") else 4
    return tensors * row["tokens"] * row.get("heads", HEADS) * DIM * 2 / bytes_per_second * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--commit", default=None, help="where the checkout's own history is not at hand")
    parser.add_argument("--compile", choices=("first", "only", "no"), default="first", help="fill Triton's cache")
    parser.add_argument("--plot", type=Path, default=None)
    given = parser.parse_args()
    if given.plot:
        plot(given.plot)
        return
    torch.manual_seed(0)
    if given.compile != "no":
        compile_all(given.only)
    if given.compile == "only":
        return
    machine, speed = context(given.commit), bandwidth()
    freed()
    rows: list[dict[str, Any]] = []
    name = machine["gpu"].lower().replace(" ", "-")
    output = given.output or RESULTS / f"gpu-{name}-{machine['date'][:10]}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    title = f"Triton backend on one {machine['gpu']}: bfloat16, H = {HEADS}, D = Dv = {DIM}"

    def report(part: str, **row: Any) -> None:
        floor = floor_of(row, speed)
        if floor is not None:
            row["floor_ms"] = floor
            row["times_floor"] = row["ms"] / floor if row.get("ms") else None
        rows.append({"part": part, **row})
        print(part, row, flush=True)
        found = {"title": title, "context": machine, "copy_bytes_per_second": speed, "rows": rows}
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    for part in given.only:
        PARTS[part](report)


if __name__ == "__main__":
    main()
