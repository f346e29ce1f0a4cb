"""``race-attention stream``: its checksums, and its resuming after SIGKILL."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from race_attention.cli.app import app
from race_attention.cli.stream import number_of_tokens
from race_attention.streaming.generated import Checksum, GeneratedStream

SMALL = ("--device", "cpu", "--backend", "reference", "--heads", "2", "--dim", "8", "--json", "--no-progress")


def run(*options: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["stream", *SMALL, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def assert_same_checksums(actual: dict[str, Any], expected: dict[str, Any], rtol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, right in expected.items():
        for what in ("sum", "norm"):
            assert abs(actual[name][what] - right[what]) <= rtol * right["norm"], (name, what)


@pytest.mark.parametrize("options", [("--causal",), ("--no-causal",), ("--decay",), ("--keep-every", "3")])
def test_checksums_do_not_depend_on_the_segment(options: tuple[str, ...]) -> None:
    expected = run("--tokens", "1000", "--segment", "1000", *options)
    names = {"out", *(f"gradient of {n}" for n in ("query", "key", "value", "hyperplanes", "beta"))}
    assert names <= set(expected["checksums"])
    assert expected["peak_memory_bytes"]["resident"] > 2**20
    for segment in ("64", "301"):
        found = run("--tokens", "1k", "--segment", segment, *options)
        assert_same_checksums(found["checksums"], expected["checksums"], 3e-6)


def test_places_that_are_none_are_named(tmp_path: Path) -> None:
    """Not by a traceback: a device that torch does not know, a journal where a file is in the way."""
    (tmp_path / "file").touch()
    for options in (("--keep-on", "nowhere"), ("--journal", str(tmp_path / "file" / "journal"))):
        result = CliRunner().invoke(app, ["stream", *SMALL, "--tokens", "100", *options], catch_exceptions=False)
        assert result.exit_code == 2
        assert options[0][2:] in result.stderr


def test_forward_alone_and_dtypes() -> None:
    assert set(run("--tokens", "500", "--no-backward")["checksums"]) == {"out"}
    wide = run("--tokens", "500", "--dtype", "float64")["checksums"]
    narrow = run("--tokens", "500", "--dtype", "float32")["checksums"]
    assert_same_checksums(narrow, wide, 1e-5)


def test_a_table_for_people() -> None:
    plain = [option for option in SMALL if option != "--json"]
    result = CliRunner().invoke(app, ["stream", *plain, "--tokens", "300"])
    assert result.exit_code == 0
    assert "tokens per second" in result.stdout
    assert "gradient of hyperplanes" in result.stdout


@pytest.mark.parametrize(
    ("text", "number"), [("75M", 75_000_000), ("1B", 10**9), ("1G", 10**9), ("1.5k", 1500), ("65_536", 65536)]
)
def test_numbers(text: str, number: int) -> None:
    assert number_of_tokens(text) == number


@pytest.mark.parametrize("text", ["", "-3", "0", "1.5", "many", "1e999", "nan", "1e30"])
def test_bad_numbers(text: str) -> None:
    result = CliRunner().invoke(app, ["stream", *SMALL, "--tokens", text])
    assert result.exit_code == 2


def test_data_come_from_positions() -> None:
    whole = GeneratedStream(100, 100, heads=2, dim=4, decay=True)
    parts = GeneratedStream(100, [0, 33, 1, 66], heads=2, dim=4, decay=True)
    for field in range(4):
        assert torch.equal(torch.cat([part[field] for part in parts], 1), whole[0][field])
    assert torch.equal(torch.cat(list(parts.gradients()), 1), whole.gradients()[0])
    other = GeneratedStream(100, 100, heads=2, dim=4, seed=1)
    assert not torch.equal(other[0].query, whole[0].query)
    assert not torch.equal(whole[0].query, whole[0].key)


def test_a_checksum_sees_one_token() -> None:
    x = torch.randn(1, 50, 2, 4)
    changed, exact = x.clone(), Checksum()
    changed[0, 31, 1, 2] += 0.1
    exact.write({"out": x}, 7)
    swapped = x[:, [*range(10), 11, 10, *range(12, 50)]]
    for wrong in (changed, swapped):
        other = Checksum()
        other.write({"out": wrong}, 7)
        assert abs(other.numbers()["out"]["sum"] - exact.numbers()["out"]["sum"]) > 1e-3


def start(journal: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "race_attention.cli", "stream", *SMALL, *options]
    command += ["--journal", str(journal), "--journal-every", "1"]
    import race_attention

    paths = [str(Path(race_attention.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("causal", ["--causal", "--no-causal"])
def test_killed_ten_times_at_random(causal: str, tmp_path: Path) -> None:
    """Each attempt is killed after some new entries of its journal, at a random moment; the last one runs on."""
    options = ("--tokens", "60000", "--segment", "250", causal)
    expected = run(*options)["checksums"]
    moments, folder = random.Random(5), tmp_path / "journal"
    kills = 0
    while kills < 10:
        process = start(folder, *options)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
        while process.poll() is None:  # some progress first, so that ten attempts do not end where they began
            now = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
            if now != before:
                break
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    assert kills == 10, "the run was over before ten kills; make it longer"
    process = start(folder, *options)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["checksums"] == expected  # the same numbers added in the same order


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    """The same once, quickly."""
    options = ("--tokens", "8000", "--segment", "100")
    expected = run(*options)["checksums"]
    process = start(tmp_path, *options)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert run(*options, "--journal", str(tmp_path), "--journal-every", "1")["checksums"] == expected
