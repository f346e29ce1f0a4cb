"""Runs one row of a table: ``python -m experiments.run experiments/configs/ptb.toml --row race-3x3-all --seed 0``.

A configuration file states what all rows of a table share, and under ``[rows.NAME]`` what differs. The result, one
JSON file a seed, holds all that :mod:`experiments.tables` needs. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import resource
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import checkpoint
from experiments.baselines.race import RaceMixer
from experiments.config import ConfigError
from experiments.models.blocks import count_parameters
from experiments.optim import lr_factor, make_adamw, set_lr
from experiments.report import Bar, machine
from experiments.rows import RunConfig, different, read_rows, rows_named
from experiments.step import TrainStep
from experiments.tasks import make_task
from experiments.train import pick_device
from race_attention.state import write_atomically


class OutOfTime(Exception):
    """The time given to a run is over; its checkpoint waits."""


class Run:
    """One row with one seed.

    Args:
        config: the row.
        seed: of weights, hashes and the order of the data.
        data_dir: folder of local data.
        device: "auto" or a device of torch.
        results: folder for ``table/row/seed-N.json``.
        work: folder for checkpoints.
        quiet: shows no progress.
        keep_compiled: uses what an earlier run of this method has compiled in this process.

    Attributes:
        together: runs that share this process and take turns with it (:mod:`experiments.together`), with this one.
        peak_gb: of memory, where others' tensors count in what the device says; else None.
    """

    def __init__(
        self,
        config: RunConfig,
        seed: int,
        *,
        data_dir: str | None = None,
        device: str = "auto",
        results: Path = Path("experiments/results"),
        work: Path = Path("runs"),
        quiet: bool = False,
        keep_compiled: bool = False,
    ) -> None:
        self.config, self.seed, self.quiet = config, seed, quiet
        self.device = pick_device(device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.result_path = result_path(results, config, seed)
        self.checkpoint_path = work / config.table / config.row / f"seed-{seed}.safetensors"
        self.task = make_task(config.task, config.task_options, data_dir=data_dir, device=self.device, seed=seed)
        torch.manual_seed(seed)
        self.model = self.task.make_model(config.model, seed).to(self.device)
        self.optimiser = make_adamw(
            self.model, lr=config.lr, weight_decay=config.weight_decay, betas=(config.beta1, config.beta2)
        )
        self.train_step = TrainStep(
            self.task,
            self.model,
            self.optimiser,
            config.clip,
            config.precision,
            graph=config.graph,
            compiled=config.compile,
            keep_compiled=keep_compiled,
        )
        self.together, self.peak_gb = 1, None  # type: int, float | None
        self.epoch = self.task.steps_per_epoch(config.batch)
        self.steps = config.steps or max(1, round(self.epoch * (config.epochs or 1)))
        self.eval_every = config.eval_every or max(self.epoch, -(-self.steps // 20))
        self.step, self.seconds, self.curve = 0, 0.0, list[dict[str, Any]]()

    def train(self, max_seconds: float = math.inf) -> dict[str, Any]:
        """Trains to the end, writes the result and returns it.

        Raises:
            OutOfTime: after ``max_seconds``; the next call of a new Run goes on from the checkpoint.
        """
        steps = self.progress(max_seconds)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                result: dict[str, Any] = end.value
                return result

    def progress(self, max_seconds: float = math.inf) -> Generator[None, None, dict[str, Any]]:
        """As :meth:`train`, which it returns the result of, with a pause after each step."""
        begin = saved = time.monotonic()
        self._resume()
        losses: list[Tensor] = []
        with Bar(f"{self.config.table}/{self.config.row}/{self.seed}", quiet=self.quiet, every=30) as bar:
            start = time.monotonic()
            while self.step < self.steps:
                try:
                    losses.append(self._step())
                except ValueError as error:  # layers refuse parameters that are not finite
                    if all(bool(p.isfinite().all()) for p in self.model.parameters()):
                        raise
                    return self._finish(f"diverged before step {self.step + 1}: {error}"[:200])
                due = self.step % self.eval_every == 0 or self.step == self.steps
                if due or self.step % 50 == 0:
                    loss = float(torch.stack(losses).mean())  # waits for the device
                    now = time.monotonic()
                    self.seconds += now - start
                    start = now
                    if not math.isfinite(loss):
                        return self._finish(f"diverged: the loss is {loss} before step {self.step}")
                    if due:
                        losses.clear()
                        start = self._evaluate(loss)
                    left = self.seconds / self.step * (self.steps - self.step)
                    bar.update(self.step / self.steps, left, loss=f"{loss:.4f}")
                    if now - begin > max_seconds and self.step < self.steps:
                        self._save()
                        raise OutOfTime(f"{self.step} of {self.steps} steps after {max_seconds:.0f} s")
                    if self.config.checkpoint_every and now - saved > self.config.checkpoint_every:
                        self._save()
                        saved = time.monotonic()
                yield
        return self._finish(None)

    def _step(self) -> Tensor:
        config = self.config
        set_lr(self.optimiser, config.lr * lr_factor((self.step + 1) / self.steps, config.warmup, config.lr_floor))
        self.model.train()
        loss = self.train_step(self.task.batch(self.step, config.batch))
        self.step += 1
        return loss

    def _evaluate(self, loss: float) -> float:
        """Adds a point to the curve; returns the time, as evaluation does not count as training."""
        with self.train_step.autocast(), torch.compiler.set_stance("force_eager"):
            scores = self.task.evaluate(self.model, self.config.eval_batch)
        self.curve.append({"step": self.step, "seconds": round(self.seconds, 3), "train_loss": loss} | scores)
        return time.monotonic()

    def _resume(self) -> None:
        if not self.checkpoint_path.exists():
            return
        progress = checkpoint.load(self.checkpoint_path, self.model, self.optimiser)
        mine = json.loads(json.dumps(dataclasses.asdict(self.config)))
        if progress["config"] != mine:
            raise ConfigError(f"{self.checkpoint_path}: got a run of another configuration; remove it to start anew")
        self.step, self.seconds, self.curve = progress["step"], progress["seconds"], progress["curve"]

    def _save(self) -> None:
        self.checkpoint_path.parent.mkdir(parents=True, exist_ok=True)
        progress = {"step": self.step, "seconds": self.seconds, "curve": self.curve}
        progress["config"] = dataclasses.asdict(self.config)
        checkpoint.save(self.checkpoint_path, self.model, self.optimiser, progress)

    def backend(self) -> str | None:
        """The library's backend that the model's layers run on; None for a model without any."""
        layer = next((m for m in self.model.modules() if isinstance(m, RaceMixer)), None)
        if layer is None:
            return None
        return layer.backend(torch.bfloat16 if self.config.precision == "bfloat16" else torch.float32)

    def _finish(self, error: str | None) -> dict[str, Any]:
        better = max if self.task.higher_is_better else min
        best = better(self.curve, key=lambda point: point["valid"]) if self.curve else None
        result = {
            "config": dataclasses.asdict(self.config),
            "seed": self.seed,
            "machine": machine() | {"device": str(self.device)},
            "data_sha256": self.task.data_sha256,
            "backend": self.backend(),
            "graph": self.train_step.graph_state,
            "compile": self.train_step.compile_state,
            "parameters": count_parameters(self.model),
            "metric": self.task.metric,
            "higher_is_better": self.task.higher_is_better,
            "steps": self.step,
            "seconds": round(self.seconds, 3),
            "seconds_per_epoch": round(self.seconds / max(1, self.step) * self.epoch, 3),
            "peak_memory_gb": peak_memory_gb(self.device) if self.peak_gb is None else self.peak_gb,
            "together": self.together,
            "best": best,
            "final": self.curve[-1] if self.curve else None,
            "error": error,
            "curve": self.curve,
        }
        self.result_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.result_path, (json.dumps(result, indent=1) + "\n").encode())
        self.checkpoint_path.unlink(missing_ok=True)
        return result


def result_path(results: Path, config: RunConfig, seed: int) -> Path:
    """Where the result of a run lies."""
    return results / config.table / config.row / f"seed-{seed}.json"


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that tensors took since the start of the run; on a CPU, of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e9 if sys.platform == "darwin" else 1e6), 3)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.run", description=__doc__)
    parser.add_argument("config", help="a .toml or .json file with [rows.NAME]")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every row, for example epochs=1")
    parser.add_argument("--row", action="append", help="rows to run, NAME@lr=0.001, or NAME for all of its search")
    parser.add_argument("--seed", type=int, action="append", help="seeds to run; default 0")
    parser.add_argument("--data-dir", help="folder of local data sets; default the environment variable RACE_DATA_DIR")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"))
    parser.add_argument("--work", type=Path, default=Path("runs"), help="folder for checkpoints")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="of each run; then it waits to be resumed")
    parser.add_argument("--fresh", action="store_true", help="runs again what has a result")
    given = parser.parse_intermixed_args(arguments)
    try:
        rows = read_rows(given.config, given.overrides)
        chosen = [row for name in given.row for row in rows_named(rows, name)] if given.row else list(rows)
        for row in dict.fromkeys(chosen):
            for seed in given.seed or [0]:
                run_one(rows[row], seed, given)
    except (ConfigError, FileNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")
    except OutOfTime as error:
        parser.exit(3, f"out of time: {error}\n")


def run_one(config: RunConfig, seed: int, given: argparse.Namespace) -> None:
    """Runs a row with a seed unless its result is there, and says what came of it.

    Raises:
        ConfigError: the result that is there has other settings.
    """
    path = result_path(given.results, config, seed)
    if path.exists() and not given.fresh:
        other = different(json.loads(path.read_text())["config"], json.loads(json.dumps(dataclasses.asdict(config))))
        if other:
            raise ConfigError(
                f"{path}: there is a result with other settings ({', '.join(other)}); "
                "keep it and write elsewhere with --results, or replace it with --fresh"
            )
        print(f"{path}: done before")
        return
    run = Run(config, seed, data_dir=given.data_dir, device=given.device, results=given.results, work=given.work)
    result = run.train(given.max_seconds)
    print(f"{path}: {result['error'] or result['best']}")


if __name__ == "__main__":
    main()
