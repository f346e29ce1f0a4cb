"""Properties of any input: finite outputs and gradients, outputs in the hull of the values, no matter the shape.

Every backend, with drawn shapes, strides, masks, decays and extremes; hypothesis is derandomised (conftest.py).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from race_attention import BackendWarning, race_attention
from race_attention.testing import BUDGETS, assert_within_budget, leaves, make_inputs, oracle
from tests.helpers import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    assert_batched_gradients_are_those_of_each,
    assert_negated_views_are_read,
    backend_params,
    in_double,
    skip_unless_runnable,
)

WIDE = pytest.mark.parametrize(("backend", "dtype"), backend_params(dtypes=[FLOAT64, FLOAT32, BFLOAT16]))
ALL = pytest.mark.parametrize(("backend", "dtype"), backend_params())


@st.composite
def shapes(draw, longest: int = 9):
    """Options of make_inputs: any shape from nothing on, any strides, masks, decays."""
    causal = draw(st.booleans())
    groups = draw(st.integers(1, 3))
    options = {
        "heads": groups * draw(st.integers(1, 3)),
        "kv_heads": groups,
        "dim": draw(st.integers(1, 9)),
        "value_dim": draw(st.integers(1, 9)),
        "tables": draw(st.integers(1, 3)),
        "planes": draw(st.integers(1, 4)),
        "shared_hyperplanes": draw(st.booleans()),
        "beta": draw(st.sampled_from(["heads", "scalar", 0.7])),
        "causal": causal,
        "scale": draw(st.sampled_from([1.0, 0.3])),
        "decay": draw(st.sampled_from([None, "head", "token"])) if causal else None,
        "masked": draw(st.sampled_from([0.0, 0.0, 0.4, 1.1])),
        "mask_per_head": draw(st.booleans()),
        "initial_state": draw(st.booleans()),
        "strides": draw(st.sampled_from(["contiguous", "transposed", "expanded", "sliced"])),
        "seed": draw(st.integers(0, 1000)),
    }
    length = st.integers(0, longest)
    if draw(st.booleans()):
        options |= {"batch": draw(st.integers(0, 3)), "tokens": draw(length)}
        if not causal:
            options["keys"] = draw(length)
    else:
        count = draw(st.integers(0, 3))
        lengths = st.lists(length, min_size=count, max_size=count).map(tuple)
        options["lengths"] = draw(lengths)
        if not causal and draw(st.booleans()):
            options["key_lengths"] = draw(lengths)
    return options


def run(inputs, backend):
    """Output and gradients by name, of a fixed random functional of the output."""
    out = race_attention(**inputs, backend=backend.name)
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(out.shape, generator=generator).bfloat16().to(out)
    wanted = leaves(inputs)
    gradients = torch.autograd.grad(
        (out * cotangent).sum(), list(wanted.values()), allow_unused=True, materialize_grads=True
    )
    return out.detach(), dict(zip(wanted, gradients, strict=True))


@ALL
@given(options=shapes())
def test_any_shape_agrees_with_the_oracle(backend, dtype, options):
    skip_unless_runnable(backend)
    inputs = make_inputs(**options, dtype=dtype, device=backend.device, requires_grad=True)
    out, gradients = run(inputs, backend)
    assert out.dtype == dtype
    double = in_double(inputs)
    right = oracle(**double)
    assert_within_budget(out, right, dtype)
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(right.shape, generator=generator).bfloat16().double()
    wanted = leaves(double)
    right_gradients = torch.autograd.grad(
        (right * cotangent).sum(), list(wanted.values()), allow_unused=True, materialize_grads=True
    )
    # Where one key decides, the gradients cancel to nothing: their terms are of the size of output and cotangent.
    size = (right.norm() * cotangent.abs().max()).item() if right.numel() else 0.0
    for name, expected in zip(wanted, right_gradients, strict=True):
        assert gradients[name].dtype == inputs_dtype(inputs, name)
        assert_within_budget(gradients[name], expected, dtype, "backward", scale=size, name=name)


def inputs_dtype(inputs, name):
    return leaves(inputs)[name].dtype


def hull_of(inputs):
    """The least and greatest value that each query may see, [B, Tq, H, Dv] twice, and whether it sees any."""
    value = inputs["value"].detach().double()
    batch, keys, groups, value_dim = value.shape
    share = inputs["query"].shape[2] // groups
    mask = inputs.get("key_mask")
    mask = torch.ones(batch, keys, groups, dtype=torch.bool, device=value.device) if mask is None else mask
    mask = (mask if mask.ndim == 3 else mask[..., None]).expand(batch, keys, groups)[..., None]
    least, most = value.masked_fill(~mask, float("inf")), value.masked_fill(~mask, -float("inf"))
    if inputs.get("causal"):
        least, most = least.cummin(1).values, most.cummax(1).values
    else:
        queries = inputs["query"].shape[1]
        nothing = value.new_zeros(batch, 1, groups, value_dim)
        least = torch.cat((least, nothing + float("inf")), 1).amin(1, keepdim=True).expand(-1, queries, -1, -1)
        most = torch.cat((most, nothing - float("inf")), 1).amax(1, keepdim=True).expand(-1, queries, -1, -1)
    return least.repeat_interleave(share, 2), most.repeat_interleave(share, 2)


def assert_in_hull(out, inputs, dtype):
    """Up to the rounding of the output, and to what float32 can hold of a value times the smallest weight."""
    least, most = hull_of(inputs)
    sees = least <= most
    planes = inputs["hyperplanes"].shape[2]
    size = inputs["value"].detach().double().abs().amax().item() if inputs["value"].numel() else 0.0
    slack = BUDGETS[dtype]["forward"] * size
    if dtype != FLOAT64:
        slack += torch.finfo(torch.float32).tiny * 2.0 ** (13 * planes)
    out = out.double()
    assert ((out >= least - slack) & (out <= most + slack) | ~sees).all()
    assert (out[~sees] == 0).all()


@WIDE
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("huge", [("query", "key"), ("value",), ("query", "key", "value")])
def test_numbers_whose_sums_float32_holds(backend, dtype, causal, huge):
    """Of 1e30: projections add up tens of them, states and gradients thousands. Past 3e38 float32 is infinite."""
    skip_unless_runnable(backend)
    options = {"causal": causal, "tokens": 300, "planes": 3, "decay": "token" if causal else None}
    inputs = make_inputs(**options, dtype=dtype, device=backend.device, requires_grad=True)
    for name in huge:
        inputs[name] = (1e30 * inputs[name].detach().clamp(-1, 1)).requires_grad_()
    out, gradients = run(inputs, backend)
    assert_in_hull(out, inputs, dtype)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@st.composite
def extremes(draw):
    options = draw(shapes(longest=6).filter(lambda options: "lengths" not in options))
    options |= {"initial_state": False, "beta": draw(st.sampled_from([1e-3, 1.0, 1e4]))}
    magnitudes = st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 1e4])
    decay = draw(st.sampled_from([None, 0.0, -1e-30, -1e-4, -50.0, -1e4])) if options["causal"] else None
    return {**options, "decay": None}, {name: draw(magnitudes) for name in ("query", "key", "value")}, decay


@WIDE
@given(drawn=extremes())
def test_extremes_stay_finite_and_in_the_hull(backend, dtype, drawn):
    skip_unless_runnable(backend)
    options, magnitudes, decay = drawn
    inputs = make_inputs(**options, dtype=dtype, device=backend.device)
    for name, magnitude in magnitudes.items():
        inputs[name] = (magnitude * inputs[name]).detach()
    inputs["beta"] = torch.tensor(inputs["beta"], dtype=inputs["hyperplanes"].dtype, device=backend.device)
    if decay is not None:
        shape = inputs["key"].shape[:3]
        inputs["log_decay"] = torch.full(shape, decay, dtype=inputs["hyperplanes"].dtype, device=backend.device)
    for name in ("query", "key", "value", "hyperplanes", "beta", "log_decay"):
        if name in inputs:
            inputs[name].requires_grad_()
    out, gradients = run(inputs, backend)
    assert out.isfinite().all()
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
    if decay is None or decay > -1:  # beyond, what is left of a key may be less than any number: then 0
        assert_in_hull(out, inputs, dtype)


@WIDE
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("planes", [1, 4, 8, 10])
def test_the_only_key_lies_opposite(backend, dtype, causal, planes):
    """Saturated tokens of opposite signs share the least weight there is, 2**-13P: the output is still the value."""
    skip_unless_runnable(backend)
    inputs = make_inputs(
        tokens=1, planes=planes, tables=1, heads=4, beta=1e4, causal=causal, dtype=dtype, device=backend.device
    )
    inputs["key"], inputs["value"] = -100 * inputs["query"], 1e4 * inputs["value"]
    for name in ("query", "key", "value", "hyperplanes"):
        inputs[name].requires_grad_()
    out, gradients = run(inputs, backend)
    assert_within_budget(out, inputs["value"], dtype)
    assert all(g.isfinite().all() for g in gradients.values())


@WIDE
@pytest.mark.parametrize("log_decay", [-1e-3, -9.0, -20.0, -29.3, -43.5, -50.0, -102.0, -1e4])
@pytest.mark.parametrize("readout", ["global", "bucket"])
def test_only_decayed_keys_are_seen(backend, dtype, log_decay, readout):
    """Masked tokens whose past has decayed: what is left passes through every small number there is."""
    skip_unless_runnable(backend)
    if readout == "bucket" and backend.name != "reference":
        pytest.skip("the bucket readout is the reference's alone")
    inputs = make_inputs(tokens=40, causal=True, planes=3, initial_state=True, dtype=dtype, device=backend.device)
    inputs["key_mask"] = torch.arange(40, device=backend.device).expand(2, 40) % 20 == 0
    parameters = inputs["hyperplanes"].dtype
    inputs["log_decay"] = torch.full((2, 40, 2), log_decay, dtype=parameters, device=backend.device)
    for name in ("query", "key", "value", "hyperplanes", "beta", "log_decay"):
        inputs[name] = inputs[name].detach().requires_grad_()
    out, gradients = run({**inputs, "readout": readout}, backend)
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    fresh = inputs["key_mask"] | (log_decay > -1)  # where something of a plain size is seen
    right = oracle(**in_double(inputs), readout=readout)
    assert_within_budget(out[fresh], right[fresh.cpu()], dtype)


@ALL
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [{"tokens": 0}, {"tokens": 1}, {"batch": 0}, {"batch": 0, "tokens": 0}], ids=str)
def test_nothing_and_one(backend, dtype, causal, shape):
    skip_unless_runnable(backend)
    inputs = make_inputs(**shape, causal=causal, dtype=dtype, device=backend.device, requires_grad=True)
    out, state = race_attention(**inputs, return_state=True, backend=backend.name)
    (out.double().sum() + state.value_sum.sum()).backward()
    assert (out.shape, out.dtype) == (inputs["value"].shape, dtype)
    assert state.batch == inputs["key"].shape[0]
    assert torch.equal(state.tokens.cpu(), torch.full((state.batch,), inputs["key"].shape[1]))
    for name, x in leaves(inputs).items():
        assert x.grad is None or x.grad.isfinite().all(), name
    if inputs["key"].shape[1] == 1:
        assert_within_budget(out, inputs["value"], dtype)


@ALL
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("decay", [None, "head", "token"])
@pytest.mark.parametrize("shape", [{"tokens": 0}, {"lengths": ()}, {"lengths": (0, 0)}], ids=str)
def test_without_tokens_there_is_still_a_way_back(backend, dtype, causal, decay, shape):
    """A batch that happens to be empty does not end a training loop: whichever input alone wants a gradient."""
    skip_unless_runnable(backend)
    if decay and not causal:
        pytest.skip("decay is for causal calls")
    for name in ("query", "key", "value", "hyperplanes", "beta", *(["log_decay"] if decay else [])):
        inputs = make_inputs(**shape, causal=causal, decay=decay, dtype=dtype, device=backend.device)
        inputs[name].requires_grad_()
        out, state = race_attention(**inputs, return_state=True, backend=backend.name)
        (out.double().sum() + state.value_sum.sum()).backward()
        assert torch.equal(inputs[name].grad, torch.zeros_like(inputs[name])), name


@ALL
@pytest.mark.parametrize("causal", [False, True])
def test_all_keys_masked_gives_zero_and_zero_gradients(backend, dtype, causal):
    skip_unless_runnable(backend)
    inputs = make_inputs(masked=1.1, causal=causal, dtype=dtype, device=backend.device, requires_grad=True)
    out, gradients = run(inputs, backend)
    assert not out.any()
    assert not any(gradient.any() for gradient in gradients.values())


@ALL
@pytest.mark.parametrize("causal", [False, True])
def test_masked_tokens_are_never_read(backend, dtype, causal):
    """NaN in a masked key or value reaches neither outputs nor gradients."""
    skip_unless_runnable(backend)
    inputs = make_inputs(masked=0.5, causal=causal, dtype=dtype, device=backend.device)
    right = race_attention(**inputs, backend=backend.name)
    hidden = ~inputs["key_mask"][:, :, None, None]
    for name in ("key", "value"):
        inputs[name] = inputs[name].masked_fill(hidden, float("nan"))
    for name in ("query", "key", "value", "hyperplanes", "beta"):
        inputs[name].requires_grad_()
    out, gradients = run(inputs, backend)
    assert torch.equal(out, right)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@ALL
@pytest.mark.parametrize("causal", [False, True])
def test_constant_values_come_out_as_they_are(backend, dtype, causal):
    skip_unless_runnable(backend)
    inputs = make_inputs(tokens=300, causal=causal, dtype=dtype, device=backend.device)
    inputs["value"] = torch.full_like(inputs["value"], -2.5)
    out = race_attention(**inputs, backend=backend.name)
    assert (out.double() + 2.5).abs().max() <= 2.5 * BUDGETS[dtype]["forward"]


@ALL
def test_future_tokens_change_nothing(backend, dtype):
    """Causal means bit for bit: what comes after a token does not touch its output."""
    skip_unless_runnable(backend)
    inputs = make_inputs(tokens=150, causal=True, decay="token", dtype=dtype, device=backend.device)
    before = race_attention(**inputs, backend=backend.name)
    for name in ("query", "key", "value"):
        inputs[name] = inputs[name].clone()
        inputs[name][:, 100:] *= -3
    after = race_attention(**inputs, backend=backend.name)
    assert torch.equal(before[:, :100], after[:, :100])
    assert not torch.equal(before[:, 100:], after[:, 100:])


@ALL
@pytest.mark.parametrize("causal", [False, True])
def test_inputs_are_left_alone_and_runs_repeat(backend, dtype, causal):
    """Nothing is changed in place, and two runs agree bit for bit, gradients included."""
    skip_unless_runnable(backend)
    options = {"tokens": 140, "causal": causal, "initial_state": True, "dtype": dtype, "device": backend.device}
    options["decay"] = "token" if causal else None
    inputs, untouched = (make_inputs(**options, requires_grad=True) for _ in range(2))
    first, second = run(inputs, backend), run(inputs, backend)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    for name, x in leaves(untouched).items():
        assert torch.equal(x, leaves(inputs)[name])


@ALL
def test_float16_and_others_share_the_hash(backend, dtype):
    """Hyperplanes and beta count in float32 whatever the tokens' dtype: bfloat16 copies of them would differ."""
    skip_unless_runnable(backend)
    if dtype not in (BFLOAT16, FLOAT16):
        pytest.skip("only for dtypes narrower than the hash")
    inputs = make_inputs(dtype=dtype, device=backend.device, beta=1.2345678)
    out = race_attention(**inputs, backend=backend.name)
    assert_within_budget(out, oracle(**in_double(inputs)), dtype)


