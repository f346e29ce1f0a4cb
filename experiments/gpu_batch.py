"""Works through a queue of runs within a time limit, several at once: ``python -m experiments.gpu_batch``.

The queue, ``configs/queue.toml``, lists configuration files with rows and seeds, the most valuable first. Runs whose
result exists are skipped, so that a later call goes on where the last one ended. Every GPU in ``CUDA_VISIBLE_DEVICES``
takes part and has ``--jobs`` processes, so that one compiles while another trains; a process goes on with the
method it has compiled as long as there are seeds or settings of it, and trains up to ``--together`` of them at a time
(:mod:`experiments.together`). With ``--time TABLE.toml:ROW:ROW`` the first GPU
times training steps before anything else runs on it. With ``--bundle`` all results go into one file, which
``--unbundle`` puts back where they belong, for machines that keep nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.bundle import bundle, unbundle
from experiments.config import ConfigError
from experiments.jobs import Job, read_queue
from experiments.rows import read_rows
from experiments.together import draws
from experiments.worker import OUT_OF_TIME, Worker

CONFIGS = Path(__file__).resolve().parent / "configs"


class Batch:
    """Runs jobs, several at once.

    Args:
        results, work, logs: folders for results, checkpoints and output.
        data_dir: folder of local data.
        seconds: after which no job goes on; jobs that then run save a checkpoint and stop.
        jobs: processes at once, on each GPU.
        together: runs of one method that a process trains at once.
        device: "auto" or a device of torch.
        gpus: as ``CUDA_VISIBLE_DEVICES`` names them, which each process sees one of; none for a machine without.
        bundle_to: a .tar.gz of all results, renewed after every job.
        time_tables: configurations whose steps are timed first, on the first GPU with nothing else on it; of all
            rows, or of those after colons.
    """

    def __init__(
        self,
        *,
        results: Path,
        work: Path,
        logs: Path,
        data_dir: str | None,
        seconds: float,
        jobs: int,
        device: str,
        together: int = 1,
        gpus: Sequence[str] = (),
        bundle_to: Path | None = None,
        time_tables: Sequence[str] = (),
    ) -> None:
        self.results, self.work, self.logs = (folder.absolute() for folder in (results, work, logs))
        self.data_dir, self.jobs, self.device, self.bundle_to = data_dir, jobs, device, bundle_to
        self.together = together
        self.gpus, self.time_tables = tuple(gpus), time_tables
        self.end = time.monotonic() + seconds
        self.durations: dict[str, list[float]] = {}  # of finished jobs, by table
        self.failed: list[Job] = []
        self.single: set[Job] = set()  # that failed beside others
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.done = 0
        self.lock = threading.Lock()
        self.timed = threading.Event()  # the first GPU is free

    def run(self, queue: Sequence[Job]) -> tuple[int, int]:
        """Works through the queue; returns how many jobs finished and how many are left."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self.waiting = [job for job in queue if not self._is_done(job)]
        places: list[str | None] = [gpu for _ in range(self.jobs) for gpu in self.gpus or (None,)]
        threads = [threading.Thread(target=self._work, args=(gpu,)) for gpu in places[: max(1, len(self.waiting))]]
        for thread in threads:
            thread.start()
        self._time_steps()
        for thread in threads:
            thread.join()
        return self.done, sum(not self._is_done(job) for job in queue)

    def _time_steps(self) -> None:
        """Steps of the given tables, alone on the first GPU."""
        given = [f"--device={self.device}", f"--results={self.results}"]
        given += [f"--data-dir={self.data_dir}"] if self.data_dir else []
        try:
            for table in self.time_tables:
                name, *rows = table.split(":")
                file = name if Path(name).exists() else str(CONFIGS / name)  # as the queue names them
                command = [
                    sys.executable,
                    "-m",
                    "experiments.steptime",
                    *given,
                    file,
                    *(f"--row={row}" for row in rows),
                ]
                left = max(1.0, self.end - time.monotonic())
                subprocess.run(command, env=self._environment(self._first), timeout=left, check=False)
                with self.lock:
                    self._bundle()
        except subprocess.TimeoutExpired as error:
            print(f"steps are not all timed: {error}", flush=True)
        finally:
            self.timed.set()

    @property
    def _first(self) -> str | None:
        return self.gpus[0] if self.gpus else None

    @staticmethod
    def _environment(gpu: str | None) -> dict[str, str]:
        return dict(os.environ) | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})

    def _is_done(self, job: Job) -> bool:
        path = job.result(self.results)
        return path is not None and path.exists()

    def _work(self, gpu: str | None) -> None:
        """One of the threads: takes jobs and has its worker, which sees one GPU, run them."""
        if gpu == self._first:
            self.timed.wait()
        worker: Worker | None = None
        last: Job | None = None
        while True:
            with self.lock:
                group = self._next_group(last)
                if not group and not self.running:
                    break
                for job in group:
                    self.waiting.remove(job)
                    self.running.append(job)
            if not group:
                time.sleep(0.2)  # a job that runs may be what another waits for
                continue
            if worker is None or not worker.alive:
                processes = self.jobs * max(1, len(self.gpus))
                worker = Worker(max(1, _cores() // processes), self._environment(gpu))
            start = time.monotonic()
            said = worker.run(self._request(group))
            last = group[0]
            with self.lock:
                for job, words in zip(group, said, strict=True):
                    self.running.remove(job)
                    self._ended(job, (time.monotonic() - start) / len(group), words)
                    if len(group) > 1 and job in self.failed and not words.startswith(OUT_OF_TIME):
                        self._again(job)
                self._bundle()
        if worker is not None:
            worker.close()

    def _again(self, job: Job) -> None:
        """Lets a job that failed beside others try once more by itself."""
        self.failed.remove(job)
        self.waiting.insert(0, job)
        self.single.add(job)

    def _next_group(self, last: Job | None) -> list[Job]:
        """The next job, and others of its method beside it while there is time: each takes half as long again."""
        first = self._next(last)
        if first is None:
            return []
        room = min(self.together, int(2 * (self.end - time.monotonic()) / self._needed(first)) - 1)
        if room < 2 or not self._shares(first):
            return [first]
        fitting = [job for job in self.waiting if job.method == first.method and self._fits(job) and self._shares(job)]
        group: dict[Path | None, Job] = {}
        for job in [first, *fitting]:
            group.setdefault(job.result(self.results), job)  # the best of a search is a setting of it too
        return list(group.values())[:room]

    def _shares(self, job: Job) -> bool:
        row = job.row(self.results)
        return row is not None and job not in self.single and not draws(read_rows(job.file)[row])

    def _next(self, last: Job | None) -> Job | None:
        """The first job of the method just run, which is compiled; else of one that no other process compiles now."""
        fitting = [job for job in self.waiting if self._fits(job)]
        same = (job for job in fitting if last is not None and job.method == last.method)
        taken = {job.method for job in self.running}
        untouched = (job for job in fitting if job.method not in taken)
        return next(same, None) or next(untouched, None) or next(iter(fitting), None)

    def _fits(self, job: Job) -> bool:
        """Whether it can run and time is left for it."""
        left = self.end - time.monotonic()
        return left > self._needed(job) and job.row(self.results) is not None and not self._is_done(job)

    def _needed(self, job: Job) -> float:
        """Seconds, as the queue says, or else finished jobs of its table tell."""
        known = self.durations.get(job.table)
        return job.seconds or (1.1 * statistics.median(known) if known else 30.0)

    def _request(self, group: Sequence[Job]) -> dict[str, Any]:
        left = max(10.0, self.end - time.monotonic() - 5.0)  # a checkpoint takes time too
        return {
            "file": str(group[0].file.absolute()),
            "runs": [(job.row(self.results), job.seed) for job in group],
            "data_dir": self.data_dir,
            "device": self.device,
            "results": str(self.results),
            "work": str(self.work),
            "log": str(self.logs / f"{str(group[0]).replace('/', '-')}.log"),
            "stop_at": time.time() + left,
        }

    def _ended(self, job: Job, seconds: float, said: str) -> None:
        good = self._is_done(job)
        if good:
            self.durations.setdefault(job.table, []).append(seconds)
            self.done += 1
        else:
            self.failed.append(job)
        print(f"{seconds:6.1f} s  {'done' if good else 'not done'}  {job}  {said[:300]}", flush=True)

    def _bundle(self) -> None:
        if self.bundle_to is not None:
            bundle(self.results, self.bundle_to)


def _cores() -> int:
    """That this process may use, where the system tells; else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES`` names, or without it every GPU."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu_batch", description=__doc__)
    parser.add_argument("--queue", type=Path, default=CONFIGS / "queue.toml")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all of it")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, on each GPU")
    parser.add_argument("--together", type=int, default=1, help="runs of one method that a process trains at once")
    parser.add_argument("--time", action="append", default=[], metavar="TABLE.toml:ROW", help="steps to time first")
    parser.add_argument("--data-dir", help="folder of local data sets; default the environment variable RACE_DATA_DIR")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"))
    parser.add_argument("--work", type=Path, default=Path("runs"))
    parser.add_argument("--bundle", type=Path, help="a .tar.gz for all results, renewed after every run")
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
            path = job.result(given.results)
            if path is None or not path.exists():
                print(job)
        return
    batch = Batch(
        results=given.results,
        work=given.work,
        logs=given.work / "logs",
        data_dir=str(Path(given.data_dir).absolute()) if given.data_dir else None,
        seconds=given.seconds,
        jobs=given.jobs,
        together=given.together,
        device=given.device,
        gpus=visible_gpus() if given.device == "auto" else (),
        bundle_to=given.bundle,
        time_tables=given.time,
    )
    done, left = batch.run(queue)
    print(f"{done} runs done, {left} left, {len(batch.failed)} stopped or failed")


if __name__ == "__main__":
    main()
