"""Bad input of race_attention: the message names the argument, what was given and what is allowed."""

from __future__ import annotations

import pytest
import torch

from race_attention import BackendWarning, RaceState, race_attention
from race_attention.backends.call import Call
from race_attention.testing import make_inputs

NAN, INF = float("nan"), float("inf")


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


def state(rows=2, groups=2, tables=2, planes=2, value_dim=8, device="cpu"):
    return RaceState.zeros(rows, groups, tables, planes, value_dim, device=device)


# Plain inputs have B = 2, T = 13, H = G = 2, D = Dv = 8, L = P = 2. Each line: what is changed, the error, and
# the argument named, a part of what was given, a part of what is allowed.
SHAPES = [
    ({"query": zeros(13, 2, 8)}, ValueError, "query", "[13, 2, 8]", "[B, Tq, H, D]"),
    ({"key": zeros(2, 13, 16)}, ValueError, "key", "[2, 13, 16]", "[B, Tk, G, D]"),
    ({"value": zeros(2, 13, 2, 8, 1)}, ValueError, "value", "[2, 13, 2, 8, 1]", "[B, Tk, G, Dv]"),
    ({"key": zeros(3, 13, 2, 8)}, ValueError, "key", "[3, 13, 2, 8]", "[2, Tk, G, 8]"),
    ({"key": zeros(2, 13, 2, 7)}, ValueError, "key", "[2, 13, 2, 7]", "[2, Tk, G, 8]"),
    ({"value": zeros(2, 12, 2, 8)}, ValueError, "value", "[2, 12, 2, 8]", "[2, 13, 2]"),
    ({"value": zeros(2, 13, 1, 8)}, ValueError, "value", "[2, 13, 1, 8]", "[2, 13, 2]"),
    ({"value": zeros(1, 13, 2, 8)}, ValueError, "value", "[1, 13, 2, 8]", "[2, 13, 2]"),
    ({"value": zeros(2, 13, 2, 0)}, ValueError, "value", "[2, 13, 2, 0]", "size 1 or more"),
    ({"query": zeros(2, 13, 0, 8)}, ValueError, "query", "[2, 13, 0, 8]", "at least one head"),
    ({"query": zeros(2, 13, 3, 8)}, ValueError, "query", "3", "multiple of the key's G = 2"),
    ({"query": zeros(2, 13, 1, 8)}, ValueError, "query", "1", "multiple of the key's G = 2"),
    ({"query": zeros(2, 12, 2, 8), "causal": True}, ValueError, "key", "13", "12"),
    ({"hyperplanes": zeros(2, 2, 8)}, ValueError, "hyperplanes", "[2, 2, 8]", "[2 or 1, L, P, 8]"),
    ({"hyperplanes": zeros(3, 2, 2, 8)}, ValueError, "hyperplanes", "[3, 2, 2, 8]", "[2 or 1, L, P, 8]"),
    ({"hyperplanes": zeros(2, 2, 2, 7)}, ValueError, "hyperplanes", "[2, 2, 2, 7]", "[2 or 1, L, P, 8]"),
    ({"hyperplanes": zeros(2, 0, 2, 8)}, ValueError, "hyperplanes", "[2, 0, 2, 8]", "[2 or 1, L, P, 8]"),
    ({"hyperplanes": zeros(1, 2, 0, 8)}, ValueError, "hyperplanes", "[1, 2, 0, 8]", "[2 or 1, L, P, 8]"),
    ({"hyperplanes": zeros(1, 1, 30, 8)}, ValueError, "hyperplanes", "30", "1 to 10"),
    ({"beta": torch.ones(3)}, ValueError, "beta", "[3]", "[2]"),
    ({"beta": torch.ones(2, 1)}, ValueError, "beta", "[2, 1]", "[2]"),
    ({"log_decay": zeros(3), "causal": True}, ValueError, "log_decay", "[3]", "[2] or [2, 13, 2]"),
    ({"log_decay": zeros(2, 13), "causal": True}, ValueError, "log_decay", "[2, 13]", "[2] or [2, 13, 2]"),
    ({"log_decay": zeros(2, 12, 2), "causal": True}, ValueError, "log_decay", "[2, 12, 2]", "[2] or [2, 13, 2]"),
    ({"key_mask": zeros(13).bool()}, ValueError, "key_mask", "[13]", "[2, 13]"),
    ({"key_mask": zeros(2, 12).bool()}, ValueError, "key_mask", "[2, 12]", "[2, 13]"),
    ({"key_mask": zeros(2, 13, 3).bool()}, ValueError, "key_mask", "[2, 13, 3]", "[2, 13, 2]"),
    ({"initial_state": state(rows=1)}, ValueError, "initial_state", "[1, 2, 2, 4, 8]", "[2, 2, 2, 4, 8]"),
    ({"initial_state": state(groups=1)}, ValueError, "initial_state", "[2, 1, 2, 4, 8]", "[2, 2, 2, 4, 8]"),
    ({"initial_state": state(tables=3)}, ValueError, "initial_state", "[2, 2, 3, 4, 8]", "[2, 2, 2, 4, 8]"),
    ({"initial_state": state(planes=3)}, ValueError, "initial_state", "[2, 2, 2, 8, 8]", "[2, 2, 2, 4, 8]"),
    ({"initial_state": state(value_dim=7)}, ValueError, "initial_state", "[2, 2, 2, 4, 7]", "[2, 2, 2, 4, 8]"),
]
DTYPES = [
    ({"query": zeros(2, 13, 2, 8, dtype=torch.int64)}, TypeError, "query", "torch.int64", "float32"),
    ({"query": zeros(2, 13, 2, 8, dtype=torch.complex64)}, TypeError, "query", "torch.complex64", "float32"),
    ({"query": zeros(2, 13, 2, 8).to(torch.float8_e4m3fn)}, TypeError, "query", "torch.float8_e4m3fn", "float32"),
    ({"key": zeros(2, 13, 2, 8, dtype=torch.bfloat16)}, TypeError, "key", "torch.bfloat16", "torch.float32"),
    ({"value": zeros(2, 13, 2, 8, dtype=torch.float64)}, TypeError, "value", "torch.float64", "torch.float32"),
    ({"hyperplanes": zeros(1, 2, 2, 8).int()}, TypeError, "hyperplanes", "torch.int32", "floating"),
    ({"beta": torch.ones(2).int()}, TypeError, "beta", "torch.int32", "floating"),
    ({"log_decay": zeros(2).int(), "causal": True}, TypeError, "log_decay", "torch.int32", "floating"),
    ({"key_mask": zeros(2, 13)}, TypeError, "key_mask", "torch.float32", "torch.bool"),
    ({"key_mask": zeros(2, 13).byte()}, TypeError, "key_mask", "torch.uint8", "torch.bool"),
]
TYPES = [
    ({"query": [[1.0]]}, TypeError, "query", "list", "Tensor"),
    ({"key": None}, TypeError, "key", "NoneType", "Tensor"),
    ({"value": 1.0}, TypeError, "value", "float", "Tensor"),
    ({"hyperplanes": (1, 2)}, TypeError, "hyperplanes", "tuple", "Tensor"),
    ({"query": zeros(2, 13, 2, 8).to_sparse()}, TypeError, "query", "torch.sparse_coo", "torch.strided"),
    ({"value": zeros(2, 13, 2, 8).to_mkldnn()}, TypeError, "value", "torch._mkldnn", "torch.strided"),
    (
        {"query": torch.nested.nested_tensor([zeros(5, 2, 8), zeros(8, 2, 8)], layout=torch.jagged)},
        TypeError,
        "query",
        "nested",
        "dense",
    ),
    ({"hyperplanes": zeros(1, 2, 2, 8).to_sparse()}, TypeError, "hyperplanes", "torch.sparse_coo", "torch.strided"),
    ({"beta": torch.ones(2).to_sparse()}, TypeError, "beta", "torch.sparse_coo", "torch.strided"),
    ({"key_mask": zeros(2, 13).bool().to_sparse()}, TypeError, "key_mask", "torch.sparse_coo", "torch.strided"),
    ({"beta": "sharp"}, TypeError, "beta", "str", "number"),
    ({"beta": None}, TypeError, "beta", "NoneType", "number"),
    ({"beta": True}, TypeError, "beta", "bool", "number"),
    ({"scale": "1"}, TypeError, "scale", "'1'", "number"),
    ({"scale": None}, TypeError, "scale", "None", "number"),
    ({"causal": 1}, TypeError, "causal", "1", "bool"),
    ({"return_state": "yes"}, TypeError, "return_state", "'yes'", "bool"),
    ({"log_decay": -0.1, "causal": True}, TypeError, "log_decay", "float", "Tensor"),
    ({"key_mask": [True]}, TypeError, "key_mask", "list", "Tensor"),
    ({"initial_state": (1, 2)}, TypeError, "initial_state", "tuple", "RaceState"),
    ({"initial_state": zeros(2, 2, 2, 4)}, TypeError, "initial_state", "Tensor", "RaceState"),
]
VALUES = [
    *(({"beta": b}, ValueError, "beta", str(b), "(0, 10000]") for b in (0, 0.0, -1.0, NAN, INF, 1.1e4)),
    *(
        ({"beta": torch.tensor([1.0, b])}, ValueError, "beta", str(torch.tensor(b).item()), "(0, 10000]")
        for b in (0.0, -1.0, NAN, INF, 1.1e4)
    ),
    *(({"scale": s}, ValueError, "scale", str(s), "finite and positive") for s in (NAN, INF, 0.0, -1.0, 10**400)),
    *(
        ({"log_decay": torch.tensor([-1.0, d]), "causal": True}, ValueError, "log_decay", str(d), "at most 0")
        for d in (0.5, NAN, INF, -INF)
    ),
    ({"log_decay": zeros(2)}, ValueError, "log_decay", "causal=False", "None"),
    ({"readout": "mean"}, ValueError, "readout", "'mean'", "'bucket'"),
    ({"backend": "cuda"}, ValueError, "backend", "'cuda'", "'reference'"),
    ({"backend": ""}, ValueError, "backend", "''", "'auto'"),
]


