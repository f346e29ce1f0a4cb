"""Writes the tables of a page of the documentation from result files: ``python -m experiments.page docs/accuracy.md``.

What lies between ``<!-- accuracy: TABLE | TITLE -->`` and ``<!-- end -->`` is replaced by the table of
``experiments/results/TABLE``; with ``<!-- accuracy: TABLE | TITLE | PATTERN PATTERN -->`` by the rows that match one of
the patterns (as of file names; ``!PATTERN`` leaves rows out, ``=ROW`` adds a column that compares with that row).
``--check`` writes nothing and fails where the page would change.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from experiments import tables
from experiments.config import ConfigError
from experiments.table_text import markdown

_TABLE = re.compile(r"(<!-- accuracy: (\S+) \| (.+?)(?: \| (.+?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(page: str, results: Path, configs: Path) -> str:
    """The page with all its tables made anew.

    Raises:
        ConfigError: results that are none, or no row that fits the patterns.
    """

    def table(match: re.Match[str]) -> str:
        begin, name, title, patterns, end = match.groups()
        return f"{begin}\n{_table(name, title, (patterns or '*').split(), results, configs)}\n{end}"

    return _TABLE.sub(table, page)


def _table(name: str, title: str, patterns: Sequence[str], results: Path, configs: Path) -> str:
    config = configs / f"{name}.toml"
    if not list((results / name).glob("*/seed-*.json")):
        return f"**{title}**\n\n*Not run yet; `experiments/configs/{name}.toml` says what is planned.*\n"
    rows = tables.read_table(results / name, tables.planned_rows(config))
    against = next((pattern[1:] for pattern in patterns if pattern.startswith("=")), None)
    rows = [row for row in rows if tables.wanted(row.name, [one for one in patterns if not one.startswith("=")])]
    if not rows:
        raise ConfigError(f"accuracy: got {' '.join(patterns)!r} for {name}, of which it has no row")
    source = f"From `experiments/results/{name}`; settings in `experiments/configs/{name}.toml`."
    return f"{markdown(rows, title, against)}\n{source}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.page", description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--results", type=Path, default=Path("experiments/results"))
    parser.add_argument("--configs", type=Path, default=Path("experiments/configs"))
    parser.add_argument("--check", action="store_true", help="writes nothing; exit 1 where the page would change")
    given = parser.parse_args(arguments)
    try:
        before = given.page.read_text()
        after = rendered(before, given.results, given.configs)
    except (ConfigError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    if given.check and after != before:
        parser.exit(1, f"{given.page}: not what the results say; run python -m experiments.page {given.page}\n")
    if not given.check:
        given.page.write_text(after)


if __name__ == "__main__":
    main()
