"""Prints the requirements of extras of pyproject.toml, one a line, without installing the package itself.

python tools/extras.py dev docs
"""

import re
import sys
from importlib import import_module
from pathlib import Path


def requirements(table: dict[str, list[str]], names: list[str]) -> list[str]:
    """The requirements of the named extras; `race-attention[a,b]` in one of them stands for those extras."""
    found: list[str] = []
    for name in names:
        for requirement in table[name]:
            own = re.fullmatch(r"race-attention\[(.+)\]", requirement)
            found += requirements(table, own[1].split(",")) if own else [requirement]
    return list(dict.fromkeys(found))


def main() -> None:
    # tomllib came with Python 3.11; pip carries the same reader for 3.10.
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli")
    project = toml.loads(Path(__file__).parent.parent.joinpath("pyproject.toml").read_text())["project"]
    for requirement in requirements(project["optional-dependencies"], sys.argv[1:]):
        print(requirement)


if __name__ == "__main__":
    main()
