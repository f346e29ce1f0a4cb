"""The direction of imports that DESIGN.md draws, read off the sources: nothing imports what stands above it."""

import ast
import re
import sys
from pathlib import Path

import pytest

import race_attention

PACKAGE = Path(race_attention.__file__).parent

#: From the ground up. A module imports from layers below its own, and from its own unit.
LAYERS = (
    ("_version", "arguments", "packing"),
    ("features", "rotary", "decay"),
    ("state", "convolution"),
    ("layer_state", "backends.call"),
    ("backends.reference", "backends.cpu", "backends.triton"),
    ("backends",),
    ("forms",),
    ("checks",),
    ("attention", "layer_checks"),
    ("nn", "sdpa"),
    ("streaming", "distributed"),
    ("integrations",),
    ("__init__",),
    ("testing",),
    ("backends.triton.autotune",),  # a tool: it asks the oracle before it trusts a configuration
    ("cli",),
)
RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}

#: What may be imported when a module is imported, beside the standard library and torch.
THIRD_PARTY = {"cli": {"typer", "rich"}, "backends.triton": {"triton"}, "integrations": {"transformers"}}


def modules() -> dict[str, Path]:
    """Every module of the package by its name inside it: 'nn', 'backends.triton.kernels', '__init__'."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


MODULES = modules()


def unit_of(module: str) -> str:
    """The unit of the layers that a module belongs to; fails for one that no layer names."""
    name = re.sub(r"^(backends\.[a-z]+)_.*", r"\1", module)  # backends.cpu_library is of backends.cpu
    while name and name not in RANK:
        name = name.rpartition(".")[0]
    if not name or (name == "backends" and module != "backends"):
        pytest.fail(f"race_attention.{module} has no place in the layers of DESIGN.md; add it there and to LAYERS")
    return name


def inner_imports(module: str, tree: ast.AST) -> set[str]:
    """The modules of the package that a module imports, anywhere in it."""
    path = MODULES[module]
    package = [] if module == "__init__" else module.split(".")[: None if path.name == "__init__.py" else -1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {".".join(name[1:]) or "__init__" for name in names if name[0] == "race_attention"}
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [*package[: len(package) - node.level + 1], *base]
            elif base[0] == "race_attention":
                base = base[1:]
            else:
                continue
            for alias in node.names:
                deeper = ".".join([*base, alias.name])
                found.add(deeper if deeper in MODULES else ".".join(base) or "__init__")
    return found - {module}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    unit = unit_of(module)
    for imported in inner_imports(module, ast.parse(MODULES[module].read_text())):
        other = unit_of(imported)
        assert other == unit or RANK[other] < RANK[unit], (
            f"{module} imports {imported}, which stands above or beside it"
        )


@pytest.mark.parametrize("module", MODULES)
def test_nothing_optional_is_imported_before_it_is_used(module):
    allowed = {"torch", "race_attention", "__future__", *sys.stdlib_module_names} | THIRD_PARTY.get(
        unit_of(module), set()
    )
    top = [
        node for node in ast.parse(MODULES[module].read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    for node in top:
        names = (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [] if node.level else [node.module or ""]
        )
        assert {name.split(".")[0] for name in names} <= allowed


def test_this_test_sees_a_wrong_import():
    tree = ast.parse("from .attention import race_attention\nfrom . import nn\nimport race_attention.features")
    assert inner_imports("state", tree) == {"attention", "nn", "features"}
    assert inner_imports("backends.reference", ast.parse("from ..state import x\nfrom . import call")) == {
        "state",
        "backends.call",
    }
