"""Works through a queue of runs within a time limit, several at once: ``python -m experiments.gpu_batch``.

The queue, ``configs/queue.toml``, lists configuration files with rows and seeds, the most valuable first. Runs whose
result exists are skipped, so that a later call goes on where the last one ended. Small models leave a large GPU
idle between kernels; ``--jobs`` runs share it. With ``--bundle`` all results go into one file, which ``--unbundle``
puts back where they belong, for machines that keep nothing.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import config as configuration
from experiments.config import ConfigError, check
from experiments.run import RunConfig, read_rows, result_path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "experiments" / "configs"


@dataclass(frozen=True)
class Job:
    """One run of the queue."""

    file: Path
    row: str
    seed: int
    config: RunConfig


@dataclass
class Running:
    """A job and its process."""

    job: Job
    process: subprocess.Popen[bytes]
    started: float


def read_queue(path: Path) -> list[Job]:
    """The jobs of a queue file, in its order, each once.

    Raises:
        ConfigError: naming the entry and the key.
    """
    data = configuration.read(path)
    entries = data.get("runs")
    check(isinstance(entries, list) and bool(entries), "runs", entries, "a list of [[runs]]")
    assert isinstance(entries, list)
    jobs: dict[tuple[str, str, int], Job] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"runs[{number}]"
        unknown = set(entry) - {"config", "rows", "seeds"}
        check(not unknown and "config" in entry, where, sorted(entry), "config, and rows and seeds if not all and 0")
        file = path.parent / entry["config"]
        rows = read_rows(file)
        for seed in entry.get("seeds", [0]):
            for row in entry.get("rows", rows):
                check(row in rows, f"{where}.rows", row, "one of " + ", ".join(rows))
                jobs.setdefault((entry["config"], row, seed), Job(file, row, seed, rows[row]))
    return list(jobs.values())


class Batch:
    """Runs jobs as processes of their own.

    Args:
        results, work, logs: folders for results, checkpoints and output.
        data_dir: folder of local data.
        seconds: after which no job goes on; jobs that then run save a checkpoint and stop.
        jobs: processes at once.
        device: "auto" or a device of torch.
    """

    def __init__(
        self, *, results: Path, work: Path, logs: Path, data_dir: str | None, seconds: float, jobs: int, device: str
    ) -> None:
        self.results, self.work, self.logs = (folder.absolute() for folder in (results, work, logs))
        self.data_dir, self.jobs, self.device = data_dir, jobs, device
        self.end = time.monotonic() + seconds
        self.durations: dict[str, list[float]] = {}  # of finished jobs, by table
        self.failed: list[Job] = []

    def run(self, queue: Sequence[Job]) -> tuple[int, int]:
        """Works through the queue; returns how many jobs finished and how many are left."""
        waiting = [job for job in queue if not self._result(job).exists()]
        running: list[Running] = []
        done = 0
        while running or waiting:
            for one in [r for r in running if r.process.poll() is not None]:
                running.remove(one)
                done += self._ended(one)
            job = next((job for job in waiting if self._fits(job)), None)
            if job is not None and len(running) < self.jobs:
                waiting.remove(job)
                running.append(self._start(job))
            elif running:
                time.sleep(0.2)
            else:
                break
        return done, sum(not self._result(job).exists() for job in queue)

    def _result(self, job: Job) -> Path:
        return result_path(self.results, job.config, job.seed)

    def _fits(self, job: Job) -> bool:
        """Whether time is left for it, as far as finished jobs of its table tell."""
        known = self.durations.get(job.config.table)
        left = self.end - time.monotonic()
        return left > (statistics.median(known) if known else 30.0)

    def _start(self, job: Job) -> Running:
        self.logs.mkdir(parents=True, exist_ok=True)
        left = max(10.0, self.end - time.monotonic() - 15.0)  # to load before, and to save after
        command = [
            sys.executable,
            "-m",
            "experiments.run",
            str(job.file.absolute()),
            "--row",
            job.row,
            "--seed",
            str(job.seed),
        ]
        command += ["--results", str(self.results), "--work", str(self.work), "--device", self.device]
        command += ["--max-seconds", str(left), *(["--data-dir", self.data_dir] if self.data_dir else [])]
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with open(self._log(job), "wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        return Running(job, process, time.monotonic())

    def _log(self, job: Job) -> Path:
        return self.logs / f"{job.config.table}-{job.row}-{job.seed}.log"

    def _ended(self, one: Running) -> int:
        seconds, job = time.monotonic() - one.started, one.job
        lines = self._log(job).read_text(errors="replace").strip().splitlines()
        good = self._result(job).exists()
        if good:
            self.durations.setdefault(job.config.table, []).append(seconds)
        else:
            self.failed.append(job)
        state = "done" if good else f"exit {one.process.returncode}"
        print(
            f"{seconds:6.0f} s  {state}  {job.config.table}/{job.row}/{job.seed}  {lines[-1] if lines else ''}",
            flush=True,
        )
        return int(good)


def bundle(results: Path, path: Path) -> int:
    """All results below ``results`` as one .tar.gz; returns how many."""
    files = sorted(results.rglob("seed-*.json"))
    with tarfile.open(path, "w:gz") as tar:
        for file in files:
            tar.add(file, arcname=file.relative_to(results).as_posix())
    return len(files)


def unbundle(path: Path, results: Path) -> int:
    """Puts the results of a bundle below ``results``; returns how many.

    Raises:
        ConfigError: a member that is no result.
    """
    count = 0
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
        for member in tar.getmembers():
            parts = Path(member.name).parts
            fits = len(parts) == 3 and ".." not in parts and member.isfile() and parts[2].startswith("seed-")
            check(fits, "bundle", member.name, "TABLE/ROW/seed-N.json")
            target = results.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None
            target.write_bytes(content.read())
            count += 1
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu_batch", description=__doc__)
    parser.add_argument("--queue", type=Path, default=CONFIGS / "queue.toml")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all of it")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--data-dir", help="folder of local data sets; default the environment variable RACE_DATA_DIR")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"))
    parser.add_argument("--work", type=Path, default=Path("runs"))
    parser.add_argument("--bundle", type=Path, help="a .tar.gz for all results, written at the end")
    parser.add_argument("--unbundle", type=Path, help="puts the results of a bundle in place and does nothing else")
    parser.add_argument("--list", action="store_true", help="shows what is left to do and does nothing else")
    given = parser.parse_args(arguments)
    try:
        if given.unbundle:
            print(f"{unbundle(given.unbundle, given.results)} results in {given.results}")
            return
        queue = read_queue(given.queue)
    except (ConfigError, OSError, tarfile.TarError) as error:
        parser.exit(2, f"error: {error}\n")
    if given.list:
        for job in queue:
            if not result_path(given.results, job.config, job.seed).exists():
                print(f"{job.config.table}/{job.row}/{job.seed}")
        return
    batch = Batch(
        results=given.results,
        work=given.work,
        logs=given.work / "logs",
        data_dir=str(Path(given.data_dir).absolute()) if given.data_dir else None,
        seconds=given.seconds,
        jobs=given.jobs,
        device=given.device,
    )
    done, left = batch.run(queue)
    print(f"{done} runs done, {left} left, {len(batch.failed)} stopped or failed")
    if given.bundle:
        print(f"{bundle(given.results, given.bundle)} results in {given.bundle}")


if __name__ == "__main__":
    main()
