"""Renders tables and a plot from result files alone: ``python -m experiments.tables fashion_mnist [--plot out.png]``.

A cell is the mean over seeds, with their standard deviation, of the score at the step that was best on the
validation set: on the test set where there is one, else on the validation set. A failed run is shown with its reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import ConfigError, check


@dataclass(frozen=True)
class Row:
    """What the seeds of one row found."""

    name: str
    split: str
    metric: str
    scores: tuple[float, ...]
    parameters: int
    seconds_per_epoch: float
    memory_gb: float
    devices: tuple[str, ...]
    errors: tuple[str, ...]
    paper: float | None

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.scores) if self.scores else None


def read_table(folder: Path) -> list[Row]:
    """The rows of a table, from ``folder/ROW/seed-N.json``; the paper's numbers from ``folder/paper.json``.

    Raises:
        ConfigError: no results there, or a file that is none.
    """
    paper_file = folder / "paper.json"
    paper = json.loads(paper_file.read_text()) if paper_file.exists() else {}
    rows = []
    for row in sorted(path for path in folder.glob("*") if path.is_dir()):
        results = [_read(path) for path in sorted(row.glob("seed-*.json"))]
        if results:
            rows.append(_row(row.name, results, paper.get(row.name)))
    check(bool(rows), "table", str(folder), "a folder with ROW/seed-N.json")
    return rows


def _read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        result["parameters"], result["metric"], result["seconds_per_epoch"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: no result of experiments.run: {error!r}") from error
    return result


def _row(name: str, results: list[dict[str, Any]], paper: float | None) -> Row:
    good = [result for result in results if not result["error"]]
    split = "test" if good and "test" in good[0]["best"] else "valid"
    devices = {r["machine"].get("gpu", r["machine"]["cpu"]) for r in results}
    return Row(
        name=name,
        split=split,
        metric=results[0]["metric"],
        scores=tuple(result["best"][split] for result in good),
        parameters=results[0]["parameters"],
        seconds_per_epoch=statistics.fmean(result["seconds_per_epoch"] for result in results),
        memory_gb=max(result["peak_memory_gb"] for result in results),
        devices=tuple(sorted(devices)),
        errors=tuple(f"seed {r['seed']}: {r['error']}" for r in results if r["error"]),
        paper=paper,
    )


def shown(value: float, metric: str) -> str:
    """Accuracy in percent, bits with three digits."""
    return f"{100 * value:.2f}" if metric == "accuracy" else f"{value:.4f}"


def markdown(rows: Sequence[Row], title: str) -> str:
    """A table in Markdown, its failures below it."""
    with_paper = any(row.paper is not None for row in rows)
    metric = rows[0].metric
    unit = f"{rows[0].split} {metric}" + (", %" if metric == "accuracy" else " a byte")
    heads = ["method", unit, *(["paper"] if with_paper else []), "seeds", "parameters", "s / epoch", "memory, GB"]
    lines = [f"### {title}", "", "| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    lines += ["| " + " | ".join(_cells(row, with_paper)) + " |" for row in rows]
    lines += [
        "",
        "Mean and standard deviation over seeds, on " + ", ".join(sorted({d for r in rows for d in r.devices})),
    ]
    lines += [f"- {row.name}, {error}" for row in rows for error in row.errors]
    return "\n".join(lines) + "\n"


def _cells(row: Row, with_paper: bool) -> list[str]:
    score = "failed, see below"
    if row.mean is not None:
        score = shown(row.mean, row.metric)
        if len(row.scores) > 1:
            score += f" ± {shown(statistics.stdev(row.scores), row.metric)}"
    paper = [("" if row.paper is None else f"{row.paper:g}")] if with_paper else []
    numbers = [str(len(row.scores)), f"{row.parameters:,}", f"{row.seconds_per_epoch:.1f}", f"{row.memory_gb:.2f}"]
    return [row.name, score, *paper, *numbers]


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Score against time, a point a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5.5), constrained_layout=True)
    scale = 100 if rows[0].metric == "accuracy" else 1
    for row in rows:
        if row.mean is None:
            continue
        spread = statistics.stdev(row.scores) * scale if len(row.scores) > 1 else 0.0
        axis.errorbar(row.seconds_per_epoch, row.mean * scale, yerr=spread, fmt="o", capsize=2)
        axis.annotate(row.name, (row.seconds_per_epoch, row.mean * scale), xytext=(5, 4), textcoords="offset points")
    unit = "%" if scale == 100 else "bits a byte"
    axis.set(title=title, xlabel="seconds an epoch", ylabel=f"{rows[0].split} {rows[0].metric}, {unit}", xscale="log")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tables", description=__doc__)
    parser.add_argument("table", nargs="*", help="tables to render; default all with results")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"))
    parser.add_argument("--plots", type=Path, help="folder for a plot of each table, score against time")
    given = parser.parse_args(arguments)
    names = given.table or sorted(path.name for path in given.results.glob("*") if path.is_dir())
    try:
        check(bool(names), "--results", str(given.results), "a folder with results of experiments.run")
        for name in names:
            rows = read_table(given.results / name)
            print(markdown(rows, name))
            if given.plots:
                given.plots.mkdir(parents=True, exist_ok=True)
                plot(rows, name, given.plots / f"{name}.png")
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
