"""Plots of a GPU result file: time against length with the floor, and the fraction of the copy's bandwidth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def plot(path: Path) -> Path:
    """Draws the plots beside the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = json.loads(path.read_text(encoding="utf-8"))
    found["rows"] = [row for row in found["rows"] if row.get("ms") is not None]  # without what failed
    figure, axes = plt.subplots(1, 3, figsize=(18, 5))
    for axis, heads in zip(axes, (4, 64), strict=False):
        _lengths(axis, [row for row in found["rows"] if row["part"] == "lengths" and row["heads"] == heads])
        axis.set(title=f"forward and backward, causal, B·H = {heads}", xlabel="tokens", ylabel="ms")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    _bandwidth(axes[2], [row for row in found["rows"] if row["part"] in ("table", "wide")])
    machine = found["context"]
    figure.suptitle(f"{machine['gpu']}, bfloat16, D = 128, torch {machine['torch']}, {machine['date'][:10]}")
    figure.tight_layout()
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    return target


#: The same in both plots, whatever is measured.
COLOURS = {
    "RACE (2,2)": "C0", "RACE (3,3)": "C1", "RACE (4,4)": "C2", "plain torch (2,2)": "C4", "flash": "C7", "cudnn": "C3",
}  # fmt: skip


def _lengths(axis: Any, rows: list[dict[str, Any]]) -> None:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if not (row["causal"] and row["backward"]):
            continue
        name = row.get("peer") or f"RACE ({row['P']},{row['L']})"
        series.setdefault(name + (", graph" if row.get("graph") else ""), []).append((row["tokens"], row["ms"]))
        if name == "RACE (2,2)" and not row.get("graph"):
            series.setdefault("floor", []).append((row["tokens"], row["floor_ms"]))
    for name, points in series.items():
        style = "k--" if name == "floor" else "o:" if name.endswith("graph") else "o-"
        colour = {} if name == "floor" else {"color": COLOURS[name.removesuffix(", graph")]}
        axis.loglog(*zip(*sorted(points), strict=True), style, label=name, markersize=3, **colour)


def _bandwidth(axis: Any, rows: list[dict[str, Any]]) -> None:
    for causal in (True, False):
        for backward in (False, True):
            points = sorted(
                (row["L"] << row["P"], row["floor_ms"] / row["ms"])
                for row in rows
                if "peer" not in row and not row.get("decay") and (row["causal"], row["backward"]) == (causal, backward)
            )
            if points:
                label = ("causal" if causal else "full") + (", forward and backward" if backward else ", forward")
                axis.semilogx(*zip(*points, strict=True), "o-", base=2, label=label)
    axis.set(title="fraction of the copy's bandwidth, 1M tokens", xlabel="buckets S", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
