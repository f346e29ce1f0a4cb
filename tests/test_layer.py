"""RaceAttention: every option against the layer written out, and continuation, packing, padding, copies."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn
from torch.nn.utils import parametrize

from race_attention import RaceAttention, RaceAttentionState, RaceState, sample_hyperplanes
from race_attention.decay import multiscale_log_decay
from race_attention.rotary import rotate
from race_attention.testing import assert_within_budget, oracle, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::race_attention.BackendWarning")

FLOAT64 = torch.float64
EMBED = 12

#: name -> options of the constructor; "causal" where an option needs it, else both ways are tested.
OPTIONS: dict[str, dict] = {
    "plain": {"num_heads": 3},
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "value_dim": 5, "bias": True},
    "hash": {"num_heads": 2, "tables": 3, "planes": 2, "beta": 1.0, "scale": 1.0, "learn_beta": False, "seed": 5},
    "planes": {"num_heads": 2, "learn_hyperplanes": True, "hyperplanes_per_head": False, "orthogonal": True},
    "convolution": {"num_heads": 2, "conv_size": 4, "num_kv_heads": 1},
    "one-tap": {"num_heads": 2, "conv_size": 1},
    "gate": {"num_heads": 2, "norm_gate": True},
    "rotary": {"num_heads": 2, "rope": 100.0},
    "bucket": {"num_heads": 2, "tables": 3, "planes": 2, "readout": "bucket"},
    "decay": {"num_heads": 2, "decay": 0.8, "causal": True},
    "multiscale": {"num_heads": 4, "head_dim": 4, "decay": "multiscale", "causal": True},
    "learned": {"num_heads": 4, "head_dim": 4, "decay": "learned", "causal": True},
    "per-token": {"num_heads": 4, "num_kv_heads": 2, "decay": "per_token", "causal": True},
    "all": {
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "value_dim": 5, "tables": 2, "planes": 3, "beta": 1.5,
        "learn_hyperplanes": True, "orthogonal": True, "conv_size": 3, "decay": "per_token", "norm_gate": True,
        "bias": True, "rope": 50.0, "causal": True,
    },
}  # fmt: skip
LAYERS = [
    pytest.param(name, causal, id=f"{name}-{'causal' if causal else 'full'}")
    for name, options in OPTIONS.items()
    for causal in ((True,) if options.get("causal") else (False, True))
]
CAUSAL = list(OPTIONS)


def make(name: str, causal: bool = True, dtype: torch.dtype = FLOAT64, **change) -> RaceAttention:
    torch.manual_seed(1)
    layer = RaceAttention(EMBED, **{**OPTIONS[name], "causal": causal, "dtype": dtype, **change})
    with torch.no_grad():  # away from the starting values, where options could hide
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def tokens(batch: int = 2, length: int = 11, dtype: torch.dtype = FLOAT64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, EMBED, generator=generator, dtype=FLOAT64).to(dtype)


def written_out(layer: RaceAttention, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
    """The layer on rows without padding, from torch's own functions and the oracle."""
    source = x if context is None else context

    def heads(y, size):
        return y.unflatten(-1, (-1, size))

    def convolved(y, weight):  # nn.Conv1d, depthwise
        taps = weight.shape[1]
        ends = (taps - 1, 0) if layer.causal else (taps - 1 - (taps - 1) // 2, (taps - 1) // 2)
        y = F.pad(y.transpose(1, 2), ends)
        return F.conv1d(y, weight.unsqueeze(1), groups=weight.shape[0]).transpose(1, 2)

    q, k, v = layer.q_proj(x), layer.k_proj(source), layer.v_proj(source)
    if layer.conv_size:
        sizes = [y.shape[-1] for y in (q, k, v)]
        q, k, v = (convolved(y, w) for y, w in zip((q, k, v), layer.conv_weight.split(sizes), strict=True))
    q, k, v = heads(q, layer.head_dim), heads(k, layer.head_dim), heads(v, layer.value_dim)
    if layer.rope is not None:
        q, k = rotated(q, layer.rope), rotated(k, layer.rope)
    log_decay = None
    if layer.decay in ("learned", "per_token"):
        logit = layer.decay_logit
        if layer.decay == "per_token":
            logit = logit + layer.decay_proj(x)
        log_decay = torch.log(torch.sigmoid(logit))
    elif layer.decay is not None:
        log_decay = layer.fixed_log_decay
    out = oracle(
        q, k, v, layer.hyperplanes, layer.log_beta.exp(), causal=layer.causal, scale=layer.scale, log_decay=log_decay,
        readout=layer.readout,
    )  # fmt: skip
    if layer.norm_gate:
        gate = F.silu(layer.gate_proj(x)).unflatten(-1, out.shape[-2:])
        out = layer.norm.weight * out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gate
    return layer.out_proj(out.flatten(-2))


def rotated(x, base):
    """Rotary positions as multiplication by complex units."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(half, dtype=FLOAT64) / half)
    unit = torch.polar(torch.ones_like(angle), angle)[None, :, None]
    turned = torch.complex(x[..., :half], x[..., half:]) * unit
    return torch.cat((turned.real, turned.imag), dim=-1)


def gradients(layer, x, out):
    """Of every parameter and of x, for a fixed functional of the output."""
    generator = torch.Generator().manual_seed(8)
    weight = torch.randn(out.shape, generator=generator, dtype=FLOAT64).to(out)
    names, wanted = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad(
        (out * weight).sum(), (x, *wanted), allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return dict(zip(("x", *names), found, strict=True))


def assert_same(layer, x, out, right):
    """Equal outputs and gradients; both computed from x."""
    assert_within_budget(out, right, FLOAT64)
    expected = gradients(layer, x, right)
    for name, gradient in gradients(layer, x, out).items():
        assert_within_budget(gradient, expected[name], FLOAT64, "backward", name=name, scale=1e-3)


# ------------------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize(("name", "causal"), LAYERS)
def test_layer_written_out(name, causal):
    layer, x = make(name, causal), tokens().requires_grad_()
    assert_same(layer, x, layer(x), written_out(layer, x))


@pytest.mark.parametrize("name", [name for name, options in OPTIONS.items() if not options.get("causal")])
def test_cross_attention(name):
    layer, x, context = make(name, causal=False), tokens().requires_grad_(), tokens(length=17, seed=1)
    assert_same(layer, x, layer(x, context), written_out(layer, x, context))


@pytest.mark.parametrize(("name", "causal"), LAYERS)
def test_torch_func_looks_into_the_layer(name, causal):
    """Gradients of each sample alone, and forward mode: the reference serves, and what is around it has them too."""
    layer, x = make(name, causal), tokens()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    alone = torch.func.vmap(torch.func.grad(lambda p, row: loss(p, row[None])), in_dims=(None, 0))(parameters, x)
    together = torch.func.grad(loss)(parameters, x)
    for of, gradient in together.items():
        assert relative_error(alone[of].sum(0), gradient) < 1e-9, of
    _, slope = torch.func.jvp(lambda x: loss(parameters, x), (x,), (torch.ones_like(x),))
    (gradient,) = torch.autograd.grad(loss(parameters, x.requires_grad_()), x)
    assert relative_error(slope, gradient.sum()) < 1e-9


@pytest.mark.parametrize(("name", "causal"), LAYERS)
def test_every_parameter_is_trained(name, causal):
    layer = make(name, causal)
    layer(tokens()).square().sum().backward()
    for parameter, x in layer.named_parameters():
        assert x.grad is not None, parameter
        assert x.grad.any(), parameter


@pytest.mark.parametrize("name", ["plain", "all"])
def test_training_lowers_the_loss(name):
    layer = make(name, dtype=torch.float32, causal=True)
    x = tokens(dtype=torch.float32)
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(layer(x), x.roll(1, dims=1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("name", "causal"), LAYERS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 1)], ids=str)
def test_nothing_and_one_token(name, causal, shape):
    layer, x = make(name, causal), tokens(*shape).requires_grad_()
    out = layer(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.isfinite().all()


# ------------------------------------------------------------------------------- state, packing, padding


def run_in_segments(layer, x, sizes, **options):
    outs, state, begin = [], None, 0
    for size in sizes:
        out, state = layer(x[:, begin : begin + size], state=state, return_state=True, **options)
        outs.append(out)
        begin += size
    assert begin == x.shape[1]
    return torch.cat(outs, dim=1), state


def assert_same_state(actual: RaceAttentionState, right: RaceAttentionState):
    assert torch.equal(actual.position, right.position)
    assert torch.equal(actual.core.tokens, right.core.tokens)
    for field in ("mass", "value_sum", "log_decay"):
        assert_within_budget(getattr(actual.core, field), getattr(right.core, field), FLOAT64, name=field)
    assert (actual.conv is None) == (right.conv is None)
    if right.conv is not None:
        assert_within_budget(actual.conv, right.conv, FLOAT64, name="conv")


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("sizes", [(11,), (1, 2, 8), (5, 0, 6), (1,) * 11], ids=str)
def test_segments_are_the_whole(name, sizes):
    layer, x = make(name), tokens().requires_grad_()
    whole, after = layer(x, return_state=True)
    out, state = run_in_segments(layer, x, sizes)
    assert_same(layer, x, out, whole)
    assert_same_state(state, after)


@pytest.mark.parametrize("name", CAUSAL)
def test_step_by_step_is_the_whole(name):
    layer, x = make(name), tokens()
    state, outs = None, []
    for t in range(x.shape[1]):
        out, state = layer.step(x[:, t], state)
        outs.append(out)
    whole, after = layer(x, return_state=True)
    assert_within_budget(torch.stack(outs, dim=1), whole, FLOAT64)
    assert_same_state(state, after)


@pytest.mark.parametrize(("name", "causal"), LAYERS)
@pytest.mark.parametrize("lengths", [(11,), (4, 0, 1, 6)], ids=str)
def test_packed_is_each_sequence_alone(name, causal, lengths):
    layer, x = make(name, causal), tokens(batch=1).requires_grad_()
    ends = torch.tensor([0, *lengths]).cumsum(0)
    right = torch.cat([layer(part) for part in x.split(lengths, dim=1)], dim=1)
    for offsets in (ends, ends.int()):
        assert_same(layer, x, layer(x, cu_seqlens=offsets), right)


@pytest.mark.parametrize("name", CAUSAL)
def test_packed_continues_from_states(name):
    """Two packed calls, each sequence going on where it stopped, one of them empty now and then."""
    layer, x = make(name), tokens(batch=1, length=20)
    first, second = (3, 0, 2, 4), (1, 5, 0, 5)
    pieces = x.split((*first, *second), dim=1)
    calls = [
        (torch.cat(part, dim=1), torch.tensor([0, *lengths]).cumsum(0))
        for part, lengths in ((pieces[:4], first), (pieces[4:], second))
    ]
    early, state = layer(calls[0][0], cu_seqlens=calls[0][1], return_state=True)
    late, state = layer(calls[1][0], cu_seqlens=calls[1][1], state=state, return_state=True)
    for row in range(4):
        alone, after = layer(torch.cat((pieces[row], pieces[4 + row]), dim=1), return_state=True)
        together = torch.cat((early.split(first, dim=1)[row], late.split(second, dim=1)[row]), dim=1)
        assert_within_budget(together, alone, FLOAT64)
        assert_same_state(state.select([row]), after)


@pytest.mark.parametrize(("name", "causal"), LAYERS)
@pytest.mark.parametrize("where", ["left", "right", "anywhere", "everything"])
def test_padding_has_no_effect(name, causal, where):
    layer, x = make(name, causal), tokens(length=14)
    padding = {
        "left": torch.arange(14) < torch.tensor([[3], [8]]),
        "right": torch.arange(14) >= torch.tensor([[14], [6]]),
        "anywhere": torch.rand(2, 14, generator=torch.Generator().manual_seed(3)) < 0.4,
        "everything": torch.arange(2)[:, None].expand(2, 14) == 1,
    }[where]
    x = torch.where(padding[..., None], 50 * x, x).requires_grad_()
    out = layer(x, key_padding_mask=padding)
    assert out.isfinite().all()
    right = [layer(x[row : row + 1, ~padding[row]]) for row in range(2)]
    alone = torch.cat([y[0] for y in right])
    assert_same(layer, x, out[~padding], alone)
    assert not gradients(layer, x, out[~padding])["x"][padding].any()


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_and_states(name):
    """Segments with padding anywhere, then a step: as if the padding had never been there."""
    layer, x = make(name), tokens(length=14)
    padding = torch.rand(2, 14, generator=torch.Generator().manual_seed(3)) < 0.4
    outs, state = [], None
    for begin, end in ((0, 5), (5, 6), (6, 14)):
        part = slice(begin, end)
        out, state = layer(x[:, part], key_padding_mask=padding[:, part], state=state, return_state=True)
        outs.append(out)
    last = tokens(length=1, seed=5)
    out, state = layer.step(last[:, 0], state)
    outs = torch.cat(outs, dim=1)
    for row in range(2):
        real = torch.cat((x[row : row + 1, ~padding[row]], last[row : row + 1]), dim=1)
        alone, after = layer(real, return_state=True)
        assert_within_budget(torch.cat((outs[row, ~padding[row]], out[row : row + 1])), alone[0], FLOAT64)
        assert_same_state(state.select([row]), after)


@pytest.mark.parametrize("name", ["plain", "grouped", "rotary", "convolution", "gate"])
def test_padding_in_the_context(name):
    layer, x, context = make(name, causal=False), tokens(), tokens(length=9, seed=1)
    padding = torch.rand(2, 9, generator=torch.Generator().manual_seed(3)) < 0.5
    out = layer(x, context, key_padding_mask=padding)
    for row in range(2):
        alone = layer(x[row : row + 1], context[row : row + 1, ~padding[row]])
        assert_within_budget(out[row : row + 1], alone, FLOAT64)


@pytest.mark.parametrize("name", ["plain", "grouped", "gate"])
def test_state_of_a_full_layer_is_extra_keys(name):
    layer, x, more = make(name, causal=False), tokens(), tokens(length=6, seed=1)
    _, state = layer(more, return_state=True)
    out = layer(x, state=state)
    assert_within_budget(out, layer(x, torch.cat((more, x), dim=1)), FLOAT64)


def test_forked_state():
    """Beam search: rows of a state selected, and each going its own way."""
    layer, x = make("all"), tokens()
    _, state = layer(x, return_state=True)
    forked, more = state.select([1, 1, 0]), tokens(batch=3, length=4, seed=2)
    out = layer(more, state=forked)
    whole = layer(torch.cat((x[[1, 1, 0]], more), dim=1))
    assert_within_budget(out, whole[:, -4:], FLOAT64)


def test_state_carries_gradients_and_detach_cuts_them():
    layer, x = make("all"), tokens().requires_grad_()
    _, state = layer(x, return_state=True)
    more = tokens(length=3, seed=2)
    assert torch.autograd.grad(layer(more, state=state).sum(), x, retain_graph=True)[0].any()
    detached = layer(more, state=state.detach()).sum()
    assert torch.autograd.grad(detached, x, allow_unused=True)[0] is None


def test_state_file(tmp_path):
    layer, x = make("all"), tokens()
    _, state = layer(x, return_state=True)
    state.save(tmp_path / "state", **layer.hash())
    loaded = RaceAttentionState.load(tmp_path / "state", **layer.hash())
    more = tokens(length=3, seed=2)
    assert torch.equal(layer(more, state=loaded), layer(more, state=state))
    other = make("all", seed=99)
    with pytest.raises(ValueError, match="another hash"):
        RaceAttentionState.load(tmp_path / "state", **other.hash())
    with pytest.raises(ValueError, match="format"):
        RaceState.load(tmp_path / "state", **layer.hash())
    (tmp_path / "cut").write_bytes((tmp_path / "state").read_bytes()[:-7])
    with pytest.raises(ValueError, match="cut short"):
        RaceAttentionState.load(tmp_path / "cut", **layer.hash())
    state.core.save(tmp_path / "core", **layer.hash())
    with pytest.raises(ValueError, match="format"):
        RaceAttentionState.load(tmp_path / "core", **layer.hash())


def test_states_are_values():
    layer, x = make("all"), tokens()
    _, state = layer(x, return_state=True)
    kept = state.clone()
    layer(x, state=state, return_state=True)
    layer.step(x[:, 0], state)
    assert torch.equal(kept.core.value_sum, state.core.value_sum)
    assert torch.equal(kept.conv, state.conv)
    assert torch.equal(kept.position, state.position)
    moved = state.to("meta")
    assert {moved.core.mass.device.type, moved.conv.device.type, moved.position.device.type} == {"meta"}


# --------------------------------------------------------------------------------------------- as a module


#: Names in checkpoints; they are part of the interface.
PLAIN_NAMES = {"q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight", "hyperplanes", "log_beta"}
ALL_NAMES = PLAIN_NAMES | {
    "q_proj.bias", "k_proj.bias", "v_proj.bias", "out_proj.bias",
    "conv_weight", "decay_logit", "decay_proj.weight", "norm.weight", "gate_proj.weight",
}  # fmt: skip


def test_names_in_checkpoints_are_stable():
    assert set(make("plain").state_dict()) == PLAIN_NAMES
    assert set(make("all").state_dict()) == ALL_NAMES
    assert set(make("multiscale").state_dict()) == PLAIN_NAMES | {"fixed_log_decay"}
    fixed = make("hash", learn_hyperplanes=False)
    assert {name for name, _ in fixed.named_parameters()} == {n for n in PLAIN_NAMES if n.endswith("weight")}


@pytest.mark.parametrize(("name", "causal"), LAYERS)
def test_state_dict_round_trip(name, causal):
    """A checkpoint holds all there is: another seed and other weights are overwritten by it."""
    layer, other = make(name, causal), make(name, causal, seed=123)
    torch.manual_seed(50)
    other.reset_parameters()
    x = tokens()
    assert not torch.equal(layer(x), other(x))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize(("name", "causal"), LAYERS)
def test_deepcopy(name, causal):
    layer, x = make(name, causal), tokens()
    twin = copy.deepcopy(layer)
    before = layer(x)
    assert torch.equal(twin(x), before)
    twin(x).sum().backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert torch.equal(layer(x), before)
    assert all(parameter.grad is None for parameter in layer.parameters())


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize(
    "name", ["hyperplanes", "log_beta", "conv_weight", "decay_logit", "q_proj.weight", "norm.weight"]
)
def test_parametrizations_are_seen(name):
    """What torch.nn.utils.parametrize puts in place of a parameter is what forward uses, and it is trained."""
    layer, x = make("all"), tokens()
    doubled = copy.deepcopy(layer)
    owner = doubled.get_submodule(name.rpartition(".")[0])
    with torch.no_grad():
        getattr(owner, name.rpartition(".")[2]).mul_(2)
    module, _, parameter = name.rpartition(".")
    parametrize.register_parametrization(layer.get_submodule(module), parameter, Doubled())
    assert torch.equal(layer(x), doubled(x))
    layer(x).square().sum().backward()
    originals = layer.get_submodule(module).parametrizations
    assert originals[parameter].original.grad.any()


def test_weight_norm_and_pruning_hooks_work():
    layer, x = make("plain"), tokens()
    before = layer(x)
    torch.nn.utils.parametrizations.weight_norm(layer.out_proj)
    assert_within_budget(layer(x), before, FLOAT64)


@pytest.mark.parametrize("name", ["q_proj", "decay_proj", "gate_proj"])
def test_a_pruned_projection_is_trained_on(name):
    """Pruning of torch puts the masked weight in place before each forward of the module, for that one alone."""
    layer, x = make("all"), tokens()
    pruned = layer.get_submodule(name)
    torch.nn.utils.prune.random_unstructured(pruned, "weight", 0.5)
    for _ in range(2):
        layer(x).square().sum().backward()
        assert pruned.weight_orig.grad.any()
        with torch.no_grad():
            pruned.weight_orig.add_(0.1 * torch.randn_like(pruned.weight_orig))
    out = layer(x)
    torch.nn.utils.prune.remove(pruned, "weight")
    assert torch.equal(layer(x), out)


class Adapted(nn.Module):
    """A linear function with a term of low rank beside it, as adapters have it; no nn.Linear."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight = base, base.weight
        self.low = nn.Parameter(torch.ones(base.out_features, base.in_features, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + F.linear(x, self.low)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj", "decay_proj", "gate_proj"])
def test_modules_in_the_place_of_projections_are_asked(name):
    layer, x = make("all"), tokens()
    merged = copy.deepcopy(layer)
    with torch.no_grad():
        merged.get_submodule(name).weight.add_(1.0)
    setattr(layer, name, Adapted(layer.get_submodule(name)))
    out = layer(x)
    assert relative_error(out, merged(x)) < 1e-12
    out.sum().backward()
    assert layer.get_submodule(name).low.grad.any()


def test_a_norm_in_the_place_of_the_norm_is_asked():
    layer, x = make("all"), tokens()
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        doubled.norm.weight.mul_(2)
    handle = layer.norm.register_forward_hook(lambda module, given, out: 2 * out)
    assert relative_error(layer(x), doubled(x)) < 1e-12
    handle.remove()
    layer.norm = nn.Sequential(layer.norm, Doubled())
    assert relative_error(layer(x), doubled(x)) < 1e-12


def test_reset_parameters_starts_over():
    """Parameters are torch's generator's, hyperplanes the seed's alone."""
    first, second = (make("all") for _ in range(2))
    torch.manual_seed(5)
    first.reset_parameters()
    torch.manual_seed(5)
    second.reset_parameters()
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))
    torch.manual_seed(6)
    second.reset_parameters()
    assert torch.equal(first.hyperplanes, second.hyperplanes)
    assert not torch.equal(first.q_proj.weight, second.q_proj.weight)
    drawn = sample_hyperplanes(2, 2, 3, 6, seed=0, orthogonal=True, dtype=FLOAT64)
    assert_within_budget(first.hyperplanes, drawn, torch.float32)


def test_made_on_a_device_of_its_own():
    """Whatever torch's default device is."""
    with torch.device("meta"):
        layer = RaceAttention(EMBED, 2, device="cpu", dtype=FLOAT64)
    assert torch.equal(layer.hyperplanes, RaceAttention(EMBED, 2, dtype=FLOAT64).hyperplanes)


def test_made_on_meta_then_materialised():
    """As large models are loaded: reset_parameters restores the buffers too."""
    options = {**OPTIONS["multiscale"], "dtype": FLOAT64}
    right = RaceAttention(EMBED, **options)
    layer = RaceAttention(EMBED, **options, device="meta").to_empty(device="cpu")
    for one in (right, layer):
        torch.manual_seed(3)
        one.reset_parameters()
    assert all(torch.equal(x, right.state_dict()[name]) for name, x in layer.state_dict().items())


@pytest.mark.parametrize("name", ["plain", "grouped", "all"])
def test_forward_on_meta(name):
    layer, x = make(name).to("meta"), tokens().to("meta")
    out, state = layer(x, return_state=True)
    assert (out.shape, out.device.type, state.core.mass.device.type) == (x.shape, "meta", "meta")


@pytest.mark.parametrize(("name", "causal"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_layer_in_another_dtype(name, causal, dtype):
    double = make(name, causal)
    layer, x = copy.deepcopy(double).to(dtype), tokens()
    out, *state = layer(x.to(dtype), return_state=True) if causal else (layer(x.to(dtype)),)
    assert out.dtype == dtype
    assert relative_error(out, double(x)) < {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    assert all(s.core.dtype == FLOAT64 for s in state)
    out.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize(("name", "causal"), LAYERS)
def test_autocast(name, causal):
    """Under bfloat16 autocast a float32 layer works in bfloat16, its hash, decay and states do not."""
    layer, x = make(name, causal, dtype=torch.float32), tokens(dtype=torch.float32).requires_grad_()
    right = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, *state = layer(x, return_state=True) if causal else (layer(x),)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, right) < 5e-2
    out.float().square().sum().backward()
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    if state and layer.decay is not None and layer.decay != "per_token":
        with torch.no_grad():
            plain = layer(x, return_state=True)[1]
        assert torch.equal(state[0].core.log_decay, plain.core.log_decay)
    if state:
        assert state[0].core.dtype == FLOAT64


def test_autocast_segments_are_the_whole():
    layer, x = make("all", dtype=torch.float32), tokens(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out, _ = run_in_segments(layer, x, (4, 1, 6))
        assert relative_error(out, layer(x)) < 1e-2


# ------------------------------------------------------------------------------------------------- dropout


def kept_keys(layer, x, **options):
    """How many keys each row, head and table counted: a key adds 1 to the mass of a table."""
    _, state = layer(x, return_state=True, **options)
    return state.core.mass.sum(-1)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_drops_keys(share):
    layer, x = make("grouped", dropout=share), tokens(length=400)
    kept = kept_keys(layer, x)  # [B, G, L]
    assert_within_budget(kept, kept.round(), FLOAT64)  # whole keys
    assert_within_budget(kept, kept[:, :, :1].expand_as(kept), FLOAT64)  # in every table the same
    counts = kept[:, :, 0].round()
    assert torch.unique(counts).numel() > 2  # each row and head draws its own: of four, at most two agree by chance
    assert (counts[:, 0] != counts[:, 1]).any()
    deviation = math.sqrt(share * (1 - share) / counts.numel() / 400)
    assert abs(counts.mean().item() / 400 - (1 - share)) < 4.5 * deviation


def test_dropout_is_off_in_eval_and_at_zero():
    x = tokens()
    plain, layer = make("all"), make("all", dropout=0.5)
    assert not torch.equal(layer(x), plain(x))
    assert torch.equal(layer.eval()(x), plain(x))
    assert torch.equal(layer.train()(x), layer(x)) is False


def test_dropout_follows_torchs_seed():
    layer, x = make("all", dropout=0.5), tokens()
    torch.manual_seed(9)
    first = layer(x)
    torch.manual_seed(9)
    assert torch.equal(first, layer(x))


def test_dropout_needs_no_scaling():
    """Mass and value go together: of equal values the mean stays the value, whatever is dropped."""
    layer = make("plain", dropout=0.5, causal=False)
    x = tokens(length=60)[:, :1].expand(-1, 60, -1)
    assert_within_budget(layer(x), layer.eval()(x), FLOAT64)


def test_dropout_spares_padding_and_gradients_follow_it():
    layer, x = make("plain", dropout=0.4, causal=True), tokens(length=50).requires_grad_()
    padding = torch.arange(50) >= torch.tensor([[30], [50]])
    kept = kept_keys(layer, x, key_padding_mask=padding)
    assert (kept[0] <= 30).all()
    torch.manual_seed(4)
    out = layer(x, key_padding_mask=padding)
    assert out.isfinite().all()
    assert torch.autograd.grad(out[~padding].sum(), x)[0].isfinite().all()


# ------------------------------------------------------------------------------------------------- rotary


def test_rotation_is_relative():
    """Inner products of rotated vectors depend on the distance of their positions alone; lengths stay."""
    q, k = tokens(1, 1)[:, :, None, :8], tokens(1, 1, seed=1)[:, :, None, :8]

    def product(i, j):
        return (rotate(q, torch.tensor([[i]]), 30.0) * rotate(k, torch.tensor([[j]]), 30.0)).sum().item()

    assert product(5, 2) == pytest.approx(product(105, 102), rel=1e-12)
    assert product(5, 2) == pytest.approx(product(3, 0), rel=1e-12)
    assert product(5, 2) != pytest.approx(product(2, 5), rel=1e-3)
    assert rotate(q, torch.tensor([[77]]), 30.0).norm().item() == pytest.approx(q.norm().item(), rel=1e-12)
    assert torch.equal(rotate(q, torch.tensor([[0]]), 30.0), q)


def test_rotation_keeps_its_digits_far_out():
    x = tokens(1, 1, dtype=torch.float32)[:, :, None, :8]
    far = torch.tensor([[2**24 + 3]])
    assert_within_budget(rotate(x, far, 1e4), rotate(x.double(), far, 1e4), torch.float32)


def test_compiled_rotation_equals_the_plain_one():
    """The compiler calls the angles, which it must not work out for each element; many positions and both dtypes."""
    explained = []

    def count(graph, inputs):
        explained.append(sum("rotary_cosines" in str(node.target) for node in graph.graph.nodes))
        return graph

    position = torch.tensor([[0, 1, 5, 2**24 + 3]])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = tokens(2, 4, dtype=dtype)[:, :, None, :8]
        torch._dynamo.reset()
        turned = torch.compile(rotate, backend=count, fullgraph=True)(x, position, 1e4)
        assert torch.equal(turned, rotate(x, position, 1e4))
    assert explained == [1, 1, 1]
    torch.library.opcheck(torch.ops.race_attention.rotary_cosines.default, (position, 4, 1e4, False))


def test_rotary_positions_go_on_with_the_state():
    layer, x = make("rotary"), tokens()
    _, state = layer(x, return_state=True)
    assert state.position.tolist() == [11, 11]
    assert layer(x, state=state, return_state=True)[1].position.tolist() == [22, 22]


# ------------------------------------------------------------------------------------- decay, beta, repr


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 8, 16])
def test_multiscale_decay(heads):
    log_decay = multiscale_log_decay(heads)
    assert log_decay.shape == (heads,)
    assert (log_decay <= 0).all()
    steady = (log_decay == 0).sum().item()
    assert steady == (max(1, heads // 4) if heads > 1 else 0)
    fading = -1 / log_decay[: heads - steady]
    assert fading[0].item() == pytest.approx(16)
    if len(fading) > 1:
        assert fading[-1].item() == pytest.approx(2048)
    if len(fading) > 2:
        ratios = fading[1:] / fading[:-1]
        assert_within_budget(ratios, ratios[:1].expand_as(ratios), FLOAT64)  # log-spaced


def test_decay_of_one_is_none():
    options = {**OPTIONS["plain"], "causal": True, "dtype": FLOAT64}
    torch.manual_seed(0)
    plain = RaceAttention(EMBED, **options)
    torch.manual_seed(0)
    assert torch.equal(RaceAttention(EMBED, **options, decay=1.0)(tokens()), plain(tokens()))


@pytest.mark.parametrize("logarithm", [-1e3, 0.0, 1e3])
def test_beta_stays_in_its_range(logarithm):
    """However far training moves its logarithm, beta is one that race_attention takes."""
    layer = make("plain")
    with torch.no_grad():
        layer.log_beta.fill_(logarithm)
    assert ((layer.beta > 0) & (layer.beta <= 1e4)).all()
    out = layer(tokens())
    out.sum().backward()
    assert out.isfinite().all()
    assert layer.log_beta.grad.isfinite().all()


def test_extreme_tokens_stay_finite():
    for magnitude in (1e-30, 1e4):
        layer = make("all", dtype=torch.float32)
        x = (magnitude * tokens(dtype=torch.float32)).requires_grad_()
        out = layer(x)
        out.sum().backward()
        assert out.isfinite().all()
        assert x.grad.isfinite().all()


def test_repr_shows_the_settings():
    text = repr(make("all", dropout=0.1))
    for part in ("num_heads=4", "num_kv_heads=2", "head_dim=6", "value_dim=5", "tables=2", "planes=3", "causal=True",
                 "conv_size=3", "decay='per_token'", "dropout=0.1", "rope=50.0", "learn_hyperplanes=True"):  # fmt: skip
        assert part in text
    assert "conv_size" not in repr(make("plain"))
    assert "readout" not in repr(make("plain"))
    assert "readout='bucket'" in repr(make("bucket"))


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_heads": 5}, ValueError, r"embed_dim: got 12, allowed is a multiple of num_heads = 5"),
        ({"num_heads": 0}, ValueError, r"num_heads: got 0, allowed is 1 or more"),
        ({"num_heads": 2.0}, TypeError, r"num_heads: got 2.0, allowed is an integer"),
        ({"num_kv_heads": 2}, ValueError, r"num_kv_heads: got 2, allowed is a divisor of num_heads = 3"),
        ({"num_kv_heads": 0}, ValueError, r"num_kv_heads: got 0, allowed is 1 or more"),
        ({"head_dim": 0}, ValueError, r"head_dim: got 0, allowed is 1 or more"),
        ({"value_dim": -1}, ValueError, r"value_dim: got -1, allowed is 1 or more"),
        ({"tables": 0}, ValueError, r"tables: got 0, allowed is 1 or more"),
        ({"planes": 40}, ValueError, r"planes: got 40, allowed is 1 to \d+"),
        ({"beta": 0.0}, ValueError, r"beta: got 0.0, allowed is in \(0, 10000\]"),
        ({"beta": float("nan")}, ValueError, r"beta: got nan, allowed is in \(0, 10000\]"),
        ({"beta": "2"}, TypeError, r"beta: got '2', allowed is a number"),
        ({"readout": "mean"}, ValueError, r"readout: got 'mean', allowed are 'global', 'bucket'"),
        ({"scale": -1.0}, ValueError, r"scale: got -1.0, allowed is finite and positive"),
        ({"conv_size": -1}, ValueError, r"conv_size: got -1, allowed is 0 or more"),
        ({"conv_size": 1.5}, TypeError, r"conv_size: got 1.5, allowed is an integer"),
        ({"decay": 0.9}, ValueError, r"decay: got 0.9 with causal=False, allowed is None"),
        ({"decay": "slow", "causal": True}, ValueError, r"decay: got 'slow', allowed is None, a number in \(0, 1\]"),
        ({"decay": 1.5, "causal": True}, ValueError, r"decay: got 1.5, allowed is in \(0, 1\]"),
        ({"decay": 0.0, "causal": True}, ValueError, r"decay: got 0.0, allowed is in \(0, 1\]"),
        ({"decay": True, "causal": True}, TypeError, r"decay: got True, allowed is a number"),
        ({"dropout": 1.0}, ValueError, r"dropout: got 1.0, allowed is in \[0, 1\)"),
        ({"dropout": -0.1}, ValueError, r"dropout: got -0.1, allowed is in \[0, 1\)"),
        ({"dropout": float("nan")}, ValueError, r"dropout: got nan, allowed is in"),
        ({"dropout": "0"}, TypeError, r"dropout: got '0', allowed is a number"),
        ({"rope": 100.0, "head_dim": 5}, ValueError, r"rope: got 100.0 with head_dim = 5, allowed is an even head_dim"),
        ({"rope": -1.0, "head_dim": 4}, ValueError, r"rope: got -1.0, allowed is in \(0, inf\)"),
        ({"embed_dim": "12"}, TypeError, r"embed_dim: got '12', allowed is an integer"),
        ({"causal": 1}, TypeError, r"causal: got 1, allowed is a bool"),
        ({"norm_gate": "silu"}, TypeError, r"norm_gate: got 'silu', allowed is a bool"),
        ({"hyperplanes_per_head": None}, TypeError, r"hyperplanes_per_head: got None, allowed is a bool"),
        ({"seed": "a"}, TypeError, r"seed: got 'a', allowed is an integer"),
        ({"seed": 2**64}, ValueError, r"seed: got \d+, allowed is -\d+ to \d+"),
        ({"dtype": torch.int32}, TypeError, r"dtype: got torch.int32, allowed is a floating dtype"),
    ],
)  # fmt: skip
def test_bad_constructor_arguments(change, error, message):
    with pytest.raises(error, match=message):
        RaceAttention(**{"embed_dim": EMBED, "num_heads": 3, **change})


def bools(*shape):
    return torch.zeros(*shape, dtype=torch.bool)


FORWARD_ERRORS = [
    ("plain", True, {"x": torch.zeros(2, 11, 13)}, ValueError, r"x: got shape \[2, 11, 13\], allowed is \[B, T, 12\]"),
    ("plain", True, {"x": torch.zeros(11, 12)}, ValueError, r"x: got shape \[11, 12\], allowed is \[B, T, 12\]"),
    ("plain", True, {"x": torch.zeros(2, 11, 12).int()}, TypeError, r"x: got torch.int32, allowed is a floating dtype"),
    ("plain", True, {"x": [0.0]}, TypeError, r"x: got list, allowed is a Tensor"),
    ("plain", False, {"context": torch.zeros(2, 5, 3)}, ValueError, r"context: got shape \[2, 5, 3\], allowed is \[B"),
    ("plain", False, {"context": torch.zeros(3, 5, 12)}, ValueError, r"context: got batch 3, allowed is .* 2"),
    ("plain", True, {"context": torch.zeros(2, 5, 12)}, ValueError, r"context: got a tensor with a causal layer"),
    ("plain", True, {"key_padding_mask": bools(2, 10)}, ValueError, r"key_padding_mask: got shape \[2, 10\]"),
    ("plain", True, {"key_padding_mask": torch.zeros(2, 11)}, TypeError, r"key_padding_mask: got torch.float32"),
    ("plain", True, {"cu_seqlens": torch.tensor([0, 11])}, ValueError, r"cu_seqlens: got .* batch 2, allowed is 1"),
    ("plain", True, {"key_padding_mask": [[True]]}, TypeError, r"key_padding_mask: got list, allowed is a Tensor"),
    ("plain", False, {"context": torch.zeros(2, 5, 12, device="meta")}, ValueError, r"context: got a tensor on meta"),
    ("plain", True, {"state": 3}, TypeError, r"state: got int, allowed is RaceAttentionState"),
    ("plain", True, {"state": RaceState.zeros(2, 3, 4, 4, 4)}, TypeError, r"state: got RaceState, allowed is RaceAtt"),
    ("convolution", False, {"return_state": True}, ValueError, r"state: got .*allowed is none for conv_size"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "causal", "change", "error", "message"), FORWARD_ERRORS)
def test_bad_forward_arguments(name, causal, change, error, message):
    layer = make(name, causal, dtype=torch.float32)
    with pytest.raises(error, match=message):
        layer(**{"x": tokens(dtype=torch.float32), **change})


OFFSETS = [
    (2, torch.tensor([0, 11]), ValueError, r"cu_seqlens: got x of batch 2, allowed is 1"),
    (1, [0, 11], TypeError, r"cu_seqlens: got list, allowed is a Tensor"),
    (1, torch.tensor([0.0, 11.0]), TypeError, r"cu_seqlens: got torch.float32, allowed is torch.int32 or torch.int64"),
    (1, torch.tensor([[0, 11]]), ValueError, r"cu_seqlens: got shape \[1, 2\], allowed is \[n \+ 1\]"),
    (1, torch.tensor([], dtype=torch.int64), ValueError, r"cu_seqlens: got shape \[0\], allowed is \[n \+ 1\]"),
    (1, torch.tensor([0, 10]), ValueError, r"cu_seqlens: got \[0, 10\], allowed rises from 0 to 11"),
    (1, torch.tensor([0, 12]), ValueError, r"cu_seqlens: got \[0, 12\], allowed rises from 0 to 11"),
    (1, torch.tensor([1, 11]), ValueError, r"cu_seqlens: got \[1, 11\], allowed rises from 0 to 11"),
    (1, torch.tensor([0, 7, 5, 11]), ValueError, r"cu_seqlens: got \[0, 7, 5, 11\], allowed rises from 0 to 11"),
    (1, torch.tensor([0, 11], device="meta"), ValueError, r"cu_seqlens: got a tensor on meta, allowed is x's device"),
]


@pytest.mark.parametrize(("batch", "offsets", "error", "message"), OFFSETS)
@pytest.mark.parametrize(
    ("name", "causal"), [("plain", True), ("convolution", True), ("convolution", False), ("all", True)]
)
def test_bad_offsets(name, causal, batch, offsets, error, message):
    """Convolution and rotation, which come before the core, would take rows of a batch for one, or fail in torch."""
    with pytest.raises(error, match=message):
        make(name, causal)(tokens(batch), cu_seqlens=offsets)


@pytest.mark.parametrize("name", ["plain", "convolution", "all"])
def test_states_and_masks_that_do_not_fit(name):
    layer = make(name)
    _, state = layer(tokens(1), return_state=True)
    with pytest.raises(ValueError, match=r"state: got a state of 1 rows, allowed is 2"):
        layer(tokens(2), state=state)
    with pytest.raises(ValueError, match=r"state: got a state of 1 rows, allowed is 2"):
        layer(tokens(1), cu_seqlens=torch.tensor([0, 4, 11]), state=state)
    with pytest.raises(ValueError, match=r"state: got a tensor on meta, allowed is x's device, cpu"):
        layer(tokens(1), state=state.to("meta"))
    with pytest.raises(ValueError, match=r"key_padding_mask: got a tensor on meta, allowed is x's device, cpu"):
        layer(tokens(2), key_padding_mask=bools(2, 11).to("meta"))


def test_mask_and_packing_exclude_each_other():
    with pytest.raises(ValueError, match=r"key_padding_mask: got a mask with cu_seqlens, allowed is one of them"):
        make("plain")(tokens(1), key_padding_mask=bools(1, 11), cu_seqlens=torch.tensor([0, 11]))


def test_state_of_another_layer_is_refused():
    _, plain = make("plain")(tokens(), return_state=True)
    for name in ("all", "convolution", "grouped"):
        with pytest.raises(ValueError, match=r"state: got .* allowed is"):
            make(name)(tokens(), state=plain)
    _, convolved = make("convolution")(tokens(), return_state=True)
    with pytest.raises(ValueError, match=r"state: got conv .* allowed is None"):
        make("plain")(tokens(), state=convolved)
    with pytest.raises(ValueError, match=r"state: got a state of 2 rows, allowed is 3"):
        make("plain")(tokens(batch=3), state=plain)


def test_step_is_for_causal_layers_and_single_tokens():
    with pytest.raises(ValueError, match=r"step: got a layer with causal=False, allowed is a causal one"):
        make("plain", causal=False).step(tokens()[:, 0])
    with pytest.raises(ValueError, match=r"x: got shape \[2, 11, 12\], allowed is \[B, 12\]"):
        make("plain").step(tokens())
    with pytest.raises(TypeError, match=r"x: got list, allowed is a Tensor"):
        make("plain").step([0.0])


def test_preset_for_language_models_is_the_layer_with_its_options():
    layer = RaceAttention.for_language_models(32, 4, tables=2, planes=3, seed=5)
    same = RaceAttention(
        32,
        4,
        tables=2,
        planes=3,
        seed=5,
        causal=True,
        conv_size=4,
        decay="per_token",
        norm_gate=True,
        rope=10_000.0,
    )
    same.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 32)
    assert torch.equal(layer(x), same(x))
    assert layer.hyperplanes.shape[0] == 4
    learned = RaceAttention.for_language_models(32, 4, learn_hyperplanes=True)
    assert isinstance(learned.hyperplanes, nn.Parameter)
    assert RaceAttention.for_language_models(32, 4, conv_size=0, decay=None).decay is None
    assert RaceAttention.for_language_models(20, 4, rope=None).rope is None
    with pytest.raises(ValueError, match=r"rope: got 10000\.0 with head_dim = 5, allowed is an even head_dim"):
        RaceAttention.for_language_models(20, 4)
    with pytest.raises(ValueError, match="decay: got 'per_token' with causal=False"):
        RaceAttention.for_language_models(32, 4, causal=False)
    with pytest.raises(TypeError, match="magic"):
        RaceAttention.for_language_models(32, 4, magic=1)


def test_preset_of_a_subclass_is_of_that_class():
    class Mine(RaceAttention):
        pass

    assert type(Mine.for_language_models(16, 2)) is Mine


def test_no_row_of_a_state_can_be_selected():
    """All beams of a batch have ended; a list of no rows is no list of integers to torch."""
    _, state = make("all")(tokens(), return_state=True)
    for rows in ([], torch.tensor([], dtype=torch.int64), [False, False]):
        assert state.select(rows).core.batch == state.select(rows).position.shape[0] == 0
