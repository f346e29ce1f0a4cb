"""Exact gradients of whole models, segment by segment."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from race_attention import RaceAttention
from race_attention.streaming import (
    ModelState,
    StreamError,
    check_streaming,
    cut,
    forward_with_state,
    register_stateful,
    stream_backward,
)
from race_attention.streaming import stateful as protocol

VOCAB = 19
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"decay": "per_token"},
    "convolution": {"conv_size": 4},
    "gate": {"norm_gate": True, "decay": "multiscale"},
    "all": {
        "decay": "per_token",
        "conv_size": 3,
        "norm_gate": True,
        "rope": 10_000.0,
        "learn_hyperplanes": True,
        "num_kv_heads": 1,
    },
}


class Block(nn.Module):
    def __init__(self, dim: int, mixer: nn.Module, dropout: float = 0.0):
        super().__init__()
        self.norm, self.mixer, self.dropout = nn.LayerNorm(dim), mixer, nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.mixer(self.norm(x)))
        return x + self.mlp(x)


class Model(nn.Module):
    """Knows nothing of states."""

    def __init__(self, layers: int = 2, dim: int = 12, dropout: float = 0.0, use_checkpoints: bool = False, **options):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList(
            Block(dim, RaceAttention(dim, 2, causal=True, tables=2, planes=2, seed=i, **options), dropout)
            for i in range(layers)
        )
        self.head, self.use_checkpoints = nn.Linear(dim, VOCAB), use_checkpoints

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.use_checkpoints else block(x)
        return self.head(x)


def loss_of(logits: Tensor, segment: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), segment[1].flatten(), reduction="sum")


def text(length: int = 13, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randint(VOCAB, (batch, length + 1), generator=generator)
    return both[:, :-1], both[:, 1:]


def ordinary(model: nn.Module, data: Any, loss_fn: Any = loss_of) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = loss_fn(model(data[0]), data)
    loss.backward()
    return loss.detach(), gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert actual.keys() == expected.keys()
    return max(
        float((actual[n].double() - x.double()).norm() / x.double().norm().clamp(min=1e-300))
        for n, x in expected.items()
    )


@pytest.mark.parametrize("segment", [1, 2, 5, 13, "uneven"])
@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_the_ordinary_gradient(kind: str, layers: int, segment: Any) -> None:
    model, data = Model(layers, **LAYERS[kind]).double(), text()
    loss, expected = ordinary(model, data)
    model.zero_grad()
    found = stream_backward(model, cut(data, [3, 0, 1, 8, 1] if segment == "uneven" else segment), loss_of)
    assert worst(gradients(model), expected) <= 1e-12
    torch.testing.assert_close(found.loss, loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.losses.sum(), loss, rtol=1e-13, atol=0)


@pytest.mark.parametrize("every", [2, 3, 50])
@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("stop_early", [True, False])
def test_fewer_states(every: int, offload: str | None, stop_early: bool) -> None:
    model, data = Model(2, dropout=0.3, **LAYERS["all"]).double(), text()
    results = []
    for n in (1, every):
        model.zero_grad()
        torch.manual_seed(4)
        stream_backward(model, cut(data, 2), loss_of, keep_every=n, offload=offload, stop_early=stop_early)
        results.append(gradients(model))
    assert worst(results[1], results[0]) <= 1e-14


def test_dropout_falls_alike_both_times() -> None:
    """The gradient is that of the very loss returned: its finite differences, with the random state put back."""
    model, data = Model(2, dropout=0.4, **LAYERS["all"]).double(), text()
    for block in model.blocks:
        block.mixer.dropout = 0.3

    def loss() -> Tensor:
        torch.manual_seed(7)
        return stream_backward(model, cut(data, 3), loss_of, stop_early=False).loss

    torch.manual_seed(1)
    loss()
    model.zero_grad()
    loss()
    weight = model.blocks[0].mixer.v_proj.weight
    direction = torch.randn_like(weight)
    slope = float((weight.grad * direction).sum())
    step = 1e-5
    with torch.no_grad():
        weight += step * direction
        high = loss()
        weight -= 2 * step * direction
        low = loss()
    assert abs(float(high - low) / (2 * step) - slope) <= 1e-6 * abs(slope)


def test_the_next_context_draws_other_numbers() -> None:
    model, data = Model(1, dropout=0.5).double(), text()
    torch.manual_seed(0)
    first, second = (stream_backward(model, cut(data, 4), loss_of).loss for _ in range(2))
    assert first != second


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models(dtype: torch.dtype) -> None:
    """As far from the float64 gradient as the ordinary one, up to a factor of two."""
    exact, data = Model(2, dim=16, **LAYERS["all"]), text(64)
    narrow = copy.deepcopy(exact).to(dtype)
    exact = exact.double()
    exact.load_state_dict({n: x.double() for n, x in narrow.state_dict().items()})
    loss = lambda logits, segment: loss_of(logits.float() if dtype == torch.bfloat16 else logits, segment)  # noqa: E731
    _, right = ordinary(exact, data)
    _, usual = ordinary(narrow, data, loss)
    narrow.zero_grad()
    stream_backward(narrow, cut(data, 8), loss)
    assert narrow.head.weight.grad.dtype == dtype

    def error(found: dict[str, Tensor]) -> float:
        both = [torch.cat([g[n].double().flatten() for n in right]) for g in (found, right)]
        return float((both[0] - both[1]).norm() / both[1].norm())

    assert error(gradients(narrow)) <= max(2 * error(usual), 1e-5)


def test_gradients_accumulate() -> None:
    model, data, more = Model(1).double(), text(), text(seed=1)
    _, first = ordinary(model, data)
    _, second = ordinary(model, more)
    model.zero_grad()
    stream_backward(model, cut(data, 4), loss_of)
    stream_backward(model, cut(more, 5), loss_of)
    assert worst(gradients(model), {n: first[n] + second[n] for n in first}) <= 1e-12
    narrow = copy.deepcopy(model).bfloat16()
    for p in narrow.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(narrow)
    before.zero_grad()
    stream_backward(before, cut(data, 4), loss_of)
    stream_backward(narrow, cut(data, 4), loss_of)
    assert worst(gradients(narrow), {n: 1 + g.float() for n, g in gradients(before).items()}) <= 1e-2


def test_means_have_weights() -> None:
    model, data = Model(2).double(), text()

    def mean(logits: Tensor, segment: Any) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), segment[1].flatten())

    loss, expected = ordinary(model, data, mean)
    for options in ({"weights": [5 / 13, 5 / 13, 3 / 13]}, {}):
        model.zero_grad()
        if options:
            found = stream_backward(model, cut(data, 5), mean, **options).loss
        else:  # sums, scaled before they are differentiated
            found = stream_backward(model, cut(data, 5), loss_of, loss_scale=1 / 26).loss / 26
        assert worst(gradients(model), expected) <= 1e-12
        torch.testing.assert_close(found, loss)


def test_autocast() -> None:
    model, data = Model(2, dim=16, **LAYERS["all"]), text(40)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = ordinary(model, data)
        model.zero_grad()
        found = stream_backward(model, cut(data, 8), loss_of)
    assert worst(gradients(model), expected) <= 0.1  # bfloat16 in every product of both
    assert set(gradients(model)) == set(expected)
    assert abs(float(found.loss) / float(loss) - 1) <= 1e-2
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_activation_checkpointing(kind: str) -> None:
    model, data = Model(2, use_checkpoints=True, **LAYERS[kind]).double(), text()
    _, expected = ordinary(model, data)
    model.zero_grad()
    stream_backward(model, cut(data, 4), loss_of)
    assert worst(gradients(model), expected) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("part", ["model", "blocks"])
def test_compiled(part: str) -> None:
    model, data = Model(1, **LAYERS["all"]).double(), text(12)
    _, expected = ordinary(model, data)
    model.zero_grad()
    if part == "model":
        stream_backward(torch.compile(model, backend="aot_eager"), cut(data, 4), loss_of)
    else:
        for block in model.blocks:
            block.compile(backend="aot_eager")
        stream_backward(model, cut(data, 4), loss_of)
    assert worst(gradients(model), expected) <= 1e-12


@pytest.mark.slow
def test_a_layer_with_its_state_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("race_attention.backends.NATIVE", {})
    model = Model(1, **LAYERS["all"]).double()
    x = torch.randn(2, 8, 12, dtype=torch.float64)
    block = torch.compile(model.blocks[0], backend="eager", fullgraph=True)
    with protocol.Carrier(block) as carrier:
        first, state = carrier.run(lambda: block(x), None), carrier.state()
        second = carrier.run(lambda: block(x), state)
    whole = model.blocks[0](torch.cat((x, x), dim=1))
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole)


def test_an_initial_state_continues() -> None:
    model, data = Model(2, **LAYERS["all"]).double(), text()
    whole = stream_backward(model, cut(data, 4), loss_of)
    model.zero_grad()
    first, second = (tuple(x[:, a:b] for x in data) for a, b in ((0, 8), (8, 13)))
    left = stream_backward(model, cut(first, 4), loss_of)
    right = stream_backward(model, cut(second, 4), loss_of, initial_state=left.state)
    torch.testing.assert_close(left.loss + right.loss, whole.loss)
    logits, _ = forward_with_state(model, whole.state, data[0][:, :1])
    again, _ = forward_with_state(model, right.state, data[0][:, :1])
    torch.testing.assert_close(logits, again)


def test_segments_by_index_and_by_keywords() -> None:
    model, data = Model(1).double(), text()
    _, expected = ordinary(model, data)
    parts = cut(data, 4)
    model.zero_grad()
    stream_backward(model, parts.__getitem__, loss_of, count=len(parts))
    assert worst(gradients(model), expected) <= 1e-12
    named = [{"tokens": x, "targets": y} for x, y in parts]
    model.zero_grad()
    stream_backward(
        model,
        named,
        lambda out, s: loss_of(out, (None, s["targets"])),
        call=lambda model, s: model(tokens=s["tokens"]),
    )
    assert worst(gradients(model), expected) <= 1e-12


def test_frozen_parameters_and_gradients_of_inputs() -> None:
    model, (_, targets) = Model(1).double(), text()
    model.requires_grad_(False)
    x = torch.randn(2, 13, 12, dtype=torch.float64, requires_grad=True)

    def call(model: nn.Module, segment: Any) -> Tensor:
        return model.head(model.blocks[0](segment[0]))

    loss_of(call(model, (x,)), (x, targets)).backward()
    expected, x.grad = x.grad, None
    stream_backward(model, cut((x, targets), 3), loss_of, call=call)
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-15)


def test_a_layer_called_twice() -> None:
    class Twice(Model):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            return self.head(self.blocks[0](self.blocks[0](x)))

    model, data = Twice(1, **LAYERS["all"]).double(), text()
    _, expected = ordinary(model, data)
    model.zero_grad()
    stream_backward(model, cut(data, 3), loss_of)
    assert worst(gradients(model), expected) <= 1e-12


# -------------------------------------------------------------------------------------- modules of others


class RunningMean(nn.Module):
    """Mixes tokens its own way, and implements the protocol: the mean of all tokens so far."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with_state(None, x)[0]

    def forward_with_state(self, state: Any, x: Tensor) -> tuple[Tensor, Any]:
        total, count = (0, 0) if state is None else (state["total"], state["count"])
        sums = self.linear(x).cumsum(1) + total
        counts = count + torch.arange(1, x.shape[1] + 1).unsqueeze(-1)
        last = sums[:, -1:] if x.shape[1] else total
        return sums / counts, {"total": last, "count": count + x.shape[1]}


