"""What the package says of itself: requirements, pins, entry point."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
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


_COMPILER = re.compile(r"(.*-)?(cc|c\+\+|gcc|g\+\+|clang|clang\+\+|cpp|icpx|nvc\+\+|c[89]9(-gcc)?)(-[\d.]+)?")
_USE = """
import warnings
import torch
from race_attention import race_attention, sample_hyperplanes
x, planes = torch.randn(1, 8, 2, 4), sample_hyperplanes(2, 2, 2, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = race_attention(x, x, x, planes, 1.0, causal=True)
said = [str(warning.message) for warning in caught]
assert any("no C++ compiler" in words for words in said), said
assert torch.equal(out, race_attention(x, x, x, planes, 1.0, causal=True, backend="reference"))
try:
    race_attention(x, x, x, planes, 1.0, causal=True, backend="cpu")
except (ValueError, RuntimeError) as error:
    assert "no C++ compiler" in str(error), error
else:
    raise AssertionError("served without a library")
"""


@pytest.mark.skipif(not importlib.util.find_spec("scikit_build_core"), reason="needs what the package is built with")
def test_without_a_compiler_the_package_works_and_says_so(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for folder in map(Path, os.environ["PATH"].split(os.pathsep)):
        for tool in folder.iterdir() if folder.is_dir() else ():
            if not _COMPILER.fullmatch(tool.name) and not (tools / tool.name).exists():
                (tools / tool.name).symlink_to(tool.absolute())
    names = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "PYTHONPATH", "RACE_ATTENTION_CPU_LIBRARY", "RACE_ATTENTION_CPU_ISA")
    alone = {name: value for name, value in os.environ.items() if name not in names} | {"PATH": str(tools)}
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", "made"]
    made = subprocess.run(
        [sys.executable, *command, f"--config-settings=build-dir={tmp_path / 'build'}", str(ROOT)],
        cwd=tmp_path,
        env=alone,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stderr
    (wheel,) = (tmp_path / "made").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".dylib"))]
        archive.extractall(tmp_path / "site")
    alone["PYTHONPATH"] = str(tmp_path / "site")
    used = subprocess.run(
        [sys.executable, "-c", _USE], cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=120
    )
    assert used.returncode == 0, used.stderr


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
