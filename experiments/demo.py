"""``make demo``: trains a byte-level language model with RACE attention on Python's own standard library.

The context of 65,536 bytes is one piece; on the way there, for the first half of the time, windows grow from 4,096
bytes, which buys many more steps. Then it shows what came of it: the loss and what context brings to
it, the time of a layer against torch's softmax attention, some generated text. About four minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from experiments.baselines import make_mixer
from experiments.data import load_text
from experiments.measure import PositionBucket, gain_from_context, layer_times, loss_by_position
from experiments.models import ModelConfig
from experiments.models.blocks import count_parameters
from experiments.models.lm import DecoderLM, generate
from experiments.ngrams import NgramBits, ngram_bits
from experiments.report import machine, read_metrics
from experiments.train import TrainConfig, Trainer
from race_attention import BackendWarning

PROMPT = b'import os\n\n\nclass Path:\n    """'

#: Chosen by trials of this very job; see LOG.md.
MODEL = ModelConfig(
    dim=96,
    layers=2,
    heads=4,
    mixer="race",
    mixer_options={"tables": 2, "planes": 2, "conv_size": 4, "decay": "per_token", "norm_gate": True},
    max_length=65536,
)
TRAIN = TrainConfig(
    model=MODEL,
    data="stdlib",
    context=65536,
    batch=1,
    steps=None,
    seconds=150.0,
    grow_from=4096,
    grow_until=0.5,
    lr=1e-2,
    warmup=0.05,
    beta1=0.8,
    beta2=0.9,
    least_steps=50,
    eval_every=20,
    eval_windows=2,
    checkpoint_every=0,
)


@dataclass(frozen=True)
class DemoConfig:
    """The sizes of the demo.

    Attributes:
        train: model and training.
        lengths: of which a layer's time is measured.
        limit: seconds above which a layer is not measured.
        windows: held-out windows of the whole context, at most.
        patience: seconds for the measures of held-out loss; fewer windows where a machine needs more, at least 2.
        generated: bytes.
    """

    train: TrainConfig = TRAIN
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    limit: float = 8.0
    windows: int = 6
    patience: float = 30.0
    generated: int = 400


def smoke(config: DemoConfig) -> DemoConfig:
    """The same job in seconds, to see that it runs."""
    model = dataclasses.replace(config.train.model, dim=32, layers=1)
    sizes: dict[str, Any] = {"context": 2048, "grow_from": 256, "seconds": None, "steps": 16, "eval_every": 8}
    train = dataclasses.replace(config.train, model=model, **sizes)
    return DemoConfig(train, (256, 512, 1024), 1.0, 2, 30.0, 40)


@dataclass
class Results:
    """All that the demo found; what demo.json holds."""

    machine: dict[str, Any]
    config: dict[str, Any]
    parameters: int
    backend: str
    data: dict[str, Any]
    ngrams: NgramBits
    training: dict[str, Any]
    curve: list[dict[str, Any]]
    positions: list[PositionBucket]
    context_gain: dict[int, float]
    race_seconds: dict[int, float]
    softmax_seconds: dict[int, float]
    generated: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_gb: float = 0.0

    @property
    def held_out(self) -> float:
        """Bits a byte of whole held-out windows."""
        total = self.positions[-1].end
        return sum(b.bits * (b.end - b.start) for b in self.positions) / total


