"""Streams on a GPU: copies beside computing, states on the host, the same numbers as on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from race_attention import RaceAttention, RaceState
from race_attention.streaming import (
    ArraySource,
    check_streaming,
    cut,
    open_safetensors,
    stream_attention,
    stream_attention_backward,
    stream_backward,
)
from race_attention.testing import assert_within_budget, make_inputs

pytestmark = pytest.mark.gpu


def on(device: str, options: dict[str, Any]) -> dict[str, Any]:
    return {n: x.to(device) if isinstance(x, (Tensor, RaceState)) else x for n, x in options.items()}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keep_on", [None, "cpu"])
def test_from_files_to_files(causal: bool, keep_on: str | None, tmp_path: Path) -> None:
    inputs = make_inputs(tokens=3000, batch=2, heads=4, kv_heads=2, dim=16, causal=causal, initial_state=True)
    names = ("query", "key", "value")
    save_file({n: inputs[n].contiguous() for n in names}, tmp_path / "in.safetensors")
    grad = torch.randn(inputs["query"].shape)
    options = {n: x for n, x in inputs.items() if n not in names}
    results = {}
    for device in ("cpu", "cuda"):
        source = ArraySource(open_safetensors(tmp_path / "in.safetensors"), 257)
        folder = tmp_path / device
        folder.mkdir()
        given = on(device, options) | {"device": device, "backend": "reference" if device == "cpu" else "auto"}
        forward = stream_attention(
            source, sink=folder / "out.npy", keep_every=3 if causal else None, keep_on=keep_on, **given
        )
        found = stream_attention_backward(
            source,
            ArraySource(grad, 257),
            forward=forward,
            grad_sink={n: folder / f"{n}.npy" for n in names},
            journal=folder / "journal",
            journal_every=4,
            **given,
        )
        results[device] = {n: torch.from_numpy(np.load(folder / f"{n}.npy")) for n in ("out", *names)}
        results[device] |= {n: x.cpu() for n, x in vars(found).items() if x is not None}
    for name, right in results["cpu"].items():
        direction = "forward" if name == "out" else "backward"
        assert_within_budget(results["cuda"][name], right, torch.float32, direction, name=name)


def test_a_source_on_the_device_is_left_there() -> None:
    inputs = make_inputs(tokens=1000, causal=True, device="cuda")
    arrays = {n: inputs.pop(n) for n in ("query", "key", "value")}
    devices = []
    stream_attention(ArraySource(arrays, 100), sink=lambda out, _: devices.append(out.device.type), **inputs)
    assert devices == ["cuda"] * 10


def test_a_model_with_its_states_on_the_host() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options = {"tables": 2, "planes": 2, "conv_size": 4, "decay": "per_token", "norm_gate": True}
            self.mixer = RaceAttention(64, 2, causal=True, **options)
            self.dropout = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.dropout(self.mixer(F.rms_norm(x, (64,))))

    model = nn.Sequential(nn.Embedding(50, 64), Block(), Block(), nn.Linear(64, 50)).cuda()
    tokens = torch.randint(50, (2, 1000), device="cuda")
    parts = cut((tokens, tokens), 130)
    loss = lambda out, part: F.cross_entropy(out.flatten(0, 1), part[1].flatten(), reduction="sum")  # noqa: E731
    assert check_streaming(model, parts, loss).worst <= 1e-4
    gradients = []
    for options in ({}, {"keep_every": 3, "offload": "cpu"}):
        model.zero_grad()
        torch.manual_seed(0)  # the same dropout, whatever is kept where
        with torch.autocast("cuda", torch.bfloat16):
            stream_backward(model, parts, loss, **options)
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).norm() / b.norm()) <= 1e-3


def test_files_written_from_a_device_are_whole(tmp_path: Path) -> None:
    inputs = make_inputs(tokens=2000, causal=True, dtype=torch.bfloat16)
    arrays = {n: inputs.pop(n) for n in ("query", "key", "value")}
    stream_attention(ArraySource(arrays, 64), sink=tmp_path / "o.safetensors", device="cuda", **on("cuda", inputs))
    pieces: list[Tensor] = []
    stream_attention(
        ArraySource(arrays, 64), sink=lambda out, _: pieces.append(out.cpu()), device="cuda", **on("cuda", inputs)
    )
    assert torch.equal(load_file(tmp_path / "o.safetensors")["out"], torch.cat(pieces, 1))
