"""What the package says of itself: requirements, pins, entry point."""

import importlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tools.extras import requirements

ROOT = Path(__file__).parent.parent
toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli")
PYPROJECT = toml.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=;, ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_building_never_asks_for_torch():
    assert [name_of(requirement) for requirement in PYPROJECT["build-system"]["requires"]] == ["scikit-build-core"]


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"fla"}))  # no tool of development
def test_development_pins_every_requirement(extra):
    lines = (ROOT / "constraints-dev.txt").read_text().splitlines()
    pinned = {name_of(line) for line in lines if re.fullmatch(r"[\w.-]+==\S+", line)}
    needed = requirements(EXTRAS, [extra]) + PYPROJECT["project"]["dependencies"]
    assert {name_of(requirement) for requirement in needed} <= pinned


def test_torch_is_pinned_once():
    lines = (ROOT / "constraints-dev.txt").read_text().splitlines()
    assert [line for line in lines if name_of(line) == "torch"] == ["torch==2.13.0"]


def test_extras_resolve_each_other():
    assert requirements({"a": ["race-attention[b,c]", "x>=1"], "b": ["y"], "c": ["y", "z"]}, ["a", "c"]) == [
        "y",
        "z",
        "x>=1",
    ]


def installed() -> bool:
    try:
        return metadata.distribution("race-attention") is not None
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not installed(), reason="race_attention is imported from its sources, not installed")
class TestInstalled:
    def test_version(self):
        import race_attention

        assert metadata.version("race-attention") == race_attention.__version__

    def test_the_command_is_installed(self):
        script = Path(sys.executable).parent / "race-attention"
        done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"race-attention {metadata.version('race-attention')}"

    def test_types_are_shipped(self):
        import race_attention

        assert (Path(race_attention.__file__).parent / "py.typed").exists()