def offsets(*numbers, dtype=torch.int64):
    return torch.tensor(numbers, dtype=dtype)


PACKED = [
    ({"cu_seqlens": [0, 5, 13]}, TypeError, "cu_seqlens", "list", "Tensor"),
    ({"cu_seqlens": torch.tensor([0.0, 13.0])}, TypeError, "cu_seqlens", "torch.float32", "torch.int32 or torch.int64"),
    ({"cu_seqlens": offsets(0, 13, dtype=torch.int16)}, TypeError, "cu_seqlens", "torch.int16", "torch.int32"),
    ({"cu_seqlens": torch.tensor(13)}, ValueError, "cu_seqlens", "[]", "[n + 1]"),
    ({"cu_seqlens": offsets()}, ValueError, "cu_seqlens", "[0]", "[n + 1]"),
    ({"cu_seqlens": torch.zeros(1, 2).long()}, ValueError, "cu_seqlens", "[1, 2]", "[n + 1]"),
    ({"cu_seqlens": offsets(1, 13)}, ValueError, "cu_seqlens", "[1, 13]", "from 0 to 13"),
    ({"cu_seqlens": offsets(0, 12)}, ValueError, "cu_seqlens", "[0, 12]", "from 0 to 13"),
    ({"cu_seqlens": offsets(0, 14)}, ValueError, "cu_seqlens", "[0, 14]", "from 0 to 13"),
    ({"cu_seqlens": offsets(0)}, ValueError, "cu_seqlens", "[0]", "from 0 to 13"),
    ({"cu_seqlens": offsets(0, 8, 5, 13)}, ValueError, "cu_seqlens", "[0, 8, 5, 13]", "rises from 0 to 13"),
    ({"cu_seqlens": offsets(0, -2, 13)}, ValueError, "cu_seqlens", "[0, -2, 13]", "rises from 0 to 13"),
    ({"cu_seqlens_key": offsets(0, 13)}, ValueError, "cu_seqlens_key", "without cu_seqlens", "both"),
    (
        {"cu_seqlens": offsets(0, 13), "cu_seqlens_key": offsets(0, 5, 13)},
        ValueError, "cu_seqlens_key", "[3]", "[2]",
    ),
    (
        {"cu_seqlens": offsets(0, 13), "cu_seqlens_key": offsets(0, 12)},
        ValueError, "cu_seqlens_key", "[0, 12]", "from 0 to 13",
    ),
    (
        {"cu_seqlens": offsets(0, 13), "cu_seqlens_key": offsets(0, 13), "causal": True},
        ValueError, "cu_seqlens_key", "causal=True", "None",
    ),
    (
        {"cu_seqlens": offsets(0, 7), "query": zeros(1, 7, 2, 8)},
        ValueError, "cu_seqlens_key", "None", "packed alike",
    ),
    (
        {"cu_seqlens": offsets(0, 6, 13), "initial_state": state(rows=1)},
        ValueError, "initial_state", "[1, 2, 2, 4, 8]", "[2, 2, 2, 4, 8]",
    ),
]  # fmt: skip