class GRUMixer(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gru = nn.GRU(dim, dim, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


@pytest.fixture
def _registered_gru(monkeypatch):
    monkeypatch.setattr(protocol, "_ADAPTERS", dict(protocol._ADAPTERS))

    def gru(forward: Any, state: Any, args: Any, kwargs: Any) -> Any:
        out, state = forward(*args, state, **kwargs)
        return (out, state), state

    register_stateful(nn.GRU, gru)


@pytest.mark.usefixtures("_registered_gru")
@pytest.mark.parametrize("segment", [1, 4])
def test_modules_of_others(segment: int) -> None:
    model, data = Model(3, **LAYERS["all"]), text()
    model.blocks[1].mixer = RunningMean(12)
    model.blocks[2].mixer = GRUMixer(12)
    model, parts = model.double(), cut(data, segment)
    _, expected = ordinary(model, data)
    model.zero_grad()
    stream_backward(model, parts, loss_of)
    assert worst(gradients(model), expected) <= 1e-12
    assert check_streaming(model, parts, loss_of).worst <= 1e-12


def test_register_checks() -> None:
    with pytest.raises(TypeError, match="cls: got"):
        register_stateful(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="adapter: got"):
        register_stateful(nn.GRU, 3)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------- check mode


class Centre(nn.Module):
    """Subtracts the mean over tokens: looks at all of them."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Softmax(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)


class Positions(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(50, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[: x.shape[1]]


class Detached(RaceAttention):
    def forward(self, *args: Any, state: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, state=None if state is None else state.detach(), **kwargs)


def test_check_passes_and_leaves_all_as_it_was() -> None:
    model, data = Model(2, dropout=0.1, **LAYERS["all"]).double(), text()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    torch.manual_seed(3)
    random = torch.get_rng_state()
    found = check_streaming(model, cut(data, 4), loss_of)
    assert found.worst <= 1e-12
    assert model.training
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert model.embedding.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (lambda: Centre(), r"'blocks\.1\.mixer' \(Centre\)"),
        (lambda: Softmax(12), r"'blocks\.1\.mixer' \(Softmax\)"),
        (lambda: Positions(12), r"'blocks\.1\.mixer' \(Positions\)"),
        (lambda: nn.Sequential(nn.Linear(12, 12), Centre()), r"'blocks\.1\.mixer\.1' \(Centre\)"),
        (lambda: GRUMixer(12), r"'blocks\.1\.mixer\.gru' \(GRU\)"),
    ],
)
def test_check_names_who_mixes(module: Any, named: str) -> None:
    model = Model(3)
    model.blocks[1].mixer = module()
    with pytest.raises(StreamError, match=named):
        check_streaming(model.double(), cut(text(), 4), loss_of)


def test_check_names_the_model_itself() -> None:
    class Mixing(Model):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) * self.embedding(tokens).mean()

    with pytest.raises(StreamError, match="the model itself mixes tokens"):
        check_streaming(Mixing(1).double(), cut(text(), 4), loss_of)


def test_check_finds_means_without_weights() -> None:
    mean = lambda logits, segment: F.cross_entropy(logits.flatten(0, 1), segment[1].flatten())  # noqa: E731
    with pytest.raises(StreamError, match="not a sum over tokens"):
        check_streaming(Model(1).double(), cut(text(), 5), mean)
    assert check_streaming(Model(1).double(), cut(text(12), 6), mean, weights=[0.5, 0.5]).worst <= 1e-12


def test_a_detached_state_is_found() -> None:
    model = Model(1).double()
    model.blocks[0].mixer = Detached(12, 2, causal=True, tables=2, planes=2, conv_size=3).double()
    with pytest.raises(StreamError, match=r"although all outputs agree|no_grad, detaches"):
        check_streaming(model, cut(text(), 4), loss_of)


# ------------------------------------------------------------------------------------------------ errors


def test_what_cannot_be_streamed_is_refused() -> None:
    model, parts = Model(1), cut(text(), 4)
    with pytest.raises(ValueError, match="segments: got an iterator"):
        stream_backward(model, iter(parts), loss_of)
    with pytest.raises(ValueError, match="segments: got none"):
        stream_backward(model, [], loss_of)
    with pytest.raises(ValueError, match="weights: got 1"):
        stream_backward(model, parts, loss_of, weights=[1.0])
    with pytest.raises(ValueError, match="keep_every: got 0"):
        stream_backward(model, parts, loss_of, keep_every=0)
    with pytest.raises(TypeError, match=r"loss_fn: got \[2"):
        stream_backward(model, parts, lambda out, s: out)
    with pytest.raises(StreamError, match="does not depend on anything"):
        stream_backward(model, parts, lambda out, s: out.detach().sum())
    model.blocks[0].mixer = RaceAttention(12, 2)
    with pytest.raises(StreamError, match=r"blocks\.0\.mixer: got RaceAttention with causal=False"):
        stream_backward(model, parts, loss_of)


def test_a_failed_stream_leaves_the_model_as_it_was() -> None:
    model, data = Model(1), text()

    def fails(out: Tensor, segment: Any) -> Tensor:
        raise ArithmeticError

    before = set(model.blocks[0].mixer.__dict__)
    with pytest.raises(ArithmeticError):
        stream_backward(model, cut(data, 4), fails)
    assert set(model.blocks[0].mixer.__dict__) == before
    assert model(data[0]).shape == (2, 13, VOCAB)
    copy.deepcopy(model)


def test_reentrant_checkpoints_are_refused() -> None:
    class Reentrant(Model):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(checkpoint(self.blocks[0], self.embedding(tokens), use_reentrant=True))

    with pytest.raises(StreamError, match="use_reentrant=False"):
        stream_backward(Reentrant(1), cut(text(), 4), loss_of)


# -------------------------------------------------------------------------------------- decode of a model


@pytest.mark.parametrize("chunks", [[13], [1] * 13, [5, 1, 1, 6], [0, 12, 1]])
def test_prefill_and_steps_of_a_model(chunks: list[int]) -> None:
    model, data = Model(2, **LAYERS["all"]).double(), text()
    expected, state, outs = model(data[0]), None, []
    for (part,) in cut((data[0],), chunks):
        out, state = forward_with_state(model, state, part)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-11, atol=1e-12)


def test_fork_and_rewind_of_a_model() -> None:
    model, data = Model(2, **LAYERS["all"]).double(), text()
    _, snapshot = forward_with_state(model, None, data[0][:, :8])
    copied = snapshot.clone()
    first, _ = forward_with_state(model, snapshot, data[0][:, 8:])
    again, _ = forward_with_state(model, snapshot, data[0][:, 8:])
    assert torch.equal(first, again)
    assert isinstance(copied, ModelState)
    picked, _ = forward_with_state(model, snapshot.select([1, 1, 0]), data[0][[1, 1, 0], 8:])
    torch.testing.assert_close(picked, first[[1, 1, 0]])
