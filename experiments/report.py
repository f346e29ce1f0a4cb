"""What a run says while it runs: a progress bar, metrics as JSON lines, TensorBoard on request; and on what machine."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from race_attention.state import write_atomically


def machine() -> dict[str, Any]:
    """The machine, the versions and the date, for result files."""
    import race_attention

    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "race_attention": getattr(race_attention, "__version__", "unknown"),
        "commit": commit(),
        "source_sha256": source_digest(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def source_digest() -> str:
    """SHA-256 over the library's Python files and their names: which code ran, also where there is no git."""
    import race_attention

    root = Path(race_attention.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def commit() -> str | None:
    """The commit that RACE_COMMIT names (a copy's own git may lag behind its files), else the checkout's."""
    named = os.environ.get("RACE_COMMIT")
    if named:
        return named
    try:
        root = Path(__file__).resolve().parent
        run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None


class Metrics:
    """Records as JSON lines, one a step, optionally mirrored to TensorBoard.

    Args:
        folder: where ``metrics.jsonl`` lies.
        resume_at: keeps the records before this step and drops the rest, which a resumed run writes again.
        tensorboard: writes scalars to ``folder/tensorboard`` too; needs the tensorboard package.
    """

    def __init__(self, folder: Path, *, resume_at: int = 0, tensorboard: bool = False) -> None:
        path = folder / "metrics.jsonl"
        kept = [r for r in read_metrics(path) if r["step"] <= resume_at] if resume_at and path.exists() else []
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("tensorboard: true needs the package, pip install tensorboard") from error
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at + 1)

    def write(self, record: dict[str, Any]) -> None:
        """One record with its ``step``; on the disk when this returns, short of a crash of the machine."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in record.items():
                if key != "step":
                    self._board.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that a kill cut short is dropped."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class Bar:
    """A progress bar with loss, tokens a second and time left; plain lines now and then where there is no terminal.

    Args:
        title: before the bar.
        quiet: shows nothing.
        every: seconds between lines without a terminal.
    """

    def __init__(self, title: str, *, quiet: bool = False, every: float = 15.0) -> None:
        self.title, self.quiet, self.every = title, quiet, every
        self.console = Console(quiet=quiet)
        self._live = self.console.is_terminal and not quiet
        self._said = time.monotonic()
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}")
        self._progress = Progress(*columns, console=self.console, disable=not self._live)
        self._task = self._progress.add_task(title, total=1.0, note="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, fraction: float, seconds_left: float, **numbers: str) -> None:
        """Shows ``fraction`` done, the time left and any numbers, given as text."""
        note = "  ".join(f"{key.replace('_', ' ')} {value}" for key, value in numbers.items())
        note += f"  {_duration(seconds_left)} left"
        self._progress.update(self._task, completed=fraction, note=note)
        if not self._live and not self.quiet and (time.monotonic() - self._said > self.every or fraction >= 1):
            self._said = time.monotonic()
            self.console.print(f"{self.title} {fraction:4.0%}  {note}", highlight=False)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
