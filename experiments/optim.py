"""The optimiser of every run: AdamW, warm-up, cosine."""

from __future__ import annotations

import math

import torch
from torch import nn

#: Parts of a parameter's name that weight decay must not pull towards zero.
UNDECAYED = ("norm", "beta", "decay", "hyperplanes", "embedding", "positions", "bias")


def make_adamw(model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101); decays matrices only, never norms, beta or hash planes."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner, _, own = name.rpartition(".")
            keep = parameter.ndim < 2 or any(word in owner.rpartition(".")[2] or word in own for word in UNDECAYED)
            (free if keep else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    fused = all(p.device.type == "cuda" for p in model.parameters())
    groups = [g for g in groups if g["params"]]
    if not fused:
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8)
    # A tensor on the device, which a recorded step (experiments.step) reads anew each time.
    rate = torch.tensor(lr, device=next(model.parameters()).device)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=1e-8, fused=True, capturable=True)


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all groups, in place where it is a tensor."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def lr_factor(fraction: float, warmup: float, floor: float) -> float:
    """Learning rate over its peak when ``fraction`` of the run is done.

    Linear up to 1 over the first ``warmup`` of the run, then half a cosine down to ``floor``.
    """
    if fraction < warmup:
        return max(fraction, 0.0) / warmup
    done = min(1.0, (fraction - warmup) / max(1e-12, 1 - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
