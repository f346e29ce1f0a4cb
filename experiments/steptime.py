"""Times a training step of every row of a table, alone on the device: ``python -m experiments.steptime TABLE.toml``.

Runs of a batch share a GPU, so their own times say little about methods. Here one model at a time takes steps as
:mod:`experiments.run` does (recorded as a CUDA graph where that works), and the median goes into ``speed.json``
beside the results of the table. Most of the time goes into compiling: with ``--at-once`` several rows get ready in as
many processes, which then wait while one after the other takes its steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.config import ConfigError, check
from experiments.report import machine
from experiments.rows import RunConfig, read_rows
from experiments.run import Run, peak_memory_gb
from race_attention.state import write_atomically

#: Seconds that processes wait for the slowest of them to get ready.
PATIENCE = 300.0


@dataclass(frozen=True)
class Timed:
    """What was found of a row: milliseconds of a step, peak of memory in GB; or why not."""

    config: RunConfig
    milliseconds: float = 0.0
    memory_gb: float = 0.0
    machine: dict[str, Any] | None = None
    error: str = ""


def measure(
    config: RunConfig, *, data_dir: str | None, device: str, repeats: int = 5, steps: int = 10
) -> tuple[float, float]:
    """Milliseconds a step takes, the median over ``repeats`` of the mean of ``steps``; and the peak of memory in GB."""
    return prepared(config, data_dir=data_dir, device=device, steps=steps)(repeats)


def prepared(
    config: RunConfig, *, data_dir: str | None, device: str, steps: int = 10
) -> Callable[[int], tuple[float, float]]:
    """Compiles and records a row's step; what is returned measures it, as :func:`measure` says, given ``repeats``."""
    run = Run(config, 0, data_dir=data_dir, device=device, quiet=True)
    run.model.train()
    batches = [run.task.batch(i, config.batch) for i in range(steps)]

    def once() -> float:
        _wait(run.device)
        start = time.perf_counter()
        for batch in batches:
            run.train_step(batch)
        _wait(run.device)
        return (time.perf_counter() - start) / steps * 1e3

    once()
    return lambda repeats: (statistics.median(once() for _ in range(repeats)), peak_memory_gb(run.device))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget() -> None:
    """Frees what a row left, so that the next one's peak of memory is its own."""
    if torch.cuda.is_available():
        torch._dynamo.reset()  # compiled code holds the model
        gc.collect()
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.steptime", description=__doc__)
    parser.add_argument("config", nargs="+")
    parser.add_argument("--row", action="append", help="methods to time; default all")
    parser.add_argument("--at-once", type=int, default=1, help="rows that get ready at once, in as many processes")
    parser.add_argument("--data-dir")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"))
    given = parser.parse_args(arguments)
    try:
        configs = [config for path in given.config for config in _chosen(path, given.row)]
        if given.at_once > 1:
            _time_side_by_side(configs, given)
            return
        for config in configs:
            _record(_timed(config, given.data_dir, given.device), given.results)
    except (ConfigError, FileNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")


def _chosen(path: str, names: Sequence[str] | None) -> list[RunConfig]:
    """A configuration of each method, in the order of the names, if there are some; its rate does not matter."""
    rows = {name.partition("@")[0]: row for name, row in reversed(read_rows(path).items())}
    chosen = [name for name in names or list(reversed(rows)) if name in rows]
    check(bool(chosen), "--row", names, "of " + ", ".join(rows))
    return [rows[name] for name in chosen]


def _timed(config: RunConfig, data_dir: str | None, device: str) -> Timed:
    try:
        milliseconds, memory = measure(config, data_dir=data_dir, device=device)
    except (ConfigError, torch.OutOfMemoryError) as error:  # a method that cannot run here
        return Timed(config, error=str(error))
    finally:
        _forget()
    return Timed(config, milliseconds, memory, machine())


def _record(timed: Timed, results: Path) -> None:
    """Adds a row to its table's ``speed.json``, or says why there is nothing to add."""
    name = timed.config.row.partition("@")[0]
    if timed.error:
        print(f"{timed.config.table}/{name}: {timed.error}", flush=True)
        return
    path = results / timed.config.table / "speed.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"milliseconds": {}}
    found["milliseconds"][name] = round(timed.milliseconds, 3)
    found.setdefault("memory_gb", {})[name] = timed.memory_gb
    found.setdefault("machines", {})[name] = timed.machine  # rows are timed at different times
    found.setdefault("machine", timed.machine)  # of rows without one of their own
    print(f"{timed.config.table}/{name}: {found['milliseconds'][name]} ms a step", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())


def _time_side_by_side(configs: Sequence[RunConfig], given: argparse.Namespace) -> None:
    """Rounds of ``given.at_once`` rows, each in a process that stays."""
    count = min(given.at_once, len(configs))
    context = multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    barrier, lock = context.Barrier(count), context.Lock()
    rounds = -(-len(configs) // count)
    shares = [[*configs[i::count], None][:rounds] for i in range(count)]  # the last round may have too few
    processes = [
        context.Process(target=_take_part, args=(share, given.data_dir, given.device, barrier, lock, found))
        for share in shares
    ]
    for process in processes:
        process.start()
    alive = True
    while alive:
        alive = any(process.is_alive() for process in processes)
        while not found.empty():
            _record(found.get(), given.results)
        time.sleep(0.1)
    if any(process.exitcode for process in processes):
        sys.exit("a process ended before its rows were timed; the reason is above")


def _take_part(
    share: Sequence[RunConfig | None], data_dir: str | None, device: str, barrier: Any, lock: Any, found: Any
) -> None:
    """A process: gets a row ready, waits for the others, takes its steps while they wait, and so on."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // barrier.parties))
    for config in share:
        ready: Callable[[int], tuple[float, float]] | None = None
        try:
            ready = None if config is None else prepared(config, data_dir=data_dir, device=device)
        except Exception as error:  # whatever it is: the others go on
            traceback.print_exc()
            found.put(Timed(config, error=f"{type(error).__name__}: {error}"[:300]))  # type: ignore[arg-type]
        barrier.wait(PATIENCE)
        if ready is not None and config is not None:
            with lock:
                milliseconds, memory = ready(5)
            found.put(Timed(config, milliseconds, memory, machine()))
        barrier.wait(PATIENCE)
        ready = None
        _forget()


if __name__ == "__main__":
    main()
