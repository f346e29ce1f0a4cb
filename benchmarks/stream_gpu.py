"""Contexts longer than memory on one GPU: ``python -m benchmarks.stream_gpu --out DIR``; about five minutes.

Three parts, each written to DIR/stream_gpu.json as soon as it is measured:

    layer     one billion generated tokens through one layer's core, forward and backward, by stream
    model     one optimiser step of a 12-layer model on one context, by segments: 64K to 4M tokens of real text
    ordinary  the same step in one piece, without and with activation checkpointing, RACE and softmax, up to the
              length at which memory or time runs out
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import race_attention
import race_attention.attention
from experiments.data import load_text
from experiments.models import DecoderLM, ModelConfig
from experiments.models.blocks import count_parameters
from experiments.optim import make_adamw
from experiments.report import commit
from experiments.streamed import streamed_gradient
from race_attention.backends.call import Call
from race_attention.features import sample_hyperplanes
from race_attention.streaming import check_streaming, cut
from race_attention.streaming.generated import GeneratedStream
from race_attention.streaming.measured import checksums, measure, peak_memory

RACE = {"tables": 3, "planes": 3, "conv_size": 4, "decay": "per_token", "norm_gate": True}
LARGE = ModelConfig(dim=896, layers=12, heads=14, mixer="race", mixer_options=RACE)
# A wider MLP where RACE has its gate: equal parameters.
SOFTMAX = ModelConfig(dim=896, layers=12, heads=14, mlp_ratio=4.5, mixer="softmax", mixer_options={"rope": 10_000.0})
SMALL = {"dim": 32, "layers": 2, "heads": 2}


class Checkpointed(DecoderLM):
    """Recomputes each block in the backward pass."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self._embed(tokens, 0)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self._logits(x)


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what; needs no package that a bare GPU machine may lack."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "race_attention": race_attention.__version__,
        "commit": commit(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["backend"] = race_attention.attention.choose_backend(
            Call(*(torch.zeros(1, 4, 1, 64, device=device, dtype=torch.bfloat16),) * 3,
                 torch.zeros(1, 2, 2, 64, device=device), torch.ones(1, device=device), causal=True)
        )  # fmt: skip
    else:
        facts["cpu"] = platform.processor() or platform.machine()
    return facts


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fresh(device: torch.device) -> None:
    """Forgets what was allocated, so that the next peak is of what comes next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def layer(device: torch.device, tokens: int, segment: int, dtype: torch.dtype) -> dict[str, Any]:
    """One layer's core, (H, D, P, L) = (4, 128, 2, 2)."""
    parameters = sample_hyperplanes(4, 2, 2, 128, device=device), torch.full((4,), 2.0, device=device)
    options = {"causal": True, "scale": 128**-0.5, "backend": "auto"}
    warm = GeneratedStream(4 * segment, segment, heads=4, dim=128, dtype=dtype, device=device)
    measure(warm, parameters, options, backward=True)
    fresh(device)
    source = GeneratedStream(tokens, segment, heads=4, dim=128, dtype=dtype, device=device)
    seconds, sums, gradients = measure(source, parameters, options, backward=True)
    assert gradients is not None
    total = sum(seconds.values())
    return {
        "tokens": tokens,
        "segment": segment,
        "dtype": str(dtype),
        "seconds": seconds | {"total": total},
        "tokens_per_s": tokens / total,
        "peak_memory_bytes": peak_memory(device),
        "checksums": sums | checksums(gradients),
    }


def exactness(device: torch.device, config: ModelConfig, text: Tensor) -> dict[str, float]:
    """The gradient by segments against the ordinary one, 2048 tokens, float32 on this device."""
    model = DecoderLM(config, seed=0).to(device)
    data = text[:2049].long().to(device)
    parts = cut((data[None, :-1], data[None, 1:]), [300, 1, 1000, 747])
    loss = lambda logits, part: F.cross_entropy(logits.flatten(0, 1).float(), part[1].flatten(), reduction="sum")  # noqa: E731
    found = check_streaming(model, parts, loss)
    return {"loss_error": found.loss_error, "worst_parameter_error": found.worst}


def step(
    device: torch.device, model: DecoderLM, text: Tensor, length: int, gradient: Callable[..., Tensor]
) -> dict[str, Any]:
    """One optimiser step on one context: seconds, peak memory, loss."""
    model.zero_grad(set_to_none=True)
    optimiser = make_adamw(model, lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95))
    fresh(device)
    data = text[: length + 1].long().to(device)
    sync(device)
    start = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16):
        loss = gradient(model, data[None, :-1], data[None, 1:])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    sync(device)
    seconds = time.perf_counter() - start
    return {
        "tokens": length,
        "seconds": seconds,
        "tokens_per_s": length / seconds,
        "bits_per_byte": float(loss) / math.log(2),
        "peak_memory_bytes": peak_memory(device),
    }


def in_one_piece(model: DecoderLM, inputs: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())
    with torch.autocast(inputs.device.type, enabled=False):
        loss.backward()
    return loss.detach()


def by_segments(
    device: torch.device, config: ModelConfig, text: Tensor, lengths: list[int], segment: int
) -> list[dict[str, Any]]:
    model = DecoderLM(config, seed=0).to(device)
    gradient = lambda m, x, y: streamed_gradient(m, x, y, segment)  # noqa: E731
    step(device, model, text, min(lengths[0], 3 * segment), gradient)  # compiles kernels
    return [step(device, model, text, length, gradient) | {"segment": segment} for length in lengths]


