"""Peak memory and time by length of context, from stream_gpu.json: ``python -m benchmarks.stream_plot FILE.json``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES = {
    "race": ("tab:blue", "o--", "RACE in one piece"),
    "race, checkpointed": ("tab:blue", "s:", "RACE, activation checkpointing"),
    "softmax": ("tab:red", "o--", "softmax in one piece"),
    "softmax, checkpointed": ("tab:red", "s:", "softmax, activation checkpointing"),
}


def plot(results: dict[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))

    def line(rows: list[dict[str, Any]], style: str, colour: str, label: str) -> None:
        lengths = [row["tokens"] for row in rows]
        memory = [row["peak_memory_bytes"].get("cuda_allocated", row["peak_memory_bytes"]["resident"]) for row in rows]
        left.plot(lengths, [m / 2**30 for m in memory], style, color=colour, label=label)
        right.plot(lengths, [row["seconds"] for row in rows], style, color=colour, label=label)

    rows = results.get("by_segments", [])
    if rows:
        line(rows, "o-", "tab:green", f"RACE by segments of {rows[0]['segment']}")
    for name, (colour, style, label) in STYLES.items():
        found = results.get(f"in one piece: {name}")
        if found:
            line(found["rows"], style, colour, f"{label} (ended by {found['ended_by']})")
    for axes, what in ((left, "peak GPU memory, GiB"), (right, "seconds a step")):
        axes.set(xscale="log", yscale="log", xlabel="tokens of one context", ylabel=what)
        axes.grid(True, which="both", alpha=0.2)
    left.legend(fontsize=7)
    where = results["context"]
    millions = results["parameters"]["race"] / 1e6
    figure.suptitle(
        f"One optimiser step, {millions:.0f}M parameters, {where.get('gpu') or where.get('cpu')}", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, help="where to; beside the file if not given")
    given = parser.parse_args()
    plot(json.loads(given.file.read_text()), given.output or given.file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
