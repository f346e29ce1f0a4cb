"""The scan over the states of runs, in tiles for few and for many of them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from race_attention.backends.triton import launch_states, plan
from race_attention.backends.triton.launch import Problem
from tests.interpreter import DEVICE, KERNELS_RUN

pytestmark = KERNELS_RUN


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [16, 64, 256])
def test_states_before_runs(length: int, reverse: bool, final: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of all before, or after, and of all; rows of 19, 5 and 2 runs, that is more and fewer than FEW_RUNS."""
    monkeypatch.setattr(launch_states, "SCAN_RUNS", 16)  # the interpreter's tests have less than FEW_RUNS
    monkeypatch.setattr(launch_states, "SCAN_ELEMENTS", 32)  # and more
    tokens, groups, dim, value_dim = 300, 2, 16, 20
    generator = torch.Generator().manual_seed(0)
    rows = torch.zeros(2, tokens, groups, dim, device=DEVICE)
    value = torch.zeros(2, tokens, groups, value_dim, device=DEVICE)
    planes = torch.zeros(groups, 2, 2, dim, device=DEVICE)
    shape = plan.shape_class(dim, value_dim, 2, 2, torch.float32, "ieee")
    p = Problem(rows, rows, value, planes, torch.ones(groups, device=DEVICE), None, None, None, None, True, shape)
    p.final = final
    runs = plan.runs_of(2, tokens, groups, length, length, None)
    assert (runs.per_row > launch_states.FEW_RUNS) == (length == 16)
    states = torch.randn(runs.count, groups, shape.state_size, generator=generator).to(DEVICE)
    before = torch.full_like(states, torch.nan)
    found = launch_states.scan(p, runs, states, p.beta, before, (None, None), reverse=reverse)
    each = states.double().view(2, runs.per_row, groups, -1)
    each = each.flip(1) if reverse else each
    right = each.cumsum(1) - each
    right = right.flip(1) if reverse else right
    torch.testing.assert_close(before.double(), right.reshape(before.shape), rtol=1e-6, atol=1e-5)
    if final:
        whole = each.sum(1)
        torch.testing.assert_close(found[0].flatten(2), whole[..., shape.buckets * value_dim :])
        torch.testing.assert_close(found[1].flatten(2), whole[..., : shape.buckets * value_dim])
    else:
        assert found[0].numel() == found[1].numel() == 0
