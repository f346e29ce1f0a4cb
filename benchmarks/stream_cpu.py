"""A layer's core over 75 million tokens on the CPU: ``python -m benchmarks.stream_cpu --out FILE``.

Options of ``race-attention stream`` go behind ``--``. With ``--result FILE`` its JSON output is taken from a file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.report import machine

DEFAULT = ("--tokens", "75M", "--segment", "8192", "--heads", "4", "--dim", "128", "--planes", "2", "--tables", "2")


def record(result: dict[str, Any], load: str | None) -> dict[str, Any]:
    """The result file: a table of one row, where it was measured, all that the command said."""
    seconds = sum(result["seconds"].values())
    row = {
        "tokens": result["shape"]["T"],
        "pass": result["pass"],
        "segment": result["segment"],
        "dtype": result["dtype"],
        "seconds": seconds,
        "CPU seconds": result.get("cpu_seconds"),
        "tokens per second": result["tokens_per_s"],
        "peak resident MiB": result["peak_memory_bytes"]["resident"] / 2**20,
    }
    context = machine() | {"threads": result["threads"], "backend": result["backend"]}
    context |= {} if load is None else {"load": load}
    return {"title": "One layer's core over a stream on the CPU", "context": context, "rows": [row], "result": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--result", type=Path, help="output of race-attention stream --json, measured before")
    parser.add_argument("--load", help="what else ran on the machine")
    parser.add_argument("options", nargs="*")
    given = parser.parse_args()
    if given.result is not None:
        result = json.loads(given.result.read_text())
    else:
        options = given.options or list(DEFAULT)
        command = [sys.executable, "-m", "race_attention.cli", "stream", "--device", "cpu", "--json", *options]
        # Threads that wait for the other one sleep: on a busy machine, spinning costs more than waking.
        environment = {"OMP_WAIT_POLICY": "PASSIVE"} | dict(os.environ)
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record(result, given.load), indent=2) + "\n")


if __name__ == "__main__":
    main()
