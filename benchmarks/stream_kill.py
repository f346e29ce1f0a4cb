"""A stream killed by SIGKILL at random moments and started again: ``python -m benchmarks.stream_kill --out FILE``."""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.report import machine


def command(options: list[str], journal: Path | None) -> list[str]:
    made = [sys.executable, "-m", "race_attention.cli", "stream", *options, "--json", "--no-progress"]
    return made + ([] if journal is None else ["--journal", str(journal), "--journal-every", "1"])


def entries(journal: Path) -> dict[str, int]:
    """Every journal below the folder and when it was written."""
    return {str(path.relative_to(journal)): path.stat().st_mtime_ns for path in journal.rglob("journal.safetensors")}


def run_killed(options: list[str], kills: int, seconds: float, seed: int) -> dict[str, Any]:
    """Runs to the end with so many kills, each up to ``seconds`` after the first new entry of the journal."""
    moments, log = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder)
        for _ in range(kills):
            before = entries(journal)
            with subprocess.Popen(command(options, journal), stdout=subprocess.PIPE) as process:
                while entries(journal) == before and process.poll() is None:
                    time.sleep(0.005)
                time.sleep(moments.uniform(0, seconds))
                process.send_signal(signal.SIGKILL)
            if process.returncode != -signal.SIGKILL:
                raise SystemExit("the run was over before it could be killed; give it more --tokens")
            log.append(sorted(entries(journal)))
        whole = subprocess.run(command(options, journal), check=True, capture_output=True, text=True)
    return {"killed_with_journals": log, "result": json.loads(whole.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0, help="at most, between a new entry and the kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", help="of race-attention stream, after --")
    given = parser.parse_args()
    whole = subprocess.run(command(given.options, None), check=True, capture_output=True, text=True)
    expected = json.loads(whole.stdout)
    killed = run_killed(given.options, given.kills, given.seconds, given.seed)
    same = killed["result"]["checksums"] == expected["checksums"]
    row = {"tokens": expected["shape"]["T"], "segment": expected["segment"], "kills": given.kills, "identical": same}
    record = {
        "title": "Killed by SIGKILL at random moments, resumed: the same checksums, bit for bit",
        "context": machine() | {"backend": expected["backend"]},
        "rows": [row],
        "uninterrupted": expected,
    } | killed
    given.out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{given.kills} kills; checksums {'identical' if same else 'DIFFER'}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
