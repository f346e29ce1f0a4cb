"""A process that runs jobs for :mod:`experiments.gpu_batch`, request by request: ``python -m experiments.worker``."""

from __future__ import annotations

import contextlib
import functools
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

from experiments.rows import read_rows
from experiments.run import OutOfTime, Run
from experiments.together import Outcome, train_together

#: How what is said of a job begins that was stopped and left a checkpoint.
OUT_OF_TIME = "out of time"

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

    def run(self, request: dict[str, Any]) -> list[str]:
        """Runs the jobs of a request to their ends and returns what came of each; a dead worker says so."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            reply = self.process.stdout.readline()
        except OSError:
            reply = ""
        if reply:
            return [str(said) for said in json.loads(reply)]
        return [f"the process died, exit {self.process.wait()}"] * len(request["runs"])

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def work() -> None:
    """What a :class:`Worker`'s process does: requests from its input, a line of output for each."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    for line in sys.stdin:
        request = json.loads(line)
        with open(request["log"], "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            said = _run_all(request)
            with contextlib.suppress(RuntimeError):  # of a GPU that an error has left unusable
                _forget()
            print(json.dumps(said), file=replies, flush=True)
        if any("CUDA error" in words for words in said):
            break  # after one, all that this process does on the GPU fails


def _run_all(request: dict[str, Any]) -> list[str]:
    makes = [functools.partial(_make, request, row, seed) for row, seed in request["runs"]]
    if len(makes) > 1:
        return [_said(outcome) for outcome in train_together(makes, request["stop_at"])]
    try:
        run = makes[0](keep_compiled=False)
        return [_said(run.train(request["stop_at"] - time.time()))]  # making the model took some of it
    except Exception as error:  # whatever it is: the other jobs go on
        traceback.print_exc()
        return [_said(error)]


def _make(request: dict[str, Any], row: str, seed: int, keep_compiled: bool) -> Run:
    return Run(
        read_rows(request["file"])[row],
        seed,
        data_dir=request["data_dir"],
        device=request["device"],
        results=Path(request["results"]),
        work=Path(request["work"]),
        keep_compiled=keep_compiled,
    )


def _said(outcome: Outcome) -> str:
    if isinstance(outcome, OutOfTime):
        return f"{OUT_OF_TIME}: {outcome}"
    if isinstance(outcome, Exception):
        return f"{type(outcome).__name__}: {outcome}"
    return str(outcome["error"] or outcome["best"])


def _forget() -> None:
    """Frees what a run left, so that the next one's peak of memory is its own."""
    if torch.cuda.is_available():
        torch._dynamo.reset()  # compiled code holds the model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    work()