def until_it_ends(
    device: torch.device, cls: type[DecoderLM], config: ModelConfig, text: Tensor, start: int, limit: float
) -> dict[str, Any]:
    """Longer and longer contexts, until memory runs out or the next would take more than ``limit`` seconds.

    Four times as long each, but where the line through the last two peaks says that this cannot fit: then just
    below the length that it says fits, and just above.
    """
    model = cls(config, seed=0).to(device)
    rows: list[dict[str, Any]] = []
    step(device, model, text, start, in_one_piece)
    length, ended = start, "text"
    while length < len(text):
        try:
            rows.append(step(device, model, text, length, in_one_piece))
        except torch.OutOfMemoryError:
            ended = "memory"
            break
        longer = next_length(length, fitting(device, rows))
        if rows[-1]["seconds"] * (longer / length) ** exponent(rows) > limit:
            ended = "time"
            break
        length = longer
    slope = bytes_per_token(rows)
    return {
        "rows": rows,
        "ended_by": ended,
        "at_tokens": length,
        "bytes_per_token": slope,
        "would_fit_tokens": fitting(device, rows),
    }


def peak(row: dict[str, Any]) -> int:
    """Bytes: of the GPU where there is one."""
    memory: dict[str, int] = row["peak_memory_bytes"]
    return memory.get("cuda_allocated", memory["resident"])


def bytes_per_token(rows: list[dict[str, Any]]) -> float | None:
    """The slope of peak memory between the two longest."""
    if len(rows) < 2:
        return None
    return (peak(rows[-1]) - peak(rows[-2])) / (rows[-1]["tokens"] - rows[-2]["tokens"])


def fitting(device: torch.device, rows: list[dict[str, Any]]) -> int | None:
    """The length at which the device's memory would be full, by the line through the two longest."""
    slope = bytes_per_token(rows)
    if device.type != "cuda" or not slope or slope <= 0:
        return None
    room = torch.cuda.get_device_properties(device).total_memory - peak(rows[-1])
    return int(rows[-1]["tokens"] + room / slope)


def next_length(length: int, most: int | None) -> int:
    """What to try after ``length``."""
    if most is None or 4 * length < 0.95 * most:
        return 4 * length
    return int(0.95 * most) if length < 0.9 * most else int(max(1.05 * most, 1.05 * length))


def exponent(rows: list[dict[str, Any]]) -> float:
    """How time grows with length, 1 to 2, from the two longest."""
    if len(rows) < 2:
        return 1.0
    a, b = rows[-2], rows[-1]
    return min(max(math.log(b["seconds"] / a["seconds"]) / math.log(b["tokens"] / a["tokens"]), 1.0), 2.0)


def table_rows(name: str, result: Any) -> list[dict[str, Any]]:
    """A result as lines of a table, for the documentation."""
    steps = result["rows"] if isinstance(result, dict) and "rows" in result else result
    steps = [steps] if isinstance(steps, dict) else steps
    made = []
    for one in steps:
        if "peak_memory_bytes" in one:
            seconds = one["seconds"]
            made.append(
                {
                    "what": name.replace("_", " "),
                    "tokens": one["tokens"],
                    "segment": one.get("segment"),
                    "seconds": seconds["total"] if isinstance(seconds, dict) else seconds,
                    "peak GiB": peak(one) / 2**30,
                }
            )
    if isinstance(result, dict) and "ended_by" in result:
        made.append({"what": f"{name}: ended by {result['ended_by']}", "tokens": result["at_tokens"]})
        if result["would_fit_tokens"]:
            made.append({"what": f"{name}: memory would be full at", "tokens": result["would_fit_tokens"]})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", default="layer,model,ordinary")
    parser.add_argument("--tokens", type=int, default=10**9)
    parser.add_argument("--layer-segment", type=int, default=2**18)
    parser.add_argument("--lengths", default="65536,262144,1048576,4000000")
    parser.add_argument("--segment", type=int, default=16384)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds that one ordinary step may take")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    given = parser.parse_args()
    device = torch.device(given.device)
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "stream_gpu.json"
    title = "One layer over a stream, and one optimiser step of a model on one context"
    results: dict[str, Any] = {"title": title, "context": machine(device), "rows": []}

    def keep(name: str, result: Any) -> None:
        results[name] = result
        results["rows"] += table_rows(name, result)
        file.write_text(json.dumps(results, indent=2) + "\n")
        print(name, json.dumps(result)[:600], flush=True)

    if "layer" in given.parts:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        keep("layer", layer(device, given.tokens, given.layer_segment, dtype))
    text = load_text("stdlib").train
    lengths = [min(int(n), len(text) - 1) for n in given.lengths.split(",")]
    race, softmax = (ModelConfig(**{**vars(config), **(SMALL if given.small else {})}) for config in (LARGE, SOFTMAX))
    sizes = {name: count_parameters(DecoderLM(c, seed=0)) for name, c in (("race", race), ("softmax", softmax))}
    keep("parameters", sizes)
    if "model" in given.parts:
        tiny = ModelConfig(**{**vars(race), "layers": 2})
        keep("exactness", exactness(device, tiny, text))
        keep("by_segments", by_segments(device, race, text, lengths, given.segment))
    if "ordinary" in given.parts:
        ways = (("race", DecoderLM, race), ("race, checkpointed", Checkpointed, race),
                ("softmax", DecoderLM, softmax), ("softmax, checkpointed", Checkpointed, softmax))  # fmt: skip
        for name, cls, config in ways:
            fresh(device)
            keep(f"in one piece: {name}", until_it_ends(device, cls, config, text, min(lengths[0], 16384), given.limit))


if __name__ == "__main__":
    main()
