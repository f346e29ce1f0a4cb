"""What MkDocs does beyond its plugins: equations as MathML, the roles of docstrings, tables of results.

Browsers draw MathML themselves, so that the pages need neither a script nor the network. Tables are made from
committed result files, so that no number on a page is typed by hand.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).parent.parent

_RESULTS = re.compile(r"<!-- results: (\S+) -->")
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):<code>~?(.*?)</code>")


def _mathml(match: re.Match[str]) -> str:
    tag, opening, latex = match.groups()
    made = convert(html.unescape(latex).strip(), display="block" if opening == "[" else "inline")
    return f'<{tag} class="equation">{made}</{tag}>' if tag == "div" else made


_MOST_ROWS = 40  # a longer table is folded


def _tables(path: Path) -> str:
    """A result file as Markdown: its title, a table for each part of its rows, the context they were measured in."""
    data = json.loads(path.read_text())
    title = data.get("title") or path.stem.replace("-", " ")
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        parts.setdefault(str(row.get("part", "")), []).append({k: v for k, v in row.items() if k != "part"})
    lines = [f"### {title}", ""]
    for part, rows in parts.items():
        lines += [f"#### {part}", ""] if part else []
        lines += [*_table(rows), ""]
    context = "; ".join(f"{name}: {_cell(value)}" for name, value in data["context"].items())
    return "\n".join([*lines, f"{context}. From `{path.relative_to(ROOT)}`.", ""])


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    if len(rows) <= _MOST_ROWS:
        return lines
    return [f'??? note "{len(rows)} rows"', "", *(f"    {line}" for line in lines)]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _results(match: re.Match[str]) -> str:
    found = sorted(ROOT.glob(match[1]))
    return "\n".join(map(_tables, found)) if found else f"*No result file is committed at `{match[1]}` yet.*"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with the source of every page.

    `<!-- results: benchmarks/results/*.json -->` becomes tables. Those of experiments are in the page already
    (``python -m experiments.page``).
    """
    return _RESULTS.sub(_results, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Called by MkDocs with the HTML of every page."""
    content = _EQUATION.sub(_mathml, content)
    if "arithmatex" in content:
        raise ValueError("an equation was not converted")
    return _ROLE.sub(r"<code>\1</code>", content)
