"""Trains a byte-level language model: ``python -m experiments.train config.toml [key=value ...] [--resume]``.

Everything lands in the folder ``out``: config.json, metrics.jsonl (a line a step), checkpoint.safetensors.
A run that was killed continues with ``--resume`` and gives the same losses, bit for bit on a CPU, as one that
was not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import checkpoint
from experiments import config as configuration
from experiments.config import ConfigError, check
from experiments.data import Text, WindowSampler, evaluation_windows, load_text
from experiments.models import DecoderLM, ModelConfig
from experiments.optim import lr_factor, make_adamw, set_lr
from experiments.report import Bar, Metrics, machine
from experiments.streamed import streamed_gradient, streamed_loss

BITS = 1 / math.log(2)  # bits of a nat
PROGRESS = ("step", "seconds", "windows", "bytes")  # how far a run is


@dataclass(frozen=True)
class TrainConfig:
    """A run of language modelling over bytes.

    Attributes:
        model: sizes and mixer.
        data: "stdlib", "novels", "shakespeare" or "file:PATH".
        data_dir: folder of local data; default the environment variable RACE_DATA_DIR.
        context: bytes a window, predicted in one piece.
        segment: bytes of a window in memory at a time, for contexts that do not fit; the gradient is the exact
            one of the whole window. Default the whole window. Mixer "race" only.
        grow_from, grow_until: with grow_from, windows begin at so many bytes and double in equal parts of the
            run up to ``context``, which they have from the fraction ``grow_until`` of the run on (Li et al.
            2022, arXiv 2108.06084): many cheap steps first.
        batch: windows a step.
        steps: optimiser steps; or None with ``seconds``.
        seconds: trains for so long instead, with the learning rate following the clock.
        least_steps: a timed run on a machine too busy to take so many steps in its time gets up to twice the time.
        lr, lr_floor, warmup: peak, its fraction at the end, and the fraction of the run spent rising.
        weight_decay, beta1, beta2, clip: AdamW's, and the norm that gradients are clipped to.
        seed: of weights, hyperplanes and the order of the data.
        precision: "float32", or "bfloat16" for autocast.
        device: "auto", "cpu", "cuda", ...
        out: folder of the run.
        eval_every: steps between held-out losses; 0 for one at the end only.
        eval_windows: held-out windows, spread evenly.
        checkpoint_every: steps between checkpoints; 0 for one at the end only.
        log_every: steps between looks at the losses, each of which waits for a GPU to finish.
        tensorboard: writes scalars for it too.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: str = "stdlib"
    data_dir: str | None = None
    context: int = 1024
    segment: int | None = None
    grow_from: int | None = None
    grow_until: float = 0.5
    batch: int = 8
    steps: int | None = 1000
    seconds: float | None = None
    least_steps: int = 0
    lr: float = 2e-3
    lr_floor: float = 0.05
    warmup: float = 0.05
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    precision: str = "float32"
    device: str = "auto"
    out: str = "runs/lm"
    eval_every: int = 200
    eval_windows: int = 8
    checkpoint_every: int = 200
    log_every: int = 1
    tensorboard: bool = False

    def __post_init__(self) -> None:
        timed = self.seconds is not None
        check((self.steps is None) == timed, "steps", self.steps, "a number, or null with seconds given instead")
        check(self.steps is None or self.steps >= 1, "steps", self.steps, "1 or more")
        check(self.seconds is None or self.seconds > 0, "seconds", self.seconds, "above 0")
        for name in ("context", "batch", "eval_windows", "log_every"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("eval_every", "checkpoint_every"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("lr", "clip"):
            check(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0")
        check(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "0 or more")
        grows = self.grow_from is None or 1 <= self.grow_from <= self.context
        check(grows, "grow_from", self.grow_from, f"between 1 and context, {self.context}")
        for name in ("lr_floor", "warmup", "grow_until"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        check(self.precision in ("float32", "bfloat16"), "precision", self.precision, "'float32' or 'bfloat16'")
        limited = self.model.positions == "learned"
        streams = self.segment is None or (self.segment >= 1 and self.model.mixer == "race" and not limited)
        check(streams, "segment", self.segment, "null, or 1 or more with mixer 'race' and positions 'none'")
        check(not limited or self.context <= self.model.max_length, "context", self.context, "at most max_length")


def window_loss(model: DecoderLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean nats a byte of windows [B, T] int64, predicted in one piece. The one place that knows how."""
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())


class Trainer:
    """One run, from its configuration.

    Args:
        config: of the run.
        text: the data, where it is loaded already.
        quiet: shows no progress.
    """

    def __init__(self, config: TrainConfig, *, text: Text | None = None, quiet: bool = False) -> None:
        self.config, self.quiet = config, quiet
        self.device = pick_device(config.device)
        self.text = text or load_text(config.data, config.data_dir)
        torch.manual_seed(config.seed)  # dropout's; the model's weights have a generator of their own
        self.model = DecoderLM(config.model, seed=config.seed).to(self.device)
        betas = (config.beta1, config.beta2)
        self.optimiser = make_adamw(self.model, lr=config.lr, weight_decay=config.weight_decay, betas=betas)
        self.data = self.text.train.to(self.device)
        self.sampler = WindowSampler(self.data, config.context, config.seed)
        self.folder = Path(config.out)
        # done so far, over all parts of the run
        self.step, self.seconds, self.windows, self.bytes = 0, 0.0, 0, 0
        self._pending: list[tuple[dict[str, Any], Tensor, Tensor]] = []

    def autocast(self) -> torch.autocast:
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    @property
    def fraction(self) -> float:
        """How much of the run is done, in [0, 1]."""
        if self.config.steps is not None:
            return min(1.0, self.step / self.config.steps)
        assert self.config.seconds is not None
        timed = self.seconds / self.config.seconds
        if self.config.least_steps:
            timed = max(timed / 2, min(timed, self.step / self.config.least_steps))
        return min(1.0, timed)

    def window_length(self) -> int:
        """Bytes a window at this point of the run."""
        config = self.config
        if config.grow_from is None or self.fraction >= config.grow_until:
            return config.context
        doublings = math.ceil(math.log2(config.context / config.grow_from))
        return min(config.context, config.grow_from * 2 ** int(doublings * self.fraction / config.grow_until))

    def train_step(self) -> tuple[Tensor, Tensor, float]:
        """One optimiser step: the loss and the gradient's norm, still on the device, and the learning rate."""
        config = self.config
        ahead = 1 / config.steps if config.steps else 1e-2  # so that the first step has a rate above 0
        lr = config.lr * lr_factor(min(1.0, self.fraction + ahead), config.warmup, config.lr_floor)
        set_lr(self.optimiser, lr)
        self.model.train()
        if self.sampler.context != (length := self.window_length()):
            self.sampler = WindowSampler(self.data, length, config.seed)
        inputs, targets = self.sampler.batch(self.windows, config.batch)
        self.optimiser.zero_grad(set_to_none=True)
        loss = self._gradient(inputs, targets)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimiser.step()
        self.step += 1
        self.windows += config.batch
        self.bytes += inputs.numel()
        return loss.detach(), norm.detach(), lr

    def _gradient(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of the windows, whose gradient is then in the parameters."""
        segment = self.config.segment
        with self.autocast():
            if segment is not None and segment < inputs.shape[1]:
                return streamed_gradient(self.model, inputs, targets, segment)
            loss = window_loss(self.model, inputs, targets)
        loss.backward()
        return loss

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of the windows, without a graph."""
        segment = self.config.segment
        with self.autocast():
            if segment is not None and segment < inputs.shape[1]:
                return streamed_loss(self.model, inputs, targets, segment)
            return window_loss(self.model, inputs, targets)

    @torch.no_grad()
    def evaluate(self, windows: int | None = None) -> float:
        """Held-out bits a byte, over windows of the training context spread evenly."""
        self.model.eval()
        context = min(self.config.context, len(self.text.valid) - 1)
        losses = []
        for inputs, targets in evaluation_windows(self.text.valid, context, windows or self.config.eval_windows):
            loss = self._loss(inputs[None].to(self.device), targets[None].to(self.device))
            losses.append(loss.double())
        return float(torch.stack(losses).mean()) * BITS

    def run(self, *, resume: bool = False, fresh: bool = False) -> dict[str, Any]:
        """Trains to the end and returns the last held-out loss and the totals.

        Args:
            resume: continues from the checkpoint in the folder, from the start where there is none.
            fresh: replaces a run that the folder holds.

        Raises:
            ConfigError: the folder holds a run and neither flag says what to do with it, or another run.
            FloatingPointError: the loss is not finite.
        """
        self._open(resume, fresh)
        metrics = Metrics(self.folder, resume_at=self.step, tensorboard=self.config.tensorboard)
        held_out = math.nan
        try:
            with Bar("training", quiet=self.quiet) as bar:
                while self.fraction < 1:
                    held_out = self._advance(metrics, bar, held_out)
        finally:
            metrics.close()
        totals = {"steps": self.step, "seconds": self.seconds, "windows": self.windows, "bytes": self.bytes}
        return {"valid_bits": held_out} | totals

    def _advance(self, metrics: Metrics, bar: Bar, held_out: float) -> float:
        """A step and what is due after it; returns the latest held-out loss."""
        config, start = self.config, time.monotonic()
        loss, norm, lr = self.train_step()
        self._pending.append(({"step": self.step, "lr": lr, "bytes": self.bytes}, loss, norm))
        over = config.steps is not None and self.step >= config.steps
        if self.step % config.log_every == 0 or over or config.seconds is not None:
            bits = self._flush(metrics, start)
            left = self.seconds / max(self.fraction, 1e-9) * (1 - self.fraction)
            speed = self.bytes / max(self.seconds, 1e-9)
            bar.update(self.fraction, left, bits_per_byte=f"{bits:.3f}", tokens_per_second=f"{speed:,.0f}")
        else:
            self.seconds += time.monotonic() - start
        done = self.fraction >= 1
        if done or (config.eval_every and self.step % config.eval_every == 0):
            held_out = self.evaluate()
            metrics.write({"step": self.step, "valid_bits": held_out})
        if done or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
            self._save()
        return held_out

    def _flush(self, metrics: Metrics, start: float) -> float:
        """Reads the losses since the last look, writes them, and returns the last one in bits."""
        losses = torch.stack([loss for _, loss, _ in self._pending]).tolist()  # waits for the device
        norms = torch.stack([norm for _, _, norm in self._pending]).tolist()
        self.seconds += time.monotonic() - start
        for (record, _, _), loss, norm in zip(self._pending, losses, norms, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(f"step {record['step']}: the loss is {loss}; lower lr or clip")
            record |= {"bits": loss * BITS, "grad_norm": norm}
            metrics.write(record | {"seconds": self.seconds})
        self._pending.clear()
        return losses[-1] * BITS

    def _open(self, resume: bool, fresh: bool) -> None:
        """Prepares the folder, and picks up the checkpoint in it."""
        saved, state = self.folder / "config.json", self.folder / "checkpoint.safetensors"
        mine = json.loads(json.dumps(dataclasses.asdict(self.config)))
        if saved.exists() and not fresh:
            check(resume, "out", str(self.folder), "a folder without a run, or --resume, or --fresh to replace it")
            theirs = json.loads(saved.read_text())["config"]
            differing = [k for k in mine if k not in ("out", "data_dir", "device") and mine[k] != theirs.get(k)]
            if differing:
                raise ConfigError(f"out: the run in {self.folder} has another " + ", ".join(differing))
            if state.exists():
                progress = checkpoint.load(state, self.model, self.optimiser)
                check(progress["data"] == self.text.sha256, "data", self.text.sha256, f"the run's, {progress['data']}")
                for name in PROGRESS:
                    setattr(self, name, progress[name])
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state.unlink(missing_ok=True)
        saved.write_text(json.dumps({"config": mine, "machine": machine()}, indent=2) + "\n")

    def _save(self) -> None:
        progress = {name: getattr(self, name) for name in PROGRESS} | {"data": self.text.sha256}
        checkpoint.save(self.folder / "checkpoint.safetensors", self.model, self.optimiser, progress)


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: got {name!r}, allowed is 'auto' or a device of torch") from error
    check(device.type != "cuda" or torch.cuda.is_available(), "device", name, "one that this machine has")
    return device


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.train", description=__doc__)
    parser.add_argument("config", nargs="?", help="a .toml or .json file; the defaults without one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example model.dim=96 lr=1e-3")
    parser.add_argument("--data-dir", help="folder of local data sets")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder 'out'")
    parser.add_argument("--fresh", action="store_true", help="replace the run in the folder 'out'")
    given = parser.parse_intermixed_args(arguments)
    overrides = list(given.overrides)
    if given.config and "=" in given.config:
        overrides.insert(0, given.config)
        given.config = None
    try:
        data = configuration.override(configuration.read(given.config) if given.config else {}, overrides)
        if given.data_dir:
            data["data_dir"] = given.data_dir
        trainer = Trainer(configuration.build(TrainConfig, data))
        result = trainer.run(resume=given.resume, fresh=given.fresh)
    except (ConfigError, FileNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"held-out bits a byte {result['valid_bits']:.4f} after {result['steps']} steps; files in {trainer.folder}/")


if __name__ == "__main__":
    main()
