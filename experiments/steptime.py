"""Times a training step of every row of a table, alone on the device: ``python -m experiments.steptime TABLE.toml``.

Runs of a batch share a GPU, so their own times say little about methods. Here one model at a time takes steps as
:mod:`experiments.run` does (recorded as a CUDA graph where that works), and the median goes into ``speed.json``
beside the results of the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.config import ConfigError, check
from experiments.report import machine
from experiments.rows import RunConfig, read_rows
from experiments.run import Run, peak_memory_gb
from race_attention.state import write_atomically


def measure(
    config: RunConfig, *, data_dir: str | None, device: str, repeats: int = 5, steps: int = 10
) -> tuple[float, float]:
    """Milliseconds a step takes, the median over ``repeats`` of the mean of ``steps``; and the peak of memory in GB."""
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

    once()  # compiles, records the graph
    return statistics.median(once() for _ in range(repeats)), peak_memory_gb(run.device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.steptime", description=__doc__)
    parser.add_argument("config", nargs="+")
    parser.add_argument("--row", action="append", help="methods to time; default all")
    parser.add_argument("--data-dir")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"))
    given = parser.parse_args(arguments)
    try:
        for config in given.config:
            rows = {name.partition("@")[0]: row for name, row in reversed(read_rows(config).items())}
            names = [name for name in reversed(rows) if given.row is None or name in given.row]
            check(bool(names), "--row", given.row, "of " + ", ".join(rows))
            _time_table(rows, names, given)
    except (ConfigError, FileNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")


def _time_table(rows: dict[str, RunConfig], names: Sequence[str], given: argparse.Namespace) -> None:
    path = given.results / rows[names[0]].table / "speed.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"milliseconds": {}}
    for name in names:
        try:
            milliseconds, memory = measure(rows[name], data_dir=given.data_dir, device=given.device)
        except (ConfigError, torch.OutOfMemoryError) as error:  # a method that cannot run here
            print(f"{name}: {error}", flush=True)
            continue
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        found["milliseconds"][name] = round(milliseconds, 3)
        found.setdefault("memory_gb", {})[name] = memory
        found.setdefault("machines", {})[name] = machine()  # rows are timed at different times
        found.setdefault("machine", found["machines"][name])  # of rows without one of their own
        print(f"{rows[name].table}/{name}: {found['milliseconds'][name]} ms a step", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
