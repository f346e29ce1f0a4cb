"""The code in the documentation runs: all Python blocks of a page, in order, in one namespace."""

import re
from pathlib import Path

import pytest

from race_attention.streaming import stateful

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # What a page registers ends with it: a GRU that carries its state made another test fail in the same process
    monkeypatch.setattr(stateful, "_ADAPTERS", dict(stateful._ADAPTERS))
    text, namespace = page.read_text(), {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        code = "\n" * line + block[1]  # so that a traceback names the line of the page
        exec(compile(code, str(page), "exec"), namespace)


def test_pages_with_code_were_found():
    assert any(BLOCK.search(page.read_text()) for page in PAGES)


TEXTS = [ROOT / name for name in ("CONTRIBUTING.md", "DESIGN.md", "experiments/README.md")] + PAGES
MODULE = re.compile(r"python -m ((?:benchmarks|experiments|race_attention)[\w.]*)")
FILE = re.compile(r"(?<![\w/.-])(?:benchmarks|docs|experiments|src|tests|tools)/[\w/-]+\.(?:json|md|py|toml|svg|png)\b")


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_commands_and_files_that_a_page_names_are_there(page):
    text = page.read_text()
    modules = [name.replace(".", "/") for name in MODULE.findall(text)]
    missing = [name for name in modules if not list(ROOT.glob(f"{name}.py")) and not (ROOT / name).is_dir()]
    links = re.sub(r"https?://\S+", "", text)
    missing += [name for name in FILE.findall(links) if "TABLE" not in name and not (ROOT / name).exists()]
    assert not missing