def run(config: DemoConfig, folder: Path, say: Console) -> Results:
    """The job, from data to files; returns what it found."""
    clock, seconds = time.monotonic(), {}

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name] = round(time.monotonic() - clock, 2)
        clock = time.monotonic()

    folder.mkdir(parents=True, exist_ok=True)
    train = dataclasses.replace(config.train, out=str(folder / "run"))
    text = load_text(train.data, train.data_dir)
    ngrams = ngram_bits(text.train, text.valid)
    lap("data and n-grams")
    trainer = Trainer(train, text=text)
    parameters = count_parameters(trainer.model)
    start = train.grow_from or train.context
    amount = f"{train.seconds:.0f} s" if train.seconds else f"{train.steps} steps"
    say.print(
        f"[bold]Training[/] {parameters:,} parameters on {len(text.train):,} bytes of {text.source}\n"
        f"  context {train.context:,} bytes in one piece (windows grow to it from {start:,}),\n"
        f"  for {amount} on {torch.get_num_threads()} threads, {trainer.device}"
    )
    backend = backend_in_use(trainer)
    say.print(f"  {backend}", highlight=False)
    training = trainer.run(fresh=True)
    lap("training")
    say.print("[bold]Measuring[/] held-out loss by position")
    windows = affordable_windows(trainer, config)
    positions = loss_by_position(trainer.model, text.valid, train.context, windows)
    gain = gain_from_context(trainer.model, text.valid, train.context, windows, max(64, train.context // 32))
    lap("held-out loss")
    say.print("[bold]Timing[/] one layer, forward and backward, RACE and softmax")
    race_seconds, softmax_seconds = time_layers(config, trainer.device)
    lap("layer times")
    sampled = generate_text(trainer.model, config.generated, trainer.device)
    lap("generation")
    results = Results(
        machine=machine(),
        config=dataclasses.asdict(config),
        parameters=parameters,
        backend=backend,
        data={"source": text.source, "sha256": text.sha256, "train": len(text.train), "held out": len(text.valid)},
        ngrams=ngrams,
        training=training,
        curve=read_metrics(folder / "run" / "metrics.jsonl"),
        positions=positions,
        context_gain=gain,
        race_seconds=race_seconds,
        softmax_seconds=softmax_seconds,
        generated=sampled,
        seconds=seconds,
    )
    from experiments.demo_plot import plot  # matplotlib takes a second to import

    plot(results, folder / "demo.png")
    lap("plot")
    results.peak_memory_gb = _peak_memory_gb()
    numbers = dataclasses.asdict(results) | {"held_out_bits": results.held_out}
    (folder / "demo.json").write_text(json.dumps(numbers, indent=2) + "\n")
    return results


def affordable_windows(trainer: Trainer, config: DemoConfig) -> int:
    """How many held-out windows the patience allows; one costs about seven passes over it."""
    start = time.monotonic()
    trainer.evaluate(1)
    return max(2, min(config.windows, int(config.patience / (7 * (time.monotonic() - start)))))


def backend_in_use(trainer: Trainer) -> str:
    """Which implementation serves the model, in words; and keeps it from being said again."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BackendWarning)
        with torch.no_grad():
            trainer.model(torch.zeros(1, 64, dtype=torch.int64, device=trainer.device))
    warnings.simplefilter("ignore", BackendWarning)
    said = [str(w.message) for w in caught if issubclass(w.category, BackendWarning)]
    return said[0] if said else f"race_attention: the native backend of {trainer.device.type} serves it"


def time_layers(config: DemoConfig, device: torch.device) -> tuple[dict[int, float], dict[int, float]]:
    """Seconds of one causal layer of the model's size, forward and backward, with RACE and with softmax."""
    model = config.train.model
    layers = []
    choices = ((model.mixer, model.mixer_options, math.inf), ("softmax", {"rope": 10000.0}, config.limit))
    for name, options, limit in choices:
        longest = max(config.lengths)
        made = make_mixer(name, model.dim, model.heads, causal=True, max_length=longest, options=options)
        layers.append(layer_times(made.to(device), model.dim, config.lengths, limit=limit))
    return layers[0], layers[1]


def generate_text(model: DecoderLM, length: int, device: torch.device) -> str:
    """The prompt and ``length`` bytes after it, sampled at temperature 0.7 with a fixed seed."""
    model.eval()
    prompt = torch.tensor(list(PROMPT), device=device)[None]
    tokens = generate(model, prompt, length, temperature=0.7, generator=torch.Generator().manual_seed(0))
    return (PROMPT + bytes(tokens[0].tolist())).decode("utf-8", errors="replace")


def _peak_memory_gb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e9 if sys.platform == "darwin" else 1e6), 2)


def tell(results: Results, folder: Path, say: Console) -> None:
    """The findings in words."""
    held_out, ngrams = results.held_out, results.ngrams
    say.print(f"\n[bold]Held-out loss[/] {held_out:.3f} bits a byte after {results.training['steps']} steps")
    for name, bits in (("bigram", ngrams.bigram), ("trigram", ngrams.trigram)):
        relation = "below" if held_out < bits else "above"
        say.print(f"  {abs(held_out - bits):.3f} {relation} the {name} statistics of the same text, {bits:.3f}")
    say.print("[bold]Does context help?[/] bits a byte of the same held-out bytes, by the bytes before them")
    say.print("  " + "   ".join(f"{before:,}: {bits:.3f}" for before, bits in results.context_gain.items()))
    say.print("[bold]One layer[/], forward and backward, milliseconds")
    for length, race in results.race_seconds.items():
        softmax = results.softmax_seconds.get(length)
        other = f"softmax {softmax * 1e3:10,.1f}   x {softmax / race:.2f}" if softmax else "softmax too slow to run"
        say.print(f"  {length:7,} tokens   RACE {race * 1e3:9,.1f}   {other}", highlight=False)
    say.print("[bold]Generated[/]")
    say.print(results.generated, markup=False, highlight=False)
    total = sum(results.seconds.values())
    say.print(f"\n[bold]Done[/] in {total:.0f} s, {results.peak_memory_gb:.1f} GB of memory at most. The files:")
    files = {"demo.png": "plots", "demo.json": "numbers", "run/metrics.jsonl": "losses"}
    files["run/checkpoint.safetensors"] = "the model"
    for name, what in files.items():
        say.print(f"  {folder / name}   {what}", highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.demo", description=__doc__)
    parser.add_argument("--seconds", type=float, default=TRAIN.seconds, help="of training (default %(default)g)")
    parser.add_argument("--data", default=TRAIN.data, help="stdlib, novels, shakespeare or file:PATH")
    parser.add_argument("--data-dir", help="folder of local data sets")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, a few seconds: to see that it runs")
    given = parser.parse_args(arguments)
    config = DemoConfig()
    if given.smoke:
        config = smoke(config)
    chosen: dict[str, Any] = {"data": given.data, "data_dir": given.data_dir, "device": given.device}
    if not given.smoke:
        chosen["seconds"] = given.seconds
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **chosen))
    say = Console()
    tell(run(config, given.out, say), given.out, say)


if __name__ == "__main__":
    main()
