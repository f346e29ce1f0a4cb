"""The command line: what each command says, in words and as JSON, and how it refuses."""

import importlib
import json
import subprocess
import sys

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner

from race_attention import backends
from race_attention._version import __version__
from race_attention.backends.triton import MOST_BUCKETS
from race_attention.cli import choose
from race_attention.cli.app import COMMANDS, app


def run(*arguments: str):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def run_json(*arguments: str):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_version():
    assert run("--version").stdout.strip() == f"race-attention {__version__}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    summary = importlib.import_module(f"race_attention.cli.{name}").command.__doc__
    assert summary.split()[0] in result.stdout


class TestInfo:
    def test_json_answers_for_every_backend_and_device(self):
        facts = run_json("info")
        assert facts["versions"]["race-attention"] == __version__
        assert facts["devices"]["cpu"]
        assert set(facts["backends"]) == set(backends.NAMES)
        for about in facts["backends"].values():
            for device in facts["devices"]:
                assert all(reason is None or reason for reason in about["why_not"][device].values())

    def test_the_reference_serves_everything(self):
        why_not = run_json("info")["backends"]["reference"]["why_not"]
        assert {reason for by_dtype in why_not.values() for reason in by_dtype.values()} == {None}

    def test_auto_chooses_a_backend_that_serves(self):
        facts = run_json("info")
        for device, by_dtype in facts["auto"].items():
            for dtype, chosen in by_dtype.items():
                assert facts["backends"][chosen["backend"]]["why_not"][device][dtype] is None
                assert chosen["why"]

    def test_words(self):
        result = run("info")
        assert result.exit_code == 0
        for word in ("Versions", "Devices", "Backends", "reference", "available"):
            assert word in result.stdout


class TestChoose:
    @pytest.mark.parametrize(("planes", "angle"), [(1, 90.0), (2, 52.72), (4, 28.64)])
    def test_half_angle(self, planes, angle):
        assert choose.half_angle(planes) == pytest.approx(angle, abs=0.01)

    def test_costs_by_hand(self):
        row = choose.costs(planes=3, tables=5, head_dim=64, value_dim=32, tokens=1000, beta=6.0)
        assert row.buckets == 40
        assert row.state_bytes == 40 * 33 * 8
        assert row.flops_per_token == 4 * 5 * 3 * 64 + 4 * 40 + 4 * 40 * 33
        assert row.smoothing_error == 0.5
        assert row.sampling_error == pytest.approx(1.175394, abs=1e-6)  # ln 1000 = 6.907755

    @pytest.mark.parametrize("kib", [130, 200, 1000])
    @pytest.mark.parametrize("angle", [15, 30, 60, 90])
    def test_the_suggestion_keeps_both_wishes_and_uses_the_memory(self, kib, angle):
        row = choose.suggest(64, 64, 4096, angle, kib * 1024)
        assert row.half_angle <= angle
        assert row.state_bytes <= kib * 1024
        one_more = choose.costs(row.planes, row.tables + 1, 64, 64, 4096)
        assert one_more.state_bytes > kib * 1024

    def test_json(self):
        data = run_json("choose", "--head-dim", "128", "--beta", "8")
        assert data["suggested"]["smoothing_error"] == data["suggested"]["planes"] / 8
        assert [(row["planes"], row["tables"]) for row in data["paper"]] == [(2, 2), (3, 3), (4, 4)]

    def test_words_name_the_constructor(self):
        assert "RaceAttention(..., planes=3, tables=7, head_dim=64)" in run("choose").stdout

    def test_says_what_no_gpu_serves(self):
        assert "On GPUs" not in run("choose").stdout
        said = " ".join(run("choose", "--state-kib", "1000").stdout.split())
        assert f"On GPUs only the reference serves more than {MOST_BUCKETS:,} buckets a head." in said

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (("--half-angle", "5"), "half-angle"),
            (("--half-angle", "nan"), "half-angle"),
            (("--half-angle", "91"), "half-angle"),
            (("--state-kib", "0.5"), "state-kib"),
            (("--state-kib", "inf"), "state-kib"),
            (("--beta", "0"), "beta"),
            (("--head-dim", "0"), "head-dim"),
        ],
    )
    def test_refuses(self, arguments, named):
        result = run("choose", *arguments)
        assert result.exit_code == 2
        assert named in result.stderr


class TestBench:
    SMALL = ("--tokens", "64", "--heads", "2", "--head-dim", "16", "--repeats", "2", "--device", "cpu")

    @pytest.mark.parametrize("options", [(), ("--no-backward",), ("--no-causal",), ("--dtype", "bfloat16")])
    def test_json(self, options):
        data = run_json("bench", *self.SMALL, "--backend", "reference", *options)
        assert data["backend"] == "reference"
        assert 0 < data["fastest_s"] <= data["median_s"] <= data["slowest_s"]
        assert data["tokens_per_s"] == pytest.approx(64 / data["median_s"])
        assert data["ratio_to_copy"] == pytest.approx(data["median_s"] / data["copy_s"])

    def test_auto_names_the_backend_that_served(self):
        assert run_json("bench", *self.SMALL)["backend"] in backends.NAMES

    def test_words(self):
        result = run("bench", *self.SMALL)
        assert result.exit_code == 0
        assert "ratio to the copy" in result.stdout

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            (("--backend", "tritonn"), "tritonn"),
            (("--backend", "triton"), "triton"),  # not on a CPU
            (("--planes", "11"), "planes"),
            (("--dtype", "int8"), "dtype"),
            (("--device", "nowhere"), "nowhere"),
            (("--device", "meta"), "meta"),
            (("--tokens", "1000000000000"), "tokens"),
        ],
    )
    def test_refuses(self, options, named):
        result = run("bench", *self.SMALL, *options)
        assert result.exit_code == 2
        assert named in result.stderr


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_extra_is_named(missing):
    """In a fresh process where the package cannot be imported: one line that says what to install, no traceback."""
    code = f"import sys; sys.modules[{missing!r}] = None; from race_attention.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "race-attention[cli]" in done.stderr
    assert "Traceback" not in done.stderr


class TestAutotune:
    @pytest.mark.skipif(importlib.import_module("torch").cuda.is_available(), reason="there is a GPU to tune for")
    def test_needs_a_gpu_and_says_so(self):
        pytest.importorskip("triton")
        result = run("autotune")
        assert result.exit_code == 2
        assert "GPU" in result.output

    def test_refuses_other_dtypes(self):
        result = run("autotune", "--dtype", "float64")
        assert result.exit_code == 2
        assert "bfloat16" in result.output
