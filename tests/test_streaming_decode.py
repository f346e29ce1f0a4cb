"""Decode: a layer's state after a prefill in any chunks, and steps from it, in constant memory, for ever."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from race_attention import RaceAttention, RaceAttentionState, race_attention, sample_hyperplanes
from race_attention.streaming import stream_attention

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"decay": "learned", "tables": 3, "planes": 3},
    "all": {"decay": "per_token", "conv_size": 4, "norm_gate": True, "rope": 10_000.0, "num_kv_heads": 1},
}


def layer(kind: str) -> RaceAttention:
    return RaceAttention(12, 2, causal=True, **{"tables": 2, "planes": 2} | LAYERS[kind]).double()


def tokens(length: int = 17, batch: int = 3) -> Tensor:
    return torch.randn(batch, length, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def prefill(attention: RaceAttention, x: Tensor, chunks: list[int]) -> tuple[list[Tensor], RaceAttentionState | None]:
    outs, state = [], None
    for part in x.split(chunks, dim=1):
        out, state = attention(part, state=state, return_state=True)
        outs.append(out)
    return outs, state


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 0, 6, 1], [2, 10], []])
@pytest.mark.parametrize("kind", LAYERS)
def test_prefill_in_chunks_then_steps(kind: str, chunks: list[int]) -> None:
    attention, x = layer(kind), tokens()
    expected = attention(x)
    outs, state = prefill(attention, x[:, : sum(chunks)], chunks)
    for t in range(sum(chunks), x.shape[1]):
        out, state = attention.step(x[:, t], state)
        outs.append(out.unsqueeze(1))
    torch.testing.assert_close(torch.cat(outs, dim=1), expected, rtol=1e-11, atol=1e-13)
    assert state is not None
    assert state.position.tolist() == [17] * 3


@pytest.mark.parametrize("kind", LAYERS)
def test_beams_are_forked_dropped_and_reordered(kind: str) -> None:
    attention, x = layer(kind), tokens()
    _, state = prefill(attention, x[:, :9], [9])
    assert state is not None
    for rows in ([0, 0, 2, 1, 0], [2], torch.tensor([True, False, True])):
        beams = state.select(rows)
        index = torch.arange(3)[rows] if isinstance(rows, Tensor) else torch.tensor(rows)
        out, after = attention.step(x[index, 9], beams)
        torch.testing.assert_close(out, attention(x[index, :10])[:, -1], rtol=1e-11, atol=1e-13)
        assert after.core.batch == len(index)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_kept_state_is_a_snapshot(kind: str) -> None:
    """States are values: rewinding is going on from an older one, forking is going on from one twice."""
    attention, x = layer(kind), tokens()
    _, snapshot = prefill(attention, x[:, :9], [4, 5])
    assert snapshot is not None
    copy, state = snapshot.clone(), snapshot
    for t in range(9, 17):
        out, state = attention.step(x[:, t], state)
    for name, kept in copy.core.tensors().items():
        assert torch.equal(kept, getattr(snapshot.core, name)), name
    assert copy.conv is None or torch.equal(copy.conv, snapshot.conv)
    again = snapshot
    for t in range(9, 17):
        other, again = attention.step(x[:, t], again)
    assert torch.equal(out, other)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_step_costs_the_same_after_many(kind: str) -> None:
    """Nothing in a state grows."""
    attention = layer(kind)
    sizes, state = set(), None
    for _ in range(40):
        _, state = attention.step(torch.randn(3, 12, dtype=torch.float64), state)
        kept = [*state.core.tensors().values(), state.position, *([] if state.conv is None else [state.conv])]
        sizes.add(tuple(x.untyped_storage().nbytes() if x.is_contiguous() else -1 for x in kept))
    assert len(sizes) == 1


@pytest.mark.parametrize("count", [2**24, 2**27])
def test_a_step_of_a_layer_counts_after_many(count: int) -> None:
    """A state of 2**27 tokens, made by doubling, still sees each single one; float32 stops at 2**24."""
    attention = RaceAttention(12, 2, causal=True, tables=2, planes=2)
    x = torch.randn(1, 12, generator=torch.Generator().manual_seed(2))
    _, one = attention.step(x)
    core = one.core
    while int(core.tokens) < count:
        core = core + core
    assert int(core.tokens) == count
    state = RaceAttentionState(core, core.tokens)
    for _ in range(50):
        _, state = attention.step(x, state)
    added = state.core.mass - core.mass
    torch.testing.assert_close(added, 50 * one.core.mass, rtol=1e-5, atol=0)
    assert state.position.tolist() == [count + 50]


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_a_stream_counts_all_of_2_to_the_27(causal: bool) -> None:
    """Equal tokens in the memory of one, value 1 in the first half and -0.5 in the second: the mean is 0.25."""
    segment, segments = 2**19, 2**8
    x = torch.randn(1, 1, 1, 3, generator=torch.Generator().manual_seed(3)).expand(1, segment, 1, 3)
    last: list[float] = []

    def source(index: int) -> tuple[Tensor, Tensor, Tensor]:
        value = torch.tensor(1.0 if index < segments // 2 else -0.5).expand(1, segment, 1, 1)
        return (x if causal or index == segments - 1 else x[:, :0]), x, value

    def sink(out: Tensor, _: int) -> None:
        last[:] = out[0, -1:, 0, 0].tolist() or last

    forward = stream_attention(source, sample_hyperplanes(1, 1, 2, 3), 1.3, sink=sink, causal=causal, count=segments)
    one = race_attention(
        x[:, :1].double(), x[:, :1].double(), torch.ones(1, 1, 1, 1).double(), sample_hyperplanes(1, 1, 2, 3), 1.3,
        return_state=True,
    )[1]  # fmt: skip
    torch.testing.assert_close(forward.state.mass, 2**27 * one.mass, rtol=1e-5, atol=0)
    torch.testing.assert_close(forward.state.value_sum, 2**25 * one.value_sum, rtol=1e-5, atol=0)
    assert abs(last[0] - 0.25) <= 1e-5 * 0.25
    assert int(forward.state.tokens) == 2**27


def test_states_of_a_fork_share_no_memory_with_what_follows() -> None:
    attention, x = layer("all"), tokens()
    _, state = prefill(attention, x[:, :5], [5])
    assert state is not None
    branches = [attention.step(x[:, t], state)[1] for t in (5, 6)]
    pointers = [{id(s.core.mass), id(s.core.value_sum)} for s in (state, *branches)]
    assert all(not a & b for a, b in itertools.combinations(pointers, 2))
