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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from experiments.config import ConfigError, check
from experiments.labels import label

#: Why a row of a configuration has no result, where ``missing.json`` beside the results gives no reason.
NOT_RUN = "not run yet: no time on the GPU"


@dataclass(frozen=True)
class Row:
    """What the seeds of one method found.

    Attributes:
        name: of the method, as its configuration has it.
        label: what stands for it in a table.
        model: the fields of its :class:`~experiments.models.blocks.ModelConfig`, where they are known.
        split, metric, higher_is_better: of the scores.
        scores: one a seed that did not fail.
        validation: the scores of the same seeds on the validation set; empty where ``scores`` are those.
        parameters: of the model.
        steps: of training.
        chosen: the setting that the scores are of; "" without a search.
        tried: (setting, validation score with seed 0 or None where it failed, those of all its seeds).
        milliseconds: of a training step on a machine of its own, where ``speed.json`` has it.
        seconds: of the training runs, mean, on a machine that several runs shared.
        memory_gb: peak of training alone on the device, as ``speed.json`` has it; of the runs, which may have shared a
            process, where that has none of any row.
        devices: that the runs were on.
        errors: of failed seeds.
        missing: why there is no result; None where there is one.
        paper: the paper's number.
    """

    name: str
    label: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
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
    memory_gb: float | None = None
    devices: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    missing: str | None = None
    paper: float | None = None

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.scores) if self.scores else None


def read_table(folder: Path, planned: Mapping[str, Mapping[str, Any]] | None = None) -> list[Row]:
    """The rows of a table, from ``folder/ROW/seed-N.json``.

    Beside them may lie ``paper.json`` (method -> the paper's number), ``missing.json`` (method -> why it was not run)
    and ``speed.json`` (:mod:`experiments.steptime`).

    Args:
        folder: of the results.
        planned: methods in the order of their configuration, with their models' fields; shown without a result too.

    Raises:
        ConfigError: no results there, a file that is none, or results on different data.
    """
    paper, missing, speed = (_optional(folder / f"{name}.json") for name in ("paper", "missing", "speed"))
    methods: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in [*(planned or {}), *missing]}
    digests = set()
    for path in sorted(folder.glob("*/seed-*.json")):
        result = _read(path)
        digests.add(result.get("data_sha256"))
        name, _, setting = path.parent.name.partition("@")
        methods.setdefault(name, {}).setdefault(setting, []).append(result)
    check(any(methods.values()), "table", str(folder), "a folder with ROW/seed-N.json")
    check(len(digests - {None}) <= 1, str(folder), f"results on {len(digests)} sets of data", "the same data in all")
    models = dict(planned or {}) | {name: _model(settings) for name, settings in methods.items() if settings}
    heads = Counter(model["heads"] for model in models.values() if "heads" in model).most_common(1)
    rows = []
    for name, settings in methods.items():
        called = label(models[name], heads[0][0] if heads else None) if models.get(name) else name
        if settings:
            row = _row(name, called, models[name], settings)
            if "memory_gb" in speed:
                row = replace(row, memory_gb=speed["memory_gb"].get(name))
            rows.append(replace(row, paper=paper.get(name), milliseconds=speed.get("milliseconds", {}).get(name)))
        else:
            rows.append(
                Row(name, called, models.get(name, {}), missing=missing.get(name, NOT_RUN), paper=paper.get(name))
            )
    return rows


def _model(settings: Mapping[str, list[dict[str, Any]]]) -> Mapping[str, Any]:
    """Of the first result; empty where it does not say."""
    first = next(iter(settings.values()))[0]
    found: Mapping[str, Any] = first.get("config", {}).get("model", {})
    return found


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
    called: str,
    model: Mapping[str, Any],
    settings: Mapping[str, list[dict[str, Any]]],
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
        label=called,
        model=model,
        split=split,
        metric=results[0]["metric"],
        higher_is_better=higher,
        scores=tuple(result["best"][split] for result in good),
        validation=tuple(result["best"]["valid"] for result in good) if split == "test" else (),
        parameters=results[0]["parameters"],
        steps=results[0].get("steps", 0),
        chosen=chosen,
        tried=tuple(sorted(tried, key=lambda one: _number(one[0]))),
        seconds=statistics.fmean(result["seconds"] for result in results),
        memory_gb=max(result["peak_memory_gb"] for result in results),
        devices=tuple(sorted({r["machine"].get("gpu") or r["machine"]["cpu"] for r in results})),
        errors=tuple(f"{chosen or 'seed'} {r['seed']}: {r['error']}" for r in results if r["error"]),
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


def planned_rows(config: Path) -> dict[str, Mapping[str, Any]]:
    """The methods of a configuration file, in its order, with their models' fields; none without such a file."""
    if not config.exists():
        return {}
    from experiments.rows import merge, read_merged

    shared = read_merged(config)
    model, rows = shared.get("model", {}), shared.get("rows", {})
    return {name: merge(model, own.get("model", {})) for name, own in rows.items()}


def wanted(row: str, patterns: Sequence[str]) -> bool:
    """Whether a row matches one of the patterns, as of file names, and none of those after a ``!``."""
    left_out = any(fnmatchcase(row, pattern[1:]) for pattern in patterns if pattern.startswith("!"))
    chosen = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]
    return not left_out and any(fnmatchcase(row, pattern) for pattern in chosen)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tables", description=__doc__)
    parser.add_argument("table", nargs="*", help="tables to render; default all with results")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"))
    parser.add_argument("--configs", type=Path, default=Path("experiments/configs"), help="whose rows are shown")
    parser.add_argument(
        "--rows", nargs="+", default=[], metavar="PATTERN", help="as of file names; !PATTERN leaves out"
    )
    parser.add_argument("--plots", type=Path, help="folder for a plot of each table, score against time")
    parser.add_argument("--format", default="png", help="of the plots: png, svg...")
    parser.add_argument("--prefix", default="", help="of the plots' names")
    given = parser.parse_args(arguments)
    from experiments.table_text import markdown

    names = given.table or sorted({path.parents[1].name for path in given.results.glob("*/*/seed-*.json")})
    try:
        check(bool(names), "--results", str(given.results), "a folder with results of experiments.run")
        for name in names:
            rows = read_table(given.results / name, planned_rows(given.configs / f"{name}.toml"))
            rows = [row for row in rows if wanted(row.name, given.rows)]
            print(markdown(rows, name))
            if given.plots:
                from experiments.table_plot import plot

                given.plots.mkdir(parents=True, exist_ok=True)
                plot(rows, name, given.plots / f"{given.prefix}{name}.{given.format}")
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
