"""2**27 equal tokens still count: mass and output within 1e-5, where float32 addition stops at 2**24.

Two parts are told apart: the first half of the tokens has value 1, the second -0.5, so that a state that stops
counting shows in the output too.
"""

from __future__ import annotations

import pytest
import torch

from race_attention import RaceState, race_attention
from race_attention.testing import oracle
from tests.helpers import Backend, backend_params, skip_unless_runnable

SEED = torch.Generator().manual_seed(4)
DIM, TOKEN = 3, torch.randn(3, generator=SEED)
PLANES = torch.randn(1, 1, 2, DIM, generator=SEED)
BETA = 1.3
TARGET = 2**27


def tokens(count: int, value: float, device: str, requires_grad: bool = False):
    """``count`` equal tokens in the memory of one."""
    x = TOKEN.to(device).view(1, 1, 1, DIM).expand(1, count, 1, DIM)
    return {
        "query": x,
        "key": x,
        "value": torch.full((1, 1, 1, 1), value, device=device).expand(1, count, 1, 1),
        "hyperplanes": PLANES.to(device),
        "beta": BETA,
    }


def one(device: str) -> RaceState:
    """The state of one token of value 1, from the oracle, in float64."""
    return oracle(**tokens(1, 1.0, device), return_state=True)[1]


def many(count: int, device: str) -> RaceState:
    """The state of count tokens, the first TARGET / 2 of value 1, later ones of -0.5: exact by construction."""
    unit, early = one(device), min(count, TARGET // 2)
    total = early - 0.5 * (count - early)
    return RaceState(count * unit.mass, total * unit.value_sum, unit.log_decay, count * unit.tokens)


def assert_counts(state: RaceState, out, count: int) -> None:
    exact = many(count, "cpu")
    assert state.tokens.item() == count
    assert torch.allclose(state.mass.cpu(), exact.mass, rtol=1e-5, atol=0)
    assert torch.allclose(state.value_sum.cpu(), exact.value_sum, rtol=1e-5, atol=0)
    early = min(count, TARGET // 2)
    mean = (early - 0.5 * (count - early)) / count
    if out is not None:
        assert abs(out[0, -1, 0, 0].item() - mean) <= 1e-5 * mean


BACKENDS = pytest.mark.parametrize(("backend", "dtype"), backend_params(dtypes=[torch.float32]))


@BACKENDS
@pytest.mark.parametrize("count", [2**24, 2**25, 2**27 - 64])
def test_token_by_token(backend: Backend, dtype, count):
    """From 2**24 tokens on, a float32 sum would not see one more token. 64 steps are told apart to 1e-5 of 64."""
    skip_unless_runnable(backend)
    value = 1.0 if count < TARGET // 2 else -0.5
    before = state = many(count, backend.device)
    for _ in range(64):
        step = tokens(1, value, backend.device)
        out, state = race_attention(**step, causal=True, initial_state=state, return_state=True, backend=backend.name)
    assert_counts(state, out, count + 64)
    added, unit = state.mass - before.mass, one(backend.device).mass
    assert torch.allclose(added, 64 * unit, rtol=1e-5, atol=0)


@BACKENDS
@pytest.mark.parametrize("causal", [False, True])
def test_chunk_by_chunk_from_far_on(backend: Backend, dtype, causal):
    """The last 2**16 of the tokens in one call: chunks inside it, the state before it."""
    skip_unless_runnable(backend)
    before, count = many(TARGET - 2**16, backend.device), 2**16
    run = tokens(count, -0.5, backend.device)
    if not causal:
        run["query"] = run["query"][:, :3]
    out, state = race_attention(**run, causal=causal, initial_state=before, return_state=True, backend=backend.name)
    assert_counts(state, out, TARGET)
    added = state.mass - before.mass
    assert torch.allclose(added, count * one(backend.device).mass, rtol=1e-5, atol=0)


@BACKENDS
def test_doubling_by_merge(backend: Backend, dtype):
    skip_unless_runnable(backend)
    halves = []
    for value in (1.0, -0.5):
        _, state = race_attention(**tokens(256, value, backend.device), return_state=True, backend=backend.name)
        for _ in range(18):  # 2**8 -> 2**26
            state = state + state
        halves.append(state)
    assert_counts(halves[0] + halves[1], None, TARGET)


@pytest.mark.slow
@BACKENDS
@pytest.mark.parametrize("causal", [False, True])
def test_all_of_them_chunk_by_chunk(backend: Backend, dtype, causal):
    """Every one of the 2**27 tokens, in calls of 2**20: nothing is assumed but the sum itself."""
    skip_unless_runnable(backend)
    state = None
    for n in range(128):
        run = tokens(2**20, 1.0 if n < 64 else -0.5, backend.device)
        if not causal:
            run["query"] = run["query"][:, :1]
        out, state = race_attention(**run, causal=causal, initial_state=state, return_state=True, backend=backend.name)
    assert_counts(state, out, TARGET)


@BACKENDS
def test_decay_of_a_long_run_keeps_its_digits(backend: Backend, dtype):
    """A running sum of log_decay over 2**16 tokens reaches -6e4; weights of near tokens must not feel it."""
    skip_unless_runnable(backend)
    count = 2**16
    run = tokens(count, 1.0, backend.device)
    generator = torch.Generator().manual_seed(0)
    run["value"] = torch.randn(1, count, 1, 1, generator=generator).to(backend.device)
    run["log_decay"] = (-2 * torch.rand(1, count, 1, generator=generator)).to(backend.device)
    out, state = race_attention(**run, causal=True, return_state=True, backend=backend.name)
    tail = {name: x[:, -200:] if name not in ("hyperplanes", "beta") else x for name, x in run.items()}
    tail = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in tail.items()}
    right, right_state = oracle(**tail, causal=True, return_state=True)  # what came before weighs exp(-100) or less
    assert torch.allclose(out[:, -50:].cpu().double(), right[:, -50:], rtol=1e-5, atol=1e-5)
    assert torch.allclose(state.value_sum.cpu(), right_state.value_sum, rtol=1e-5, atol=1e-6)
    exact = run["log_decay"].double().sum(1).cpu()
    assert torch.allclose(state.log_decay.cpu(), exact, rtol=1e-12)
