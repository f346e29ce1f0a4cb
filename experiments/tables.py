"""Renders tables and a plot from result files alone: ``python -m experiments.tables fashion_mnist [--plots folder]``.

A cell is the mean over seeds, with their standard deviation, of the score at the step that was best on the validation
set: on the test set where there is one, else on the validation set. Where a method was searched (rows
``NAME@lr=0.001``), the setting that was best on the validation set with seed 0 stands for it, the one rule for all
methods, however many seeds a setting has; the table lists all that were tried. A failed run is shown with its reason,
and so is a row that was not run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import ConfigError, check

#: Why a row of a configuration has no result, where ``missing.json`` beside the results gives no reason.
NOT_RUN = "not run yet: no time on the GPU"


@dataclass(frozen=True)
class Row:
    """What the seeds of one method found.

    Attributes:
        name: of the method.
        split, metric, higher_is_better: of the scores.
        scores: one a seed that did not fail.
        validation: the scores of the same seeds on the validation set; empty where ``scores`` are those.
        parameters: of the model.
        steps: of training.
        chosen: the setting that the scores are of; "" without a search.
        tried: (setting, validation score with seed 0 or None where it failed, those of all its seeds).
        milliseconds: of a training step on a machine of its own, where ``speed.json`` has it.
        seconds: of the training runs, mean, on a machine that several runs shared.
        memory_gb: peak; alone on the device where ``speed.json`` has it.
        devices: that the runs were on.
        errors: of failed seeds.
        missing: why there is no result; None where there is one.
        paper: the paper's number.
    """

    name: str
    split: str = "valid"
    metric: str = "accuracy"
    higher_is_better: bool = True
    scores: tuple[float, ...] = ()
    validation: tuple[float, ...] = ()
    parameters: int = 0
    steps: int = 0
    chosen: str = ""
    tried: tuple[tuple[str, float | None, tuple[float, ...]], ...] = ()
    milliseconds: float | None = None
    seconds: float = math.nan
    memory_gb: float = math.nan
    devices: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    missing: str | None = None
    paper: float | None = None

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.scores) if self.scores else None


def read_table(folder: Path, planned: Sequence[str] = ()) -> list[Row]:
    """The rows of a table, from ``folder/ROW/seed-N.json``.

    Beside them may lie ``paper.json`` (method -> the paper's number), ``missing.json`` (method -> why it was not run)
    and ``speed.json`` (:mod:`experiments.steptime`).

    Args:
        folder: of the results.
        planned: methods in the order of their configuration, shown also where nothing was run.

    Raises:
        ConfigError: no results there, a file that is none, or results on different data.
    """
    paper, missing, speed = (_optional(folder / f"{name}.json") for name in ("paper", "missing", "speed"))
    methods: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in [*planned, *missing]}
    digests = set()
    for path in sorted(folder.glob("*/seed-*.json")):
        result = _read(path)
        digests.add(result.get("data_sha256"))
        name, _, setting = path.parent.name.partition("@")
        methods.setdefault(name, {}).setdefault(setting, []).append(result)
    check(any(methods.values()), "table", str(folder), "a folder with ROW/seed-N.json")
    check(len(digests - {None}) <= 1, str(folder), f"results on {len(digests)} sets of data", "the same data in all")
    rows = []
    for name, settings in methods.items():
        if settings:
            alone = [speed.get(key, {}).get(name) for key in ("milliseconds", "memory_gb")]
            rows.append(_row(name, settings, paper.get(name), *alone))
        else:
            rows.append(Row(name, missing=missing.get(name, NOT_RUN), paper=paper.get(name)))
    return rows


def _optional(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        result["parameters"], result["metric"], result["seconds"], result["best"], result["error"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: no result of experiments.run: {error!r}") from error
    return result


def _row(
    name: str,
    settings: Mapping[str, list[dict[str, Any]]],
    paper: float | None,
    milliseconds: float | None,
    memory_gb: float | None,
) -> Row:
    tried = []
    for setting, results in settings.items():
        scores = {result["seed"]: float(result["best"]["valid"]) for result in results if not result["error"]}
        if any(result["seed"] == 0 for result in results):
            tried.append((setting, scores.get(0), tuple(scores.values())))
    everything = [result for results in settings.values() for result in results]
    higher = bool(everything[0].get("higher_is_better", True))
    chosen = _chosen(tried, higher) if tried else next(iter(settings))
    results = settings[chosen]
    good = [result for result in results if not result["error"]]
    split = "test" if good and "test" in good[0]["best"] else "valid"
    return Row(
        name=name,
        split=split,
        metric=results[0]["metric"],
        higher_is_better=higher,
        scores=tuple(result["best"][split] for result in good),
        validation=tuple(result["best"]["valid"] for result in good) if split == "test" else (),
        parameters=results[0]["parameters"],
        steps=results[0].get("steps", 0),
        chosen=chosen,
        tried=tuple(sorted(tried, key=lambda one: _number(one[0]))),
        milliseconds=milliseconds,
        seconds=statistics.fmean(result["seconds"] for result in results),
        memory_gb=memory_gb or max(result["peak_memory_gb"] for result in results),
        devices=tuple(sorted({r["machine"].get("gpu") or r["machine"]["cpu"] for r in results})),
        errors=tuple(f"{chosen or 'seed'} {r['seed']}: {r['error']}" for r in results if r["error"]),
        paper=paper,
    )


def _number(setting: str) -> float:
    try:
        return float(setting.rpartition("=")[2])
    except ValueError:
        return 0.0


def _chosen(tried: Sequence[tuple[str, float | None, tuple[float, ...]]], higher: bool) -> str:
    """The setting that was best with seed 0; of equal ones the lowest, as :mod:`experiments.jobs` chooses."""
    ordered = sorted(tried, key=lambda one: _number(one[0]))
    good = [(setting, score) for setting, score, _ in ordered if score is not None]
    if not good:
        return ordered[0][0]
    return (max if higher else min)(good, key=lambda one: one[1])[0]


def shown(value: float, metric: str) -> str:
    """Accuracy in percent, bits with three digits."""
    return f"{100 * value:.2f}" if metric == "accuracy" else f"{value:.4f}"


def score(row: Row) -> str:
    """Mean and standard deviation over seeds, or why there is none."""
    if row.missing is not None:
        return f"({row.missing})"
    if row.mean is None:
        return "failed, see below"
    return spread(row.scores, row.metric)


def spread(scores: Sequence[float], metric: str) -> str:
    """Mean and standard deviation; nothing where there is no score."""
    if not scores:
        return ""
    deviation = f" ± {shown(statistics.stdev(scores), metric)}" if len(scores) > 1 else ""
    return shown(statistics.fmean(scores), metric) + deviation


def markdown(rows: Sequence[Row], title: str) -> str:
    """A table in Markdown, its failures below it."""
    run = [row for row in rows if row.missing is None]
    shape = _Columns(
        paper=any(row.paper is not None for row in rows),
        validation=any(row.validation for row in rows),
        search=any(row.chosen for row in rows),
        speed=any(row.milliseconds is not None for row in rows),
        steps=len({row.steps for row in run}) > 1,
    )
    unit = _unit(run[0]) if run else "score"
    heads = ["method", unit, *(["validation"] if shape.validation else []), *(["paper"] if shape.paper else [])]
    heads += ["seeds", "parameters", *(["tried, validation"] if shape.search else [])]
    heads += [*(["steps"] if shape.steps else []), *(["ms / step"] if shape.speed else [])]
    heads += [*(["s alone"] if shape.steps and shape.speed else []), "s / run", "memory, GB"]
    lines = [f"### {title}", "", "| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    lines += ["| " + " | ".join(_cells(row, shape)) + " |" for row in rows]
    devices = sorted({d for r in run for d in r.devices})
    lines += ["", "Mean and standard deviation over seeds, on " + ", ".join(devices) + "."] if run else []
    if shape.search:
        lines += ["In bold the setting that was best on the validation set with seed 0; the score is of it."]
    lines += [f"- {row.name}, {error}" for row in rows for error in row.errors]
    return "\n".join(lines) + "\n"


def _unit(row: Row) -> str:
    return f"{row.split} {row.metric}" + (", %" if row.metric == "accuracy" else " a byte")


@dataclass(frozen=True)
class _Columns:
    """Which of the columns that not every table has are there."""

    paper: bool
    validation: bool
    search: bool
    speed: bool
    steps: bool


def _cells(row: Row, shape: _Columns) -> list[str]:
    cells = [row.name, score(row), *([spread(row.validation, row.metric)] if shape.validation else [])]
    cells += [("" if row.paper is None else f"{row.paper:g}")] if shape.paper else []
    if row.missing is not None:
        return cells + [""] * (4 + shape.search + shape.speed + shape.steps + (shape.steps and shape.speed))
    cells += [str(len(row.scores)), f"{row.parameters:,}", *([_tried(row)] if shape.search else [])]
    known = row.milliseconds is not None
    cells += [f"{row.steps:,}"] if shape.steps else []
    cells += [f"{row.milliseconds:.1f}" if known else ""] if shape.speed else []
    if shape.steps and shape.speed:  # what training takes without evaluation, nothing else on the device
        cells.append(f"{row.steps * (row.milliseconds or 0.0) / 1e3:.1f}" if known else "")
    return [*cells, f"{row.seconds:.1f}", f"{row.memory_gb:.2f}"]


def _tried(row: Row) -> str:
    if not row.chosen:
        return ""
    parts = []
    for setting, first, scores in row.tried:
        text = f"{setting} {'failed' if first is None else shown(first, row.metric)}"
        if len(scores) > 1:
            text += f" ({len(scores)} seeds: {shown(statistics.fmean(scores), row.metric)})"
        parts.append(f"**{text}**" if setting == row.chosen else text)
    return ", ".join(parts)


def planned_rows(config: Path) -> list[str]:
    """The methods of a configuration file, in its order; none where there is no such file."""
    if not config.exists():
        return []
    from experiments.config import read

    return list(read(config).get("rows", {}))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tables", description=__doc__)
    parser.add_argument("table", nargs="*", help="tables to render; default all with results")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"))
    parser.add_argument("--configs", type=Path, default=Path("experiments/configs"), help="whose rows are shown")
    parser.add_argument("--plots", type=Path, help="folder for a plot of each table, score against time")
    parser.add_argument("--format", default="png", help="of the plots: png, svg...")
    parser.add_argument("--prefix", default="", help="of the plots' names")
    given = parser.parse_args(arguments)
    names = given.table or sorted({path.parents[1].name for path in given.results.glob("*/*/seed-*.json")})
    try:
        check(bool(names), "--results", str(given.results), "a folder with results of experiments.run")
        for name in names:
            rows = read_table(given.results / name, planned_rows(given.configs / f"{name}.toml"))
            print(markdown(rows, name))
            if given.plots:
                from experiments.table_plot import plot

                given.plots.mkdir(parents=True, exist_ok=True)
                plot(rows, name, given.plots / f"{given.prefix}{name}.{given.format}")
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