def refuse(inputs, change, error, name, given, allowed):
    with pytest.raises(error) as raised:
        race_attention(**{**inputs, "backend": "reference", **change})
    message = str(raised.value)
    assert message.startswith(f"{name}: got "), message
    got, _, may = message.partition("allowed")
    assert given in got, f"{given!r} is not named as given in: {message}"
    assert allowed in may, f"{allowed!r} is not named as allowed in: {message}"


def label(line):
    change, _, name, given, _ = line
    return f"{name}-{given}-{'causal' if change.get('causal') is True else 'full'}"


@pytest.mark.parametrize("line", SHAPES + DTYPES + TYPES + VALUES, ids=label)
def test_plain(line):
    refuse(make_inputs(), *line)


@pytest.mark.parametrize("line", PACKED, ids=label)
def test_packed(line):
    refuse(make_inputs(batch=1), *line)


def test_packed_rows_share_one_batch_row():
    refuse(make_inputs(), {"cu_seqlens": offsets(0, 13)}, ValueError, "cu_seqlens", "batch 2", "1")


@pytest.mark.parametrize(
    "name", ["key", "value", "hyperplanes", "beta", "log_decay", "key_mask", "cu_seqlens", "cu_seqlens_key"]
)
def test_devices_must_agree(name):
    packed = name.startswith("cu_seqlens")
    inputs = make_inputs(
        causal=name == "log_decay",
        decay="head" if name == "log_decay" else None,
        masked=0.5,
        lengths=(5, 8) if packed else None,
        key_lengths=(5, 8) if packed else None,
    )
    refuse(inputs, {name: inputs[name].to("meta")}, ValueError, name, "meta", "cpu")


