"""RaceState: the algebra of runs, selection, files."""

from __future__ import annotations

import functools
import pickle

import pytest
import torch
from safetensors.torch import save_file

import race_attention as package
from race_attention import RaceAttentionState, RaceState
from race_attention.testing import assert_within_budget, make_inputs, relative_error
from tests.helpers import ALONG_KEYS, ALONG_QUERIES, tokens_between

FLOAT64 = torch.float64
race_attention = functools.partial(package.race_attention, backend="reference")
FIELDS = ("mass", "value_sum", "log_decay", "tokens")


def run(**options):
    options = {"causal": True, "decay": "token", "dtype": FLOAT64, "value_dim": 5, **options}
    inputs = make_inputs(**options)
    return race_attention(**inputs, return_state=True)[1]


def hash_of(inputs):
    return {"hyperplanes": inputs["hyperplanes"], "beta": inputs["beta"], "scale": inputs.get("scale", 1.0)}


def equal(left: RaceState, right: RaceState) -> bool:
    return all(torch.equal(getattr(left, f), getattr(right, f)) for f in FIELDS)


def close(left: RaceState, right: RaceState) -> bool:
    return torch.equal(left.tokens, right.tokens) and all(
        relative_error(getattr(left, f), getattr(right, f)) <= 1e-14 for f in FIELDS[:3]
    )


def test_dtype_does_not_follow_the_inputs():
    for dtype in (torch.bfloat16, torch.float32, FLOAT64):
        after = run(dtype=dtype)
        assert {getattr(after, f).dtype for f in FIELDS[:3]} == {FLOAT64}
        assert after.tokens.dtype == torch.int64
        assert (after.batch, after.device.type, after.dtype) == (2, "cpu", FLOAT64)


def test_merge_is_associative_and_in_order():
    a, b, c = (run(seed=seed, tokens=5 + seed) for seed in range(3))
    assert close((a + b) + c, a + (b + c))
    assert equal(a + b, a.merge(b))
    assert not close(a + b, b + a)  # with decay the order counts
    plain = [run(seed=seed, decay=None) for seed in range(2)]
    assert close(plain[0] + plain[1], plain[1] + plain[0])


def test_zeros_are_neutral():
    a = run()
    nothing = RaceState.zeros(2, 2, 2, 2, 5)
    assert close(nothing + a, a)
    assert close(a + nothing, a)
    assert nothing.dtype == FLOAT64
    assert RaceState.zeros(1, 1, 1, 1, 1, dtype=torch.float32, device="cpu").dtype == torch.float32
    with pytest.raises(ValueError, match="batch: got -1, allowed is 0 or more"):
        RaceState.zeros(-1, 2, 2, 2, 5)
    with pytest.raises(TypeError, match=r"planes: got 2\.0, allowed is an integer"):
        RaceState.zeros(1, 2, 2, 2.0, 5)


def test_merged_runs_are_the_run_of_both():
    inputs = make_inputs(causal=True, decay="token", masked=0.3, dtype=FLOAT64, tokens=17)
    whole = race_attention(**inputs, return_state=True)[1]
    parts = [
        race_attention(**tokens_between(inputs, *ends, ALONG_QUERIES + ALONG_KEYS), return_state=True)[1]
        for ends in ((0, 1), (1, 9), (9, 17))
    ]
    merged = parts[0] + parts[1] + parts[2]
    assert close(merged, whole)
    assert torch.equal(whole.tokens, inputs["key_mask"].sum(1))


@pytest.mark.parametrize("log_decay", [-1e4, -800.0, 0.0])
def test_merge_stays_finite(log_decay):
    late = run()
    late = RaceState(late.mass, late.value_sum, torch.full_like(late.log_decay, log_decay), late.tokens)
    merged = run(seed=1) + late
    assert all(getattr(merged, f).isfinite().all() for f in FIELDS)


def test_merge_carries_gradients():
    a, b = run().clone().requires_grad_(), run(seed=1).clone().requires_grad_()
    merged = a + b
    (merged.mass.sum() + merged.value_sum.sum()).backward()
    assert_within_budget(a.mass.grad, b.log_decay.detach().exp()[..., None, None].expand_as(a.mass), FLOAT64)
    expected = b.log_decay.detach().exp() * (a.mass.sum((2, 3)) + a.value_sum.sum((2, 3, 4))).detach()
    assert_within_budget(b.log_decay.grad, expected, FLOAT64)
    assert not merged.detach().mass.requires_grad


def test_states_are_values():
    """No method changes a state in place, and fields cannot be set."""
    a, b = run(), run(seed=1)
    kept = a.clone()
    a + b, b + a, a.select([0]), a.detach(), a.to(torch.float32)
    race_attention(**make_inputs(causal=True, dtype=FLOAT64, value_dim=5), initial_state=a, return_state=True)
    assert equal(a, kept)
    assert a.clone().mass.data_ptr() != a.mass.data_ptr()
    with pytest.raises(AttributeError):
        a.mass = b.mass


