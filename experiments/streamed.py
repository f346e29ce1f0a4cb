"""Losses of windows longer than what one pass holds: a segment at a time, through the model's states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.models import DecoderLM
from race_attention.streaming import cut, forward_with_state, stream_backward


def streamed_gradient(model: DecoderLM, inputs: Tensor, targets: Tensor, segment: int) -> Tensor:
    """Adds the exact gradient of the mean loss over windows [B, T] to the parameters'; returns that mean, in nats."""

    def summed(logits: Tensor, part: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), part[1].flatten(), reduction="sum")

    mean = 1 / targets.numel()
    streamed = stream_backward(model, cut((inputs, targets), segment), summed, loss_scale=mean)
    return (streamed.loss * mean).to(inputs.device, torch.float32)


def streamed_loss(model: DecoderLM, inputs: Tensor, targets: Tensor, segment: int) -> Tensor:
    """The mean loss over windows [B, T] in nats, without a graph."""
    state, total = None, torch.zeros((), device=inputs.device)
    with torch.no_grad():
        for part, wanted in cut((inputs, targets), segment):
            logits, state = forward_with_state(model, state, part)
            total += F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum")
    return total / targets.numel()
