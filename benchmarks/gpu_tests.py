"""The kernels' tests on a GPU, into a result file: how many passed, and each that did not, with its reason.

    python -m benchmarks.gpu_tests [--workers 14] [--seconds 600] [--output FILE] [tests/test_triton_wide.py ...]

What has not ended after --seconds is ended, and the file says how many tests there were to run. Exit status 1 where one
failed or did not run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import RESULTS, context

ROOT = Path(__file__).parent.parent
NAMES = ("test_triton*.py", "test_streaming_gpu.py", "test_nonfinite.py")
_OUTCOME = re.compile(r"(?:\[gw\d+\] \[[ \d]+%\] )?(PASSED|FAILED|SKIPPED|ERROR) (tests/\S+::\S.*?)(?: - .*)?")
_SUMMARY = re.compile(r"(?:FAILED|ERROR) (tests/\S+::\S.*?) - (.*)")


def run(tests: list[str], workers: int, seconds: float, log: Path) -> list[str]:
    """The lines that pytest prints, also written to ``log`` as they come."""
    command = [sys.executable, "-m", "pytest", "-v", "-n", str(workers), "-p", "no:cacheprovider", "--tb=short", "-rfE"]
    end, lines = time.monotonic() + seconds, []
    wide = os.environ | {"COLUMNS": "300"}  # or the reasons are cut off
    with (
        log.open("w", encoding="utf-8") as written,
        subprocess.Popen([*command, *tests], cwd=ROOT, env=wide, stdout=subprocess.PIPE, text=True) as running,
    ):
        assert running.stdout is not None
        for line in running.stdout:
            lines.append(line.strip())
            written.write(line)
            written.flush()
            if time.monotonic() > end:
                running.kill()
    return lines


def summarised(lines: list[str]) -> dict[str, Any]:
    """The counts of the outcomes, and a row for each test that failed."""
    outcomes = {match[2].strip(): match[1].lower() for line in lines if (match := _OUTCOME.fullmatch(line))}
    why = {match[1]: match[2] for line in lines if (match := _SUMMARY.fullmatch(line))}
    collected = next((int(match[1]) for line in lines if (match := re.search(r"(\d+) (?:items|tests)", line))), None)
    bad = sorted(name for name, outcome in outcomes.items() if outcome in ("failed", "error"))
    return {
        "tests": dict(Counter(outcomes.values())) | {"to run": collected},
        "rows": [{"part": "did not pass", "test": name, "why": why.get(name, "")[:300]} for name in bad],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=None)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    machine = context()
    tests = given.tests or sorted(str(path) for name in NAMES for path in (ROOT / "tests").glob(name))
    output = given.output or RESULTS / f"gpu-tests-{machine['gpu'].lower().replace(' ', '-')}.json"
    found = summarised(run(tests, given.workers, given.seconds, output.with_suffix(".log")))
    machine |= found.pop("tests")
    title = f"The kernels' tests on {torch.cuda.device_count()} {machine['gpu']}"
    output.write_text(json.dumps({"title": title, "context": machine, **found}, indent=1) + "\n", encoding="utf-8")
    print({name: machine.get(name) for name in ("passed", "failed", "error", "skipped", "to run")})
    sys.exit(bool(found["rows"]) or machine.get("passed", 0) + machine.get("skipped", 0) != machine["to run"])


if __name__ == "__main__":
    main()