@pytest.mark.parametrize("tokens", [5, 1, 0])
@pytest.mark.parametrize("decay", [None, "token"])
def test_a_new_state_shares_no_memory_with_the_one_before(decay, tokens):
    """So that both can be saved in one file, and no graph of the one is taken for the other's."""
    before = run(decay=decay)
    inputs = make_inputs(causal=True, decay=decay, dtype=FLOAT64, value_dim=5, tokens=tokens)
    after = race_attention(**inputs, initial_state=before, return_state=True)[1]
    for field in FIELDS:
        assert getattr(after, field).data_ptr() != getattr(before, field).data_ptr(), field


def test_to():
    a = run()
    single = a.to(torch.float32)
    assert (single.dtype, single.tokens.dtype) == (torch.float32, torch.int64)
    assert equal(single.to(FLOAT64).to("cpu"), RaceState(*(getattr(single, f).double() for f in FIELDS[:3]), a.tokens))
    assert a.to("meta").tokens.device.type == "meta"


def test_repr_is_of_shapes():
    """Not thousands of numbers, which a GPU would be waited for."""
    text = "RaceState(mass=[2, 3, 4, 8], value_sum=[2, 3, 4, 8, 5], log_decay=[2, 3], tokens=[2], dtype=torch.float64, "
    state = RaceState.zeros(2, 3, 4, 3, 5)
    assert repr(state) == text + "device='cpu')"
    layer = RaceAttentionState(state, torch.zeros(2, dtype=torch.int64))
    assert repr(layer) == f"RaceAttentionState(core={state!r}, position=[2], conv=None)"


def test_pickle_round_trip():
    a = run()
    assert equal(pickle.loads(pickle.dumps(a)), a)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([2, 0], [2, 0]),
        ([1, 1, 1, 0], [1, 1, 1, 0]),
        (torch.tensor([-1]), [2]),
        ([], []),
        (torch.tensor([True, False, True]), [0, 2]),
    ],
)
def test_select(rows, expected):
    a = run(batch=3)
    chosen = a.select(rows)
    assert chosen.batch == len(expected)
    for n, row in enumerate(expected):
        assert all(torch.equal(getattr(chosen, f)[n], getattr(a, f)[row]) for f in FIELDS)


def test_select_continues_like_the_row_itself():
    """Beam search: a forked row goes on as its origin would."""
    inputs = make_inputs(batch=3, causal=True, decay="token", dtype=FLOAT64)
    out, _ = race_attention(**inputs, initial_state=(a := run(batch=3, value_dim=8)), return_state=True)
    forked = {name: x[[2, 2]] if name in ("query", "key", "value", "log_decay") else x for name, x in inputs.items()}
    again = race_attention(**forked, initial_state=a.select([2, 2]))
    assert relative_error(again, out[[2, 2]]) <= 1e-14


@pytest.mark.parametrize("rows", [[3], [-4], torch.tensor([True, False])])
def test_select_of_rows_that_are_not_there(rows):
    with pytest.raises(IndexError):
        run(batch=3).select(rows)


@pytest.mark.parametrize("rows", [[0.5], 1, [[0], [1]]])
def test_select_of_what_are_no_rows(rows):
    with pytest.raises((TypeError, IndexError), match="rows"):
        run(batch=3).select(rows)


# --------------------------------------------------------------------------------------------- bad fields


def fields(**change):
    a = run()
    return {**{f: getattr(a, f) for f in FIELDS}, **change}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mass": torch.zeros(2, 2, 4)}, ValueError, r"mass: got shape \[2, 2, 4\], allowed is \[B, G, L, R\]"),
        ({"value_sum": torch.zeros(2, 2, 2, 4)}, ValueError, r"value_sum: got shape \[2, 2, 2, 4\], allowed"),
        ({"log_decay": torch.zeros(2, 3)}, ValueError, r"log_decay: got shape \[2, 3\], allowed is"),
        ({"tokens": torch.zeros(3).long()}, ValueError, r"tokens: got shape \[3\], allowed is"),
        ({"mass": torch.zeros(2, 2, 2, 4)}, TypeError, "got torch.float(32|64), allowed"),
        ({"mass": torch.zeros(2, 2, 2, 4).half()}, TypeError, "mass: got torch.float16, allowed"),
        ({"tokens": torch.zeros(2)}, TypeError, "tokens: got torch.float32, allowed is torch.int64"),
        ({"tokens": torch.zeros(2, device="meta").long()}, ValueError, r"state: got fields on .*, allowed is one"),
    ],
)
def test_bad_fields(change, error, message):
    with pytest.raises(error, match=message):
        RaceState(**fields(**change))


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (lambda: 3, TypeError, "merge: got int, allowed is RaceState"),
        (lambda: run(value_dim=4), ValueError, r"merge: got value_sum \[2, 2, 2, 4, 4\].*allowed is \[2, 2, 2, 4, 5\]"),
        (lambda: run(batch=3), ValueError, r"merge: got value_sum \[3, .*allowed is \[2,"),
        (lambda: run().to(torch.float32), ValueError, r"merge: got .*torch.float32.*allowed .*torch.float64"),
        (lambda: run().to("meta"), ValueError, r"merge: got .*meta.*allowed .*cpu"),
    ],
)
def test_bad_merge(other, error, message):
    with pytest.raises(error, match=message):
        run().merge(other())


