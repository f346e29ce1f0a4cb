"""What is measured of a trained model: loss by position, what context brings, time of a layer by length."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data import evaluation_windows
from experiments.models import DecoderLM

BITS = 1 / math.log(2)


@dataclass(frozen=True)
class PositionBucket:
    """Held-out bits a byte at positions start <= i < end of the context, with the standard error over windows."""

    start: int
    end: int
    bits: float
    error: float
    windows: int


@torch.no_grad()
def token_losses(model: DecoderLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Bits of each byte: [B, T] int64 twice -> [B, T] float64 on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    logits = model(inputs.to(device)).float()
    loss = F.cross_entropy(logits.transpose(1, 2), targets.to(device), reduction="none")
    return loss.double().cpu() * BITS


def loss_by_position(model: DecoderLM, text: Tensor, context: int, windows: int) -> list[PositionBucket]:
    """Held-out loss at log-spaced positions in the context.

    A causal model's loss at position i depends on the i bytes before it alone, so early positions are measured on
    many short windows and late ones on ``windows`` long ones: about as many bytes a length, wherever it lies.

    Args:
        model: to measure.
        text: [N] uint8, held out.
        context: the longest.
        windows: of that length, spread evenly over the text.
    """
    context = min(context, len(text) - 1)
    edges = [0, *(2**e for e in range(4, 40) if 2**e < context), context]
    buckets: list[PositionBucket] = []
    length, losses = 0, torch.empty(0)
    for start, end in itertools.pairwise(edges):
        if end > length:  # the next length that is measured: eight times the bucket, up to the whole
            length = context if 8 * end > context else 8 * end
            losses = _window_losses(model, text, length, windows * (context // length), context)
        means = losses[:, start:end].mean(dim=1)
        error = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else math.nan
        buckets.append(PositionBucket(start, end, float(means.mean()), error, len(means)))
    return buckets


def gain_from_context(model: DecoderLM, text: Tensor, context: int, windows: int, tail: int) -> dict[int, float]:
    """Held-out bits a byte of the SAME bytes, the last ``tail`` of each window, given more and more before them.

    Returns:
        bytes of context before the measured ones -> bits a byte.
    """
    context = min(context, len(text) - 1)
    befores = [0, *(4**e for e in range(3, 20) if 4**e < context - tail), context - tail]
    sums = dict.fromkeys(befores, 0.0)
    count = 0
    for inputs, targets in evaluation_windows(text, context, windows):
        count += 1
        for before in befores:
            kept = slice(context - tail - before, context)
            losses = token_losses(model, inputs[None, kept], targets[None, kept])
            sums[before] += float(losses[0, -tail:].mean())
    return {before: total / count for before, total in sums.items()}


def _window_losses(model: DecoderLM, text: Tensor, length: int, count: int, at_once: int) -> Tensor:
    """Bits of each byte of ``count`` windows, [count, length]; about ``at_once`` tokens a pass."""
    pairs = list(evaluation_windows(text, length, count))
    size = max(1, at_once // length)
    groups = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    stacks = [(torch.stack([x for x, _ in group]), torch.stack([y for _, y in group])) for group in groups]
    return torch.cat([token_losses(model, inputs, targets) for inputs, targets in stacks])


def layer_times(
    layer: nn.Module, dim: int, lengths: Sequence[int], *, limit: float, patience: float = 0.4
) -> dict[int, float]:
    """Seconds of one layer forward and backward at each length, batch 1; the median of several.

    Args:
        layer: a mixer, [1, T, dim] -> [1, T, dim].
        dim: model size.
        lengths: rising.
        limit: a length expected to take more seconds than this is left out, and all longer ones.
        patience: seconds spent repeating a length; the first run of a length does not count where others fit.

    Returns:
        length -> seconds, for those that were run.
    """
    device = next(layer.parameters()).device
    layer(torch.zeros(1, lengths[0], dim, device=device)).sum().backward()  # compiles, loads, allocates
    seconds: dict[int, float] = {}
    for length in lengths:
        if len(seconds) > 1:
            (short, before), (last, now) = list(seconds.items())[-2:]
            exponent = max(1.0, math.log(now / before) / math.log(last / short))
            if now * (length / last) ** exponent > limit:
                break
        x = torch.randn(1, length, dim, device=device, requires_grad=True)
        upstream = torch.randn(1, length, dim, device=device)

        def once(x: Tensor = x, upstream: Tensor = upstream) -> None:
            layer(x).backward(upstream)

        seconds[length] = _median_time(once, device, patience)
        x.grad = None
        layer.zero_grad(set_to_none=True)
    return seconds


def _median_time(run: Callable[[], None], device: torch.device, patience: float) -> float:
    times: list[float] = []
    while not times or sum(times) < patience:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)
