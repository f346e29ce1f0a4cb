"""The plot of a table: score against time, for :mod:`experiments.tables`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments.tables import Row


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Score against the time of a step, measured alone where known, else of a run: a point a row."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "race"  # the same picture from the same results
    from matplotlib import pyplot

    timed = any(row.milliseconds is not None for row in rows)
    figure, axis = pyplot.subplots(figsize=(8, 5.5), constrained_layout=True)
    points = [row for row in rows if row.mean is not None and (row.milliseconds is not None or not timed)]
    scale = 100 if points and points[0].metric == "accuracy" else 1
    markers = itertools.cycle("osD^vP*X")
    for row in points:
        assert row.mean is not None
        x = row.milliseconds if row.milliseconds is not None else row.seconds
        spread = statistics.stdev(row.scores) * scale if len(row.scores) > 1 else 0.0
        name = row.label or row.name
        axis.errorbar(x, row.mean * scale, yerr=spread, fmt=next(markers), capsize=2, label=name)
    if points:
        axis.set(
            title=title,
            xlabel="ms a step, alone on the device" if timed else "seconds a run, on a shared device",
            ylabel=f"{points[0].split} accuracy, %" if scale == 100 else f"{points[0].split}, bits a byte",
        )
        figure.legend(loc="outside lower center", fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
