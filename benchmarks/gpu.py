"""Speed of the Triton backend on one GPU: the table of targets, lengths, peers, decode, memory.

    python -m benchmarks.gpu                                   # everything, into benchmarks/results/
    python -m benchmarks.gpu --only table decode --seconds 60 --output /tmp/x.json
    python -m benchmarks.gpu --plot benchmarks/results/gpu-NAME.json
    python -m benchmarks.gpu --merge /tmp/x.json /tmp/y.json --output benchmarks/results/gpu-NAME.json

The parts may run on several GPUs of one machine at once, each with a file of its own, which --merge makes one of; what
is compared is in one part, so on one GPU.

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
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_measure
from benchmarks.gpu_measure import bandwidth, freed
from benchmarks.gpu_parts import PARTS, compiled, cores, jobs_of
from benchmarks.gpu_peers import DIM, HEADS
from benchmarks.gpu_plot import plot
from experiments.report import commit

RESULTS = Path(__file__).parent / "results"


def compile_all(only: list[str]) -> None:
    """In processes of their own: fills Triton's cache on disk."""
    jobs = jobs_of(only)
    if jobs:
        with multiprocessing.get_context("spawn").Pool(min(len(jobs), cores())) as pool:
            pool.map(compiled, jobs, chunksize=1)


def _said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def context() -> dict[str, Any]:
    """The machine, the versions, the commit and the date."""
    import triton

    from race_attention.backends.triton import describe

    try:
        linear: str | None = importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:
        linear = None
    return {
        "gpu": torch.cuda.get_device_properties(0).name,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "ptxas": describe()["ptxas"],
        "kernels_of_a_pass": describe()["kernels of a pass"],
        "flash_linear_attention": linear,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def floor_of(row: dict[str, Any], bytes_per_second: float) -> float | None:
    """Milliseconds to move what a row must move."""
    if "tokens" not in row:
        return None
    tensors = 11 if row.get("backward") else 4
    return tensors * row["tokens"] * row.get("heads", HEADS) * DIM * 2 / bytes_per_second * 1e3


class ResultFile:
    """The result file: written anew with every row, so that whatever ends a run loses none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {"rows": []}
        if path.is_file():
            self.found = json.loads(path.read_text(encoding="utf-8"))

    def write(self, **what: Any) -> None:
        self.found |= what
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def report(self, part: str, **row: Any) -> None:
        floor = floor_of(row, self.found["copy_bytes_per_second"])
        if floor is not None:
            row["floor_ms"] = floor
            row["times_floor"] = row["ms"] / floor if row.get("ms") else None
        self.found["rows"].append({"part": part, **row})
        self.write()
        print(part, row, flush=True)


def run_parts(names: list[str], output: Path, seconds: float) -> None:
    """Measures parts in this process, and notes in the file which are done."""
    gpu_measure.deadline = time.monotonic() + seconds
    torch.manual_seed(0)
    results = ResultFile(output)
    if "context" not in results.found:
        machine = context()
        title = f"Triton backend on one {machine['gpu']}: bfloat16, H = {HEADS}, D = Dv = {DIM}"
        results.write(title=title, context=machine, copy_bytes_per_second=bandwidth())
        freed()
    for name in names:
        results.write(begun=name)
        PARTS[name](results.report)
    results.write(begun=None)


def run_surely(names: list[str], output: Path, seconds: float) -> None:
    """Parts in a process of their own; where one leaves the device unusable, the ones after it in another."""
    end = time.monotonic() + seconds
    output.unlink(missing_ok=True)
    while names and time.monotonic() < end:
        left = str(end - time.monotonic())
        command = [sys.executable, "-m", "benchmarks.gpu", "--here", "--seconds", left, "--output", str(output)]
        status = subprocess.run([*command, "--only", *names], check=False).returncode
        results = ResultFile(output)
        failed = results.found.pop("begun", None)
        if failed is None:  # all done; or nothing begun, which another process would not mend
            results.write()
            return
        results.write(rows=[*results.found["rows"], {"part": failed, "error": f"ended with status {status}"}])
        names = names[names.index(failed) + 1 :]


#: Fields of a row that say what was found, and not what was measured.
FOUND = frozenset(
    (
        "ms",
        "quartiles_ms",
        "ahead",
        "host_us",
        "least_us",
        "peak_gib",
        "floor_ms",
        "times_floor",
        "error",
        "equal",
        "commit",
    )
)


def merged_rows(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all files what was measured, each once: as the first file has it that does. Rows of another commit say so.

    A row that says so already keeps what it says.
    """
    rows: dict[Any, dict[str, Any]] = {}
    for one in found:
        commit = one["context"]["commit"]
        other = {} if commit == found[0]["context"]["commit"] else {"commit": str(commit)[:9]}
        for row in one["rows"]:
            rows.setdefault(tuple(sorted((k, str(v)) for k, v in row.items() if k not in FOUND)), other | row)
    return list(rows.values())


def merge(paths: list[Path], output: Path) -> None:
    """One result file of several, of other parts on GPUs of one kind; each row keeps the floor of its own GPU.

    Files of an older commit come last: of them only what the others have not measured is kept.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    machine = found[0]["context"]
    for name in ("gpu", "driver", "torch", "triton"):
        if len({str(one["context"][name]) for one in found}) > 1:
            raise SystemExit(f"{name} differs: " + ", ".join(str(one["context"][name]) for one in found))
    linear = [one["context"]["flash_linear_attention"] for one in found]
    machine["flash_linear_attention"] = next(filter(None, linear), None)
    copies = {path.stem: one["copy_bytes_per_second"] for path, one in zip(paths, found, strict=True)}
    merged = {
        "title": found[0]["title"],
        "context": machine,
        "copy_bytes_per_second": found[0]["copy_bytes_per_second"],
        "copy_bytes_per_second_of_files": copies,
        "rows": merged_rows(found),
    }
    output.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--compile", choices=("first", "only", "no"), default="first", help="fill Triton's cache")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so long")
    parser.add_argument("--here", action="store_true", help="in this process, adding to the file")
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--merge", type=Path, nargs="+", default=None, help="files of parts, into --output")
    given = parser.parse_args()
    if given.plot:
        plot(given.plot)
        return
    if given.merge:
        if given.output is None:
            parser.error("--merge needs --output")
        merge(given.merge, given.output)
        return
    if not torch.cuda.is_available():
        parser.exit(2, f"error: torch {torch.__version__} sees no GPU here; --plot and --merge need none\n")
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    output = given.output or RESULTS / f"gpu-{name}-{today}.json"
    if given.here:
        run_parts(given.only, output, given.seconds)
        return
    if given.compile != "no":
        compile_all(given.only)
    if given.compile != "only":
        run_surely(given.only, output, given.seconds)


if __name__ == "__main__":
    main()
