"""The kernels' types, on a machine without a GPU: the interpreter does not look at them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interpreter import INTERPRETED

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")
def test_every_kernel_compiles_to_intermediate_code():
    """In a process of its own, where nothing has been compiled, or decided, for a GPU that is there."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.lowered"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert int(done.stdout.split()[-5]) > 150
