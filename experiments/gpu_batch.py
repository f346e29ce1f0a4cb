"""Works through a queue of runs within a time limit, several at once: ``python -m experiments.gpu_batch``.

The queue, ``configs/queue.toml``, lists configuration files with rows and seeds, the most valuable first. Runs whose
result exists are skipped, so that a later call goes on where the last one ended. Small models leave a large GPU
idle between kernels; ``--jobs`` runs share it. With ``--bundle`` all results go into one file, which ``--unbundle``
puts back where they belong, for machines that keep nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments import config as configuration
from experiments.config import ConfigError, check
from experiments.run import OutOfTime, Run, read_rows
from race_attention.state import write_atomically

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "experiments" / "configs"


@dataclass(frozen=True)
class Job:
    """One run of the queue.

    Attributes:
        file: the configuration.
        table: of the results.
        rows: the row; or, for a finalist, all rows of a search, of which the best takes part once all are done.
        seed: of the run.
        seconds: that it is thought to take, if the queue says so.
    """

    file: Path
    table: str
    rows: tuple[str, ...]
    seed: int
    seconds: float | None = None

    def row(self, results: Path) -> str | None:
        """The row to run; None while its search is not done, or nothing of it succeeded."""
        if len(self.rows) == 1:
            return self.rows[0]
        found = []
        for row in self.rows:
            path = results / self.table / row / "seed-0.json"
            if not path.exists():
                return None
            result = json.loads(path.read_text())
            if not result["error"]:
                found.append((result["best"]["valid"] * (1 if result["higher_is_better"] else -1), row))
        return max(found, key=lambda one: one[0])[1] if found else None  # of equals the first

    def result(self, results: Path) -> Path | None:
        """Where its result lies, if its row is known."""
        row = self.row(results)
        return None if row is None else results / self.table / row / f"seed-{self.seed}.json"

    def __str__(self) -> str:
        row = self.rows[0] if len(self.rows) == 1 else self.rows[0].partition("@")[0] + "@best"
        return f"{self.table}/{row}/{self.seed}"


def read_queue(path: Path) -> list[Job]:
    """The jobs of a queue file, in its order, each once.

    An entry names a configuration, rows (a name without its ``@`` part stands for its whole search; default all),
    seeds, and ``best = true`` for the finalists: the best row of each search, judged by seed 0, with more seeds. With
    ``seconds`` its jobs start only while so much time is left.

    Raises:
        ConfigError: naming the entry and the key.
    """
    data = configuration.read(path)
    entries = data.get("runs")
    check(isinstance(entries, list) and bool(entries), "runs", entries, "a list of [[runs]]")
    assert isinstance(entries, list)
    jobs: dict[tuple[str, tuple[str, ...], int], Job] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"runs[{number}]"
        unknown = set(entry) - {"config", "rows", "seeds", "best", "seconds"}
        check(not unknown and "config" in entry, where, sorted(entry), "config, and rows, seeds, best, seconds")
        file = path.parent / entry["config"]
        rows = read_rows(file)
        table = next(iter(rows.values())).table
        methods = list(dict.fromkeys(row.partition("@")[0] for row in rows))
        for seed in entry.get("seeds", [0]):
            for name in entry.get("rows", methods):
                group = tuple(row for row in rows if name in (row, row.partition("@")[0]))
                check(bool(group), f"{where}.rows", name, "one of " + ", ".join(rows))
                for chosen in [group] if entry.get("best") else [(row,) for row in group]:
                    jobs.setdefault(
                        (entry["config"], chosen, seed), Job(file, table, chosen, seed, entry.get("seconds"))
                    )
    return list(jobs.values())


class Worker:
    """A process that runs one job after another, so that Python, torch and the GPU's context start once.

    Args:
        threads: of torch on the CPU.
    """

    def __init__(self, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "experiments.gpu_batch", "--worker"]
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


class Batch:
    """Runs jobs, several at once.

    Args:
        results, work, logs: folders for results, checkpoints and output.
        data_dir: folder of local data.
        seconds: after which no job goes on; jobs that then run save a checkpoint and stop.
        jobs: processes at once.
        device: "auto" or a device of torch.
        bundle_to: a .tar.gz of all results, renewed after every job.
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
        bundle_to: Path | None = None,
    ) -> None:
        self.results, self.work, self.logs = (folder.absolute() for folder in (results, work, logs))
        self.data_dir, self.jobs, self.device, self.bundle_to = data_dir, jobs, device, bundle_to
        self.end = time.monotonic() + seconds
        self.durations: dict[str, list[float]] = {}  # of finished jobs, by table
        self.failed: list[Job] = []
        self.waiting: list[Job] = []
        self.running = self.done = 0
        self.lock = threading.Lock()

    def run(self, queue: Sequence[Job]) -> tuple[int, int]:
        """Works through the queue; returns how many jobs finished and how many are left."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self.waiting = [job for job in queue if not self._is_done(job)]
        threads = [threading.Thread(target=self._work) for _ in range(min(self.jobs, max(1, len(self.waiting))))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.done, sum(not self._is_done(job) for job in queue)

    def _is_done(self, job: Job) -> bool:
        path = job.result(self.results)
        return path is not None and path.exists()

    def _work(self) -> None:
        """One of the threads: takes jobs and has its worker run them."""
        worker: Worker | None = None
        while True:
            with self.lock:
                job = next((job for job in self.waiting if self._fits(job)), None)
                if job is None and not self.running:
                    break
                if job is not None:
                    self.waiting.remove(job)
                    self.running += 1
            if job is None:
                time.sleep(0.2)  # a job that runs may be what another waits for
                continue
            if worker is None or not worker.alive:
                worker = Worker(max(1, (os.cpu_count() or 1) // self.jobs))
            start = time.monotonic()
            said = worker.run(self._request(job))
            with self.lock:
                self.running -= 1
                self._ended(job, time.monotonic() - start, said)
        if worker is not None:
            worker.close()

    def _fits(self, job: Job) -> bool:
        """Whether it can run and time is left for it, as far as finished jobs of its table tell."""
        known = self.durations.get(job.table)
        needed = job.seconds or (1.1 * statistics.median(known) if known else 30.0)
        return self.end - time.monotonic() > needed and job.row(self.results) is not None and not self._is_done(job)

    def _request(self, job: Job) -> dict[str, Any]:
        left = max(10.0, self.end - time.monotonic() - 5.0)  # a checkpoint takes time too
        return {
            "file": str(job.file.absolute()),
            "row": job.row(self.results),
            "seed": job.seed,
            "data_dir": self.data_dir,
            "device": self.device,
            "results": str(self.results),
            "work": str(self.work),
            "log": str(self.logs / f"{str(job).replace('/', '-')}.log"),
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
        if self.bundle_to is not None:
            bundle(self.results, self.bundle_to)


def bundle(results: Path, path: Path) -> int:
    """All results below ``results`` as one .tar.gz; returns how many."""
    files = sorted(results.rglob("seed-*.json"))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for file in files:
            tar.add(file, arcname=file.relative_to(results).as_posix())
    write_atomically(path, packed.getvalue())
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
    parser.add_argument("--bundle", type=Path, help="a .tar.gz for all results, renewed after every run")
    parser.add_argument("--worker", action="store_true", help="for internal use: runs jobs from standard input")
    parser.add_argument("--unbundle", type=Path, help="puts the results of a bundle in place and does nothing else")
    parser.add_argument("--list", action="store_true", help="shows what is left to do and does nothing else")
    given = parser.parse_args(arguments)
    if given.worker:
        work()
        return
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
        device=given.device,
        bundle_to=given.bundle,
    )
    done, left = batch.run(queue)
    print(f"{done} runs done, {left} left, {len(batch.failed)} stopped or failed")


if __name__ == "__main__":
    main()
