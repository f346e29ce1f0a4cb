"""One token after a state: the decode kernel through the public interface and the layer.

On a GPU as it is, without one in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from race_attention import RaceAttention, race_attention, sample_hyperplanes
from race_attention.backends import NATIVE
from race_attention.testing import assert_within_budget, oracle
from tests.interpreter import DEVICE, KERNELS_RUN

pytestmark = KERNELS_RUN


class Operators(TorchDispatchMode):
    """Notes which of this package's operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "race_attention":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("tables", "planes"), [(2, 3), (1, 8)])
@pytest.mark.parametrize("decay", [False, True])
def test_a_token_after_a_state_is_the_oracles(tables: int, planes: int, decay: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 6, n, 9, generator=generator).to(DEVICE) for n in (4, 2, 2))
    inputs: dict[str, Any] = {
        "hyperplanes": sample_hyperplanes(1, tables, planes, 9, device=DEVICE), "beta": 3.0, "causal": True,
    }  # fmt: skip
    log_decay = -torch.rand(2, 6, 2, generator=generator).to(DEVICE) if decay else None
    right, right_state = oracle(q, k, v, **inputs, log_decay=log_decay, return_state=True)

    def call(part: slice, state: Any) -> Any:
        faded = None if log_decay is None else log_decay[:, part]
        return race_attention(
            q[:, part], k[:, part], v[:, part], **inputs, log_decay=faded, initial_state=state, return_state=True,
            backend="triton",
        )  # fmt: skip

    _, state = call(slice(0, 4), None)
    before = state.value_sum.clone()
    with Operators() as operators:
        out, after = call(slice(4, 5), state)
        last, after = call(slice(5, 6), after)
    assert operators.seen == ["triton_decode"] * 2
    assert torch.equal(state.value_sum, before)
    assert_within_budget(torch.cat((out, last), 1), right[:, 4:], torch.float32, "forward")
    assert_within_budget(after.value_sum, right_state.value_sum, torch.float32, "forward")
    assert_within_budget(after.mass, right_state.mass, torch.float32, "forward")
    assert torch.equal(after.tokens, right_state.tokens)


def test_gradients_take_the_differentiable_way() -> None:
    x = torch.randn(1, 1, 2, 8, device=DEVICE)
    inputs: dict[str, Any] = {
        "hyperplanes": sample_hyperplanes(1, 2, 2, 8, device=DEVICE), "beta": 1.0, "causal": True, "return_state": True,
    }  # fmt: skip
    _, state = race_attention(x, x, x, **inputs, backend="triton")
    learned = x.clone().requires_grad_()
    with Operators() as operators:
        out, _ = race_attention(learned, x, x, **inputs, initial_state=state, backend="triton")
    assert operators.seen == ["triton_forward"]
    assert out.requires_grad


def test_the_layers_step_is_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NATIVE, "cpu", "triton")
    torch.manual_seed(0)
    layer = RaceAttention(32, 4, num_kv_heads=2, causal=True, conv_size=3, decay="per_token", norm_gate=True).to(DEVICE)
    x = torch.randn(2, 5, 32, device=DEVICE)
    with torch.no_grad():
        right = layer(x)
        state, outs = None, []
        with Operators() as operators:
            for t in range(5):
                out, state = layer.step(x[:, t], state)
                outs.append(out)
    assert operators.seen == ["triton_forward"] + ["triton_decode"] * 4
    assert_within_budget(torch.stack(outs, 1), right, torch.float32, "forward")


def test_the_operator_passes_opcheck() -> None:
    from race_attention.backends.triton.decode_ops import triton_decode

    x = torch.randn(2, 2, 8, device=DEVICE)
    mass = torch.rand(2, 2, 2, 4, dtype=torch.float64, device=DEVICE)
    state = mass, torch.randn(*mass.shape, 8, dtype=torch.float64, device=DEVICE)
    hyperplanes = sample_hyperplanes(2, 2, 2, 8, device=DEVICE)
    torch.library.opcheck(triton_decode, (x, x, x, hyperplanes, torch.ones(2, device=DEVICE), None, *state))
