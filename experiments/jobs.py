"""What to run next: the jobs of a queue file, for :mod:`experiments.gpu_batch`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from experiments import config as configuration
from experiments.config import check
from experiments.rows import read_rows, rows_named


@dataclass(frozen=True)
class Job:
    """One run of the queue.

    Attributes:
        file: the configuration.
        table: of the results.
        rows: the row; or, for a finalist, all rows of a search, of which the best takes part once all are done.
        seed: of the run.
        seconds: that it is thought to take, if the queue says so.
    """

    file: Path
    table: str
    rows: tuple[str, ...]
    seed: int
    seconds: float | None = None

    def row(self, results: Path) -> str | None:
        """The row to run; None while its search is not done, or nothing of it succeeded."""
        if len(self.rows) == 1:
            return self.rows[0]
        found = []
        for row in self.rows:
            path = results / self.table / row / "seed-0.json"
            if not path.exists():
                return None
            result = json.loads(path.read_text())
            if not result["error"]:
                found.append((result["best"]["valid"] * (1 if result["higher_is_better"] else -1), row))
        return max(found, key=lambda one: one[0])[1] if found else None  # of equals the first

    def result(self, results: Path) -> Path | None:
        """Where its result lies, if its row is known."""
        row = self.row(results)
        return None if row is None else results / self.table / row / f"seed-{self.seed}.json"

    @property
    def method(self) -> tuple[Path, str]:
        """What its compiled model depends on: settings of a search and seeds have it in common."""
        return self.file, self.rows[0].partition("@")[0]

    def __str__(self) -> str:
        row = self.rows[0] if len(self.rows) == 1 else self.rows[0].partition("@")[0] + "@best"
        return f"{self.table}/{row}/{self.seed}"


def read_queue(path: Path) -> list[Job]:
    """The jobs of a queue file, in its order, each once.

    An entry names a configuration, rows (a name without its ``@`` part stands for its whole search; default all),
    seeds, and ``best = true`` for the finalists: the best row of each search, judged by seed 0, with more seeds. With
    ``seconds`` its jobs start only while so much time is left.

    Raises:
        ConfigError: naming the entry and the key.
    """
    data = configuration.read(path)
    entries = data.get("runs")
    check(isinstance(entries, list) and bool(entries), "runs", entries, "a list of [[runs]]")
    assert isinstance(entries, list)
    jobs: dict[tuple[str, tuple[str, ...], int], Job] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"runs[{number}]"
        unknown = set(entry) - {"config", "rows", "seeds", "best", "seconds"}
        check(not unknown and "config" in entry, where, sorted(entry), "config, and rows, seeds, best, seconds")
        file = path.parent / entry["config"]
        rows = read_rows(file)
        table = next(iter(rows.values())).table
        methods = list(dict.fromkeys(row.partition("@")[0] for row in rows))
        for seed in entry.get("seeds", [0]):
            for name in entry.get("rows", methods):
                group = tuple(rows_named(rows, name, f"{where}.rows"))
                for chosen in [group] if entry.get("best") else [(row,) for row in group]:
                    jobs.setdefault(
                        (entry["config"], chosen, seed), Job(file, table, chosen, seed, entry.get("seconds"))
                    )
    return list(jobs.values())
