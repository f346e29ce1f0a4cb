"""Accuracy of associative recall against the size of the state: ``python -m experiments.recall_plot out.svg``.

From the result files of a table of the task "mqar" alone. A line joins the RACE rows that differ in tables and planes
only; methods whose state has one size are level lines.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from experiments.config import ConfigError, check
from experiments.tables import Row, read_table

_RACE = re.compile(r"race-(\d+)x(\d+)(.*)")


def curves(rows: Sequence[Row]) -> tuple[dict[str, list[tuple[int, Row]]], list[Row]]:
    """RACE's rows by variant, each with S = L 2**P in rising order; and the other methods."""
    variants: dict[str, list[tuple[int, Row]]] = {}
    others = []
    for row in rows:
        if row.mean is None:
            continue
        match = _RACE.fullmatch(row.name)
        if match is None:
            others.append(row)
        else:
            planes, tables, variant = int(match[1]), int(match[2]), match[3].strip("-") or "bare"
            variants.setdefault(f"RACE, {variant}", []).append((tables * 2**planes, row))
    return {name: sorted(found, key=lambda one: one[0]) for name, found in variants.items()}, others


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws the curves."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "race"
    from matplotlib import pyplot

    variants, others = curves(rows)
    figure, axis = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    for name, found in variants.items():
        if len(found) == 1 and len(variants) > 1:
            continue  # a point is no curve; the table has it
        axis.plot([s for s, _ in found], [100 * (row.mean or 0.0) for _, row in found], marker="o", label=name)
    for index, row in enumerate(others):
        axis.axhline(
            100 * (row.mean or 0.0),
            linestyle=("--", ":", "-.")[index % 3],
            color=f"C{index + 5}",
            label=row.label or row.name,
        )
    axis.set(xlabel="S, buckets a head", ylabel="answers right, %", xscale="log", ylim=(0, 102))
    sizes = sorted({s for found in variants.values() for s, _ in found})
    axis.set_xticks(sizes, [str(s) for s in sizes], minor=False)
    axis.set_xticks([], minor=True)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.recall_plot", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--table", default="mqar")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"))
    given = parser.parse_args(arguments)
    try:
        rows = read_table(given.results / given.table)
        check(bool(curves(rows)[0]), "table", given.table, "one with rows race-PxL")
    except (ConfigError, json.JSONDecodeError) as error:
        parser.exit(2, f"error: {error}\n")
    plot(rows, given.out)


if __name__ == "__main__":
    main()
