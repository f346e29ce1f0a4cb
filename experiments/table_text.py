"""Tables in Markdown, of the rows that :mod:`experiments.tables` reads."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.labels import change
from experiments.tables import Row


@dataclass(frozen=True)
class _Column:
    """A column: its head, and the cell of a row that has a result."""

    head: str
    cell: Callable[[Row], str]


def shown(value: float, metric: str) -> str:
    """Accuracy in percent, bits with four digits."""
    return f"{100 * value:.2f}" if metric == "accuracy" else f"{value:.4f}"


def score(row: Row) -> str:
    """Mean and standard deviation over seeds, or why there is none."""
    if row.missing is not None:
        return f"({row.missing})"
    if row.mean is None:
        return "failed, see below"
    return spread(row.scores, row.metric) + ("" if len(row.scores) > 1 else " (one seed)")


def spread(scores: Sequence[float], metric: str) -> str:
    """Mean and standard deviation; nothing where there is no score."""
    if not scores:
        return ""
    deviation = f" ± {shown(statistics.stdev(scores), metric)}" if len(scores) > 1 else ""
    return shown(statistics.fmean(scores), metric) + deviation


def markdown(rows: Sequence[Row], title: str, against: str | None = None) -> str:
    """A table, its failures below it, and what was searched.

    Args:
        rows: in their order.
        title: above it.
        against: the name of a row that the others are compared with, by the validation score where there is one.
    """
    run = [row for row in rows if row.missing is None]
    base = next((row for row in rows if row.name == against), None)
    columns = _columns(rows, run, base)
    heads = ["method", _unit(run[0]) if run else "score", *(column.head for column in columns)]
    lines = [f"**{title}**", "", "| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for row in sorted(rows, key=lambda row: row is not base):
        cells = [column.cell(row) if row.missing is None else "" for column in columns]
        lines.append("| " + " | ".join([_name(row, base), score(row), *cells]) + " |")
    devices = sorted({d for r in run for d in r.devices})
    lines += ["", "Mean and standard deviation over seeds, on " + ", ".join(devices) + "."] if run else []
    lines += [f"- {_name(row, base)}, {error}" for row in rows for error in row.errors]
    lines += _search(run)
    return "\n".join(lines) + "\n"


def _name(row: Row, base: Row | None) -> str:
    """What it is; or what is different from ``base``, where it is a variant of that."""
    if base is None or not base.model or row.model.get("mixer") != base.model.get("mixer"):
        return row.label or row.name
    return change(row.model, base.model) or f"the whole: {row.label}"


def _columns(rows: Sequence[Row], run: Sequence[Row], base: Row | None) -> list[_Column]:
    """Those that every table has, and of the others those that this one has something for."""
    columns = []
    if any(row.validation for row in rows):
        columns.append(_Column("validation", lambda row: spread(row.validation, row.metric)))
    if base is not None:
        columns.append(_Column("against the whole", lambda row: _difference(row, base)))
    if any(row.paper is not None for row in rows):
        columns.append(_Column("paper", lambda row: "" if row.paper is None else f"{row.paper:g}"))
    columns += [
        _Column("seeds", lambda row: str(len(row.scores))),
        _Column("parameters", lambda row: f"{row.parameters:,}"),
    ]
    steps, timed = len({row.steps for row in run}) > 1, any(row.milliseconds is not None for row in run)
    if steps:
        columns.append(_Column("steps", lambda row: f"{row.steps:,}"))
    if timed:
        columns.append(_Column("ms / step", lambda row: "" if row.milliseconds is None else f"{row.milliseconds:.1f}"))
    if steps and timed:  # what training takes without evaluation, nothing else on the device
        columns.append(_Column("s in all", _seconds))
    columns.append(_Column("memory, GB", lambda row: "" if row.memory_gb is None else f"{row.memory_gb:.2f}"))
    return columns


def _seconds(row: Row) -> str:
    return "" if row.milliseconds is None else f"{row.steps * row.milliseconds / 1e3:.1f}"


def _difference(row: Row, base: Row) -> str:
    """By how much a score is above another's, as the table's scores are: in points or percent."""
    mine, its = (statistics.fmean(one.validation or one.scores) if one.scores else None for one in (row, base))
    if row.name == base.name or mine is None or its is None:
        return ""
    return f"{100 * (mine - its):+.1f}" if row.metric == "accuracy" else f"{100 * (mine / its - 1):+.1f} %"


def _unit(row: Row) -> str:
    return f"{row.split} {row.metric}" + (", %" if row.metric == "accuracy" else " a byte")


def _search(run: Sequence[Row]) -> list[str]:
    """What was tried, folded away."""
    found = [row for row in run if row.chosen]
    if not found:
        return []
    lines = ["", "<details markdown><summary>Learning rates that were tried</summary>", ""]
    lines += [
        "Validation scores with seed 0, the best, which the table is of, in bold; with more seeds their mean.",
        "",
    ]
    lines += ["| row | |", "| --- | --- |", *(f"| `{row.name}` | {tried(row)} |" for row in found)]
    return [*lines, "", "</details>"]


def tried(row: Row) -> str:
    """Every setting with its score."""
    parts = []
    for setting, first, scores in row.tried:
        text = f"{setting} {'failed' if first is None else shown(first, row.metric)}"
        if len(scores) > 1:
            text += f" ({len(scores)} seeds: {shown(statistics.fmean(scores), row.metric)})"
        parts.append(f"**{text}**" if setting == row.chosen else text)
    return ", ".join(parts)