def test_adding_what_is_no_state():
    with pytest.raises(TypeError):
        run() + 1


# ------------------------------------------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path):
    inputs = make_inputs(causal=True, decay="token", dtype=FLOAT64, value_dim=5, scale=0.5)
    a = race_attention(**inputs, return_state=True)[1]
    path = tmp_path / "state.safetensors"
    a.save(path, **hash_of(inputs))
    return a, path, hash_of(inputs)


def test_round_trip(saved):
    a, path, made_with = saved
    assert equal(RaceState.load(path, **made_with), a)
    assert equal(RaceState.load(str(path), **made_with, device="cpu"), a)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing temporary stays


def test_saving_again_replaces(saved):
    a, path, made_with = saved
    (a + a).save(path, **made_with)
    assert equal(RaceState.load(path, **made_with), a + a)


def test_failed_save_leaves_the_old_file(saved, monkeypatch):
    import os

    a, path, made_with = saved

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        (a + a).save(path, **made_with)
    assert equal(RaceState.load(path, **made_with), a)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_state_with_gradients_can_be_saved(tmp_path):
    inputs = make_inputs(causal=True, requires_grad=True)
    a = race_attention(**inputs, return_state=True)[1]
    a.save(tmp_path / "state", **hash_of(inputs))
    assert equal(RaceState.load(tmp_path / "state", **hash_of(inputs)), a.detach())


def test_same_hash_in_another_form_is_accepted(tmp_path):
    """Shared or repeated hyperplanes, beta as a number or as tensors, in another dtype: one hash."""
    inputs = make_inputs(shared_hyperplanes=True, beta=1.5)
    a = race_attention(**inputs, return_state=True)[1]
    a.save(tmp_path / "state", **hash_of(inputs))
    planes = inputs["hyperplanes"]
    for other in (
        {"hyperplanes": planes.expand(2, -1, -1, -1), "beta": torch.tensor(1.5)},
        {"hyperplanes": planes.double(), "beta": torch.full((2,), 1.5)},
    ):
        assert equal(RaceState.load(tmp_path / "state", **other), a)


@pytest.mark.parametrize("other", ["hyperplanes", "beta", "scale"])
def test_another_hash_is_refused(saved, other):
    _, path, made_with = saved
    with pytest.raises(ValueError, match=r"another hash \(fingerprint \w+\), allowed .* \(fingerprint \w+\)"):
        RaceState.load(path, **{**made_with, other: made_with[other] * 1.001})


def test_hyperplanes_of_another_shape_are_refused(saved):
    a, path, made_with = saved
    for planes in (torch.zeros(2, 2, 8), torch.zeros(3, 2, 2, 8), torch.zeros(2, 1, 2, 8), torch.zeros(2, 2, 3, 8)):
        for use in (lambda p: RaceState.load(path, **p), lambda p: a.save(path, **p)):
            with pytest.raises(ValueError, match=r"hyperplanes: got .*, allowed is"):
                use({**made_with, "hyperplanes": planes})


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_truncated_file(saved, left):
    _, path, made_with = saved
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"state.safetensors: got a file cut short or no safetensors file"):
        RaceState.load(path, **made_with)


def test_foreign_files(saved, tmp_path):
    a, _, made_with = saved
    text = tmp_path / "text"
    text.write_text("This is no state. " * 20)
    with pytest.raises(ValueError, match="text: got a file cut short or no safetensors file"):
        RaceState.load(text, **made_with)
    model = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2, 2)}, model)
    with pytest.raises(ValueError, match=r"model.safetensors: got format None, allowed is 'race_attention.RaceState"):
        RaceState.load(model, **made_with)
    part = tmp_path / "part.safetensors"
    save_file({"mass": a.mass.contiguous()}, part, metadata={"format": "race_attention.RaceState.1"})
    with pytest.raises(ValueError, match=r"part.safetensors: got tensors \['mass'\], allowed are"):
        RaceState.load(part, **made_with)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        RaceState.load(tmp_path / "nowhere", **made_with)
    with pytest.raises((FileNotFoundError, IsADirectoryError)):
        RaceState.load(tmp_path, **made_with)


def test_loaded_state_continues(saved):
    a, path, made_with = saved
    inputs = {**make_inputs(causal=True, dtype=FLOAT64, value_dim=5, seed=9), **made_with}
    assert torch.equal(
        race_attention(**inputs, initial_state=RaceState.load(path, **made_with)),
        race_attention(**inputs, initial_state=a),
    )