def test_device_of_the_state_must_agree():
    refuse(make_inputs(), {"initial_state": state(device="meta")}, ValueError, "initial_state", "meta", "cpu")


def test_allowed_forms_are_not_refused():
    """The edges of what is allowed: integers for numbers, one-element beta, int32 offsets, n = 0 sequences."""
    inputs = make_inputs()
    for change in (
        {"beta": 1}, {"beta": 1e4}, {"beta": torch.tensor([2.0])}, {"beta": torch.ones(2).half()}, {"scale": 2},
        {"hyperplanes": inputs["hyperplanes"].half()}, {"causal": True, "log_decay": torch.tensor([-0.0, -1e4])},
        {"causal": True, "log_decay": torch.zeros(2).double()},
    ):  # fmt: skip
        assert race_attention(**{**inputs, **change}, backend="reference").isfinite().all()
    one = make_inputs(batch=1)
    race_attention(**one, cu_seqlens=offsets(0, 4, 4, 13, dtype=torch.int32), backend="reference")
    nothing = make_inputs(batch=1, tokens=0)
    out, after = race_attention(**nothing, cu_seqlens=offsets(0), return_state=True, backend="reference")
    assert out.shape == (1, 0, 2, 8)
    assert after.batch == 0


def test_named_backend_that_cannot_serve_says_why(monkeypatch):
    from race_attention.backends import reference

    monkeypatch.setattr(reference, "why_not", lambda call: "it is Sunday")
    with pytest.raises(ValueError, match=r"backend: got 'reference', which cannot serve this call: it is Sunday"):
        race_attention(**make_inputs(), backend="reference")


def test_bucket_readout_is_refused_by_native_backends():
    for name in ("cpu", "triton"):
        with pytest.raises(ValueError, match=f"backend: got '{name}', which cannot serve this call: "):
            race_attention(**make_inputs(), readout="bucket", backend=name)


def test_auto_says_when_it_falls_back(monkeypatch):
    """Nothing falls back silently: a native backend that should serve the device and cannot is named."""
    from race_attention import backends

    monkeypatch.setattr(backends, "why_not", lambda name, call: "it is Sunday")
    with pytest.warns(BackendWarning, match="'cpu' cannot: it is Sunday"):
        race_attention(**make_inputs())


def test_a_triton_that_is_too_old_is_named(monkeypatch):
    from race_attention.backends import triton

    assert [triton._too_old(x) for x in (None, "3.5.0", "3.10.1", "4.0", "3.4.0", "2.10", "3.2.0+git1")] == [
        *[False] * 4, *[True] * 3,
    ]  # fmt: skip
    monkeypatch.setattr(triton, "INSTALLED", True)
    monkeypatch.setattr(triton, "TOO_OLD", True)
    monkeypatch.setattr(triton, "VERSION", "3.2.0")
    with pytest.raises(ValueError, match=r"triton is 3\.2\.0, allowed is 3\.5 or newer"):
        race_attention(**make_inputs(), backend="triton")


def test_values_on_other_devices_are_read_only_on_request():
    """On a device whose values cannot be read for free, shapes are checked and values are not."""
    inputs = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in make_inputs().items()}
    out = race_attention(**inputs, backend="reference")
    assert (out.shape, out.device.type) == ((2, 13, 2, 8), "meta")


def test_call_counts_rows():
    x = torch.zeros(1, 4, 1, 2)
    call = Call(x, x, x, torch.zeros(1, 1, 1, 2), torch.ones(1), cu_seqlens=offsets(0, 2, 2, 4))
    assert call.rows == 3