@ALL
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients(backend, dtype):
    skip_unless_runnable(backend)
    assert_batched_gradients_are_those_of_each(backend.name, dtype=dtype, device=backend.device)


@ALL
@pytest.mark.parametrize("packed", [False, True])
def test_views_marked_as_negated(backend, dtype, packed):
    skip_unless_runnable(backend)
    assert_negated_views_are_read(backend.name, packed=packed, dtype=dtype, device=backend.device)


DERIVED = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).double().square().sum())(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).double().square().sum())(x),
    "dual": lambda f, x: _tangent(f, x),
}


def _tangent(function, x):
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        function(x)  # a level is entered, and nothing of it concerns this call
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@ALL
@pytest.mark.parametrize("how", DERIVED)
def test_other_derivatives_are_right_or_refused(backend, dtype, how):
    """Forward mode through an operator with a backward pass alone would be zero without a word."""
    skip_unless_runnable(backend)
    inputs = make_inputs(causal=True, decay="token", dtype=dtype, device=backend.device)
    given = inputs.pop("beta")

    def by(name):
        return DERIVED[how](lambda beta: race_attention(**inputs, beta=beta, backend=name), given)

    if backend.name == "reference":
        assert by("reference").abs().sum() > 0
        return
    with pytest.raises(ValueError, match=r"backend: got .* derivatives in forward mode and those of torch.func"):
        by(backend.name)
    with pytest.warns(BackendWarning, match="derivatives in forward mode"):
        assert_within_budget(by("auto"), by("reference"), dtype, "backward")
