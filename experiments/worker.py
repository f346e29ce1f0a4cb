"""A process that runs one job after another, for :mod:`experiments.gpu_batch`: ``python -m experiments.worker``."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from experiments.run import OutOfTime, Run, read_rows

ROOT = Path(__file__).resolve().parents[1]


class Worker:
    """A process that runs one job after another, so that Python, torch and the GPU's context start once.

    Args:
        threads: of torch on the CPU.
        environment: of the process; default this one's.
    """

    def __init__(self, threads: int, environment: Mapping[str, str] = os.environ) -> None:
        environment = dict(environment) | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "experiments.worker"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, request: dict[str, Any]) -> str:
        """Runs a job to its end and returns what came of it; a dead worker says so."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            reply = self.process.stdout.readline()
        except OSError:
            reply = ""
        return str(json.loads(reply)) if reply else f"the process died, exit {self.process.wait()}"

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def work() -> None:
    """What a :class:`Worker`'s process does: jobs from its input, a line of output for each."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    for line in sys.stdin:
        request = json.loads(line)
        with open(request["log"], "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            said = _run_one(request)
            _forget()
            print(json.dumps(said), file=replies, flush=True)


def _run_one(request: dict[str, Any]) -> str:
    try:
        config = read_rows(request["file"])[request["row"]]
        run = Run(
            config,
            request["seed"],
            data_dir=request["data_dir"],
            device=request["device"],
            results=Path(request["results"]),
            work=Path(request["work"]),
        )
        result = run.train(request["stop_at"] - time.time())  # making the model took some of it
        return str(result["error"] or result["best"])
    except OutOfTime as error:
        return f"out of time: {error}"
    except Exception as error:  # whatever it is: the other jobs go on
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"


def _forget() -> None:
    """Frees what a run left, so that the next one's peak of memory is its own."""
    if torch.cuda.is_available():
        torch._dynamo.reset()  # compiled code holds the model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    work()
