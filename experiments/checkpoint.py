"""Checkpoints: one safetensors file with model, optimiser, random states and position, replaced atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from race_attention.state import write_atomically

FORMAT = "race-experiment-1"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why."""


def save(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Saves all that a run needs to go on exactly as if it had not stopped.

    Args:
        path: of the file.
        model: its parameters and persistent buffers.
        optimiser: its state of every parameter, by the parameter's name.
        progress: anything JSON can hold (step, position in the data, seconds...).
    """
    tensors = {f"model.{name}": tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser.{name}.{key}"] = torch.as_tensor(value).detach().contiguous()
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    metadata = {"format": FORMAT, "progress": json.dumps(progress)}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Fills model, optimiser and random states from ``path`` and returns the saved progress.

    Without an optimiser only the model is filled (to evaluate or generate).

    Raises:
        CheckpointError: no checkpoint, one cut short, one of another format or another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path}: got format {metadata.get('format')!r}, allowed is {FORMAT!r}")
    state = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {path} is of another model: {error}") from error
    if optimiser is not None:
        _load_optimiser(tensors, model, optimiser)
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"])
    progress: dict[str, Any] = json.loads(metadata["progress"])
    return progress


def _load_optimiser(tensors: dict[str, Tensor], model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    for name, parameter in model.named_parameters():
        prefix = f"optimiser.{name}."
        values = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        if values:
            counts_on_device = optimiser.param_groups[0].get("fused") or optimiser.param_groups[0].get("capturable")
            for key, value in values.items():
                on_cpu = key == "step" and not counts_on_device
                optimiser.state[parameter][key] = value if on_cpu else value.to(parameter.device)
