"""Attention over a stream, and its backward pass: any source, any segments, any sink, the numbers of the whole."""

from __future__ import annotations

import functools
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from race_attention import RaceState, race_attention
from race_attention.streaming import (
    ArraySource,
    FileSink,
    Segment,
    SegmentGradients,
    Sink,
    open_npy,
    open_safetensors,
    stream_attention,
    stream_attention_backward,
)
from race_attention.testing import assert_within_budget, make_inputs, relative_error

CASES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True, "tokens": 23, "dim": 7, "value_dim": 5},
    "causal-all": {
        "causal": True,
        "tokens": 23,
        "decay": "token",
        "masked": 0.2,
        "heads": 4,
        "kv_heads": 2,
        "initial_state": True,
    },
    "causal-head-decay": {"causal": True, "tokens": 19, "decay": "head", "shared_hyperplanes": True, "beta": "scalar"},
    "full": {"tokens": 31, "dim": 5, "value_dim": 7},
    "full-all": {"tokens": 17, "masked": 0.2, "mask_per_head": True, "initial_state": True, "heads": 4, "kv_heads": 2},
    "bucket": {"causal": True, "tokens": 15, "readout": "bucket"},
    "number": {"causal": True, "tokens": 15, "beta": 1.3},  # which no float32 is
}
SEGMENTS: tuple[Any, ...] = (1, 4, "uneven", 1000)
TOKENS = ("query", "key", "value", "log_decay", "key_mask")


def sizes(how: Any, tokens: int) -> Any:
    return [0, 7, tokens - 8, 1] if how == "uneven" else how


class Case:
    """One computation, whole and in the pieces that streams take."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64):
        self.inputs = make_inputs(**CASES[name], dtype=dtype, requires_grad=True, seed=len(name))
        self.out, self.state = race_attention(**self.inputs, return_state=True)
        generator = torch.Generator().manual_seed(1)
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        self.grad = draw(self.out.shape).to(dtype)
        self.grad_state = (draw(self.state.mass.shape), draw(self.state.value_sum.shape))
        self.causal = self.inputs.get("causal", False)
        self.token_decay = self.inputs.get("log_decay") is not None and self.inputs["log_decay"].ndim == 3
        names = [n for n in (*TOKENS[:4], "hyperplanes", "beta") if isinstance(self.inputs.get(n), Tensor)]
        leaves = {n: self.inputs[n] for n in names}
        if "initial_state" in self.inputs:
            leaves["initial_mass"] = self.inputs["initial_state"].mass
            leaves["initial_value_sum"] = self.inputs["initial_state"].value_sum
        ends = [self.out, self.state.mass, self.state.value_sum]
        found = torch.autograd.grad(ends, list(leaves.values()), [self.grad, *self.grad_state])
        self.gradients = dict(zip(leaves, found, strict=True))

    @property
    def arrays(self) -> dict[str, Tensor]:
        """What a source has."""
        wanted = [n for n in TOKENS if n in self.inputs and (n != "log_decay" or self.token_decay)]
        return {n: self.inputs[n].detach() for n in wanted}

    @property
    def options(self) -> dict[str, Any]:
        """What a stream is given beside its source."""
        kept = {n: self.inputs[n] for n in ("causal", "scale", "readout") if n in self.inputs}
        kept["hyperplanes"] = self.inputs["hyperplanes"].detach()
        beta = self.inputs["beta"]
        kept["beta"] = beta.detach() if isinstance(beta, Tensor) else beta
        if "initial_state" in self.inputs:
            kept["initial_state"] = self.inputs["initial_state"].detach()
        if "log_decay" in self.inputs and not self.token_decay:
            kept["log_decay"] = self.inputs["log_decay"].detach()
        return kept

    def source(self, segment: Any) -> ArraySource:
        return ArraySource(self.arrays, sizes(segment, self.out.shape[1]))

    def grad_source(self, segment: Any) -> ArraySource:
        return ArraySource(self.grad, sizes(segment, self.out.shape[1]))


def gather(pieces: list[tuple[int, Tensor]]) -> Tensor:
    """Pieces put together by their positions, which have to fit."""
    position, ordered = 0, []
    for start, piece in sorted(pieces, key=lambda pair: (pair[0], pair[1].shape[1])):
        assert start == position
        position += piece.shape[1]
        ordered.append(piece)
    return torch.cat(ordered, dim=1)


class Collected:
    """A gradient sink that is a function."""

    def __init__(self) -> None:
        self.pieces: dict[str, list[tuple[int, Tensor]]] = {}

    def __call__(self, gradients: SegmentGradients, start: int) -> None:
        for name, x in gradients._asdict().items():
            if x is not None:
                self.pieces.setdefault(name, []).append((start, x))

    def whole(self) -> dict[str, Tensor]:
        return {name: gather(pieces) for name, pieces in self.pieces.items()}


def backward(case: Case, segment: Any, **options: Any) -> dict[str, Tensor]:
    """All gradients, by stream."""
    sink = Collected()
    found = stream_attention_backward(
        case.source(segment),
        case.grad_source(segment),
        grad_sink=sink,
        grad_state=case.grad_state,
        **case.options,
        **options,
    )
    return sink.whole() | {name: x for name, x in vars(found).items() if x is not None}


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("name", CASES)
def test_forward_equals_the_whole(name: str, segment: Any) -> None:
    case, pieces = Case(name), []
    forward = stream_attention(
        case.source(segment), sink=lambda out, start: pieces.append((start, out)), **case.options
    )
    assert relative_error(gather(pieces), case.out) <= 1e-13
    for field in ("mass", "value_sum", "log_decay"):
        assert relative_error(getattr(forward.state, field), getattr(case.state, field)) <= 1e-13
    assert torch.equal(forward.state.tokens, case.state.tokens)
    assert forward.tokens == case.out.shape[1]


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("name", CASES)
def test_backward_equals_the_ordinary_gradient(name: str, segment: Any) -> None:
    case = Case(name)
    actual = backward(case, segment)
    for key, expected in case.gradients.items():
        assert relative_error(actual[key], expected) <= 1e-12, key


@pytest.mark.parametrize("every", [2, 3, 100])
@pytest.mark.parametrize("name", ["causal-all", "causal-head-decay"])
def test_recomputed_boundaries(name: str, every: int) -> None:
    case = Case(name)
    actual = backward(case, 2, keep_every=every, keep_on="cpu")
    for key, expected in case.gradients.items():
        assert relative_error(actual[key], expected) <= 1e-12, key


@pytest.mark.parametrize("name", ["causal-all", "full-all"])
def test_backward_from_the_forward_pass(name: str) -> None:
    case = Case(name)
    forward = stream_attention(case.source(4), keep_every=2, **case.options)
    reads: list[int] = []
    source = case.source(4)

    class Counted(ArraySource):
        def __getitem__(self, index: int) -> Any:
            reads.append(index)
            return super().__getitem__(index)

    counted = Counted(case.arrays, 4)
    found = stream_attention_backward(
        counted, case.grad_source(4), forward=forward, grad_state=case.grad_state, **case.options
    )
    for key in ("hyperplanes", "beta", "initial_mass"):
        assert relative_error(getattr(found, key), case.gradients[key]) <= 1e-12
    # One sweep from the last back, with one more read of each segment that has no state of its own; or two sweeps.
    assert len(reads) <= 2 * len(source) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal-all", "full"])
def test_narrow_dtypes_stay_within_their_budgets(name: str, dtype: torch.dtype) -> None:
    narrow = Case(name, dtype)
    actual = backward(narrow, 4)
    wide = {n: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in
            narrow.inputs.items()}  # fmt: skip
    names = [n for n in narrow.gradients if n in wide]
    for n in names:
        wide[n].requires_grad_()
    out, state = race_attention(**wide, return_state=True)
    ends, cotangents = [out, state.mass, state.value_sum], [narrow.grad.double(), *narrow.grad_state]
    for n, expected in zip(names, torch.autograd.grad(ends, [wide[n] for n in names], cotangents), strict=True):
        assert_within_budget(actual[n], expected, dtype, "backward", name=n)


# ------------------------------------------------------------------------------------------------- sources


def segments_of(case: Case, segment: int) -> list[Any]:
    source = case.source(segment)
    return [source[index] for index in range(len(source))]


@pytest.mark.parametrize("kind", ["list", "tuples", "segments", "iterator", "factory", "function"])
def test_any_source(kind: str) -> None:
    case = Case("causal-all")
    parts = segments_of(case, 5)
    options: dict[str, Any] = {}
    source: Any = parts
    if kind in ("tuples", "segments"):
        made = [Segment(**part) for part in parts]
        source = [tuple(part) for part in made] if kind == "tuples" else made
    elif kind == "iterator":
        source = iter(parts)
    elif kind == "factory":
        source = lambda: (part for part in parts)  # noqa: E731
    elif kind == "function":
        source, options = parts.__getitem__, {"count": len(parts)}
    pieces: list[tuple[int, Tensor]] = []
    stream_attention(source, sink=lambda out, start: pieces.append((start, out)), **options, **case.options)
    assert relative_error(gather(pieces), case.out) <= 1e-13


def test_what_cannot_be_read_again_is_refused() -> None:
    case, full = Case("causal"), Case("full")
    with pytest.raises(ValueError, match=r"source: got an iterator, which can be read once.*ArraySource"):
        stream_attention_backward(iter(segments_of(case, 5)), case.grad_source(5), **case.options)
    with pytest.raises(ValueError, match="source: got what can be read forward only"):
        stream_attention_backward(lambda: segments_of(case, 5), case.grad_source(5), **case.options)
    with pytest.raises(ValueError, match="grad_source: got an iterator"):
        stream_attention_backward(case.source(5), iter([]), **case.options)
    with pytest.raises(ValueError, match="source: got an iterator, which can be read once"):
        stream_attention(iter(segments_of(full, 5)), **full.options)


def test_not_causal_reads_forward_only() -> None:
    case = Case("full")
    parts, grads = segments_of(case, 5), case.grad_source(5)
    found = stream_attention_backward(
        lambda: iter(parts), lambda: (grads[i] for i in range(len(grads))), grad_state=case.grad_state, **case.options
    )
    assert relative_error(found.hyperplanes, case.gradients["hyperplanes"]) <= 1e-12


def test_queries_and_keys_may_differ_in_number() -> None:
    inputs = make_inputs(tokens=9, keys=20, dtype=torch.float64, requires_grad=True)
    out = race_attention(**inputs)
    grad = torch.randn_like(out)
    names = ("query", "key", "value", "hyperplanes", "beta")
    expected = torch.autograd.grad(out, [inputs[n] for n in names], grad)
    plain = {n: inputs[n].detach() for n in names}
    cuts = [(0, 4, 0, 11), (4, 4, 11, 13), (4, 9, 13, 20)]
    parts = [(plain["query"][:, a:b], plain["key"][:, c:d], plain["value"][:, c:d]) for a, b, c, d in cuts]
    sink, outs = Collected(), []
    options = {"hyperplanes": plain["hyperplanes"], "beta": plain["beta"]}
    forward = stream_attention(parts, sink=lambda x, start: outs.append((start, x)), **options)
    assert relative_error(gather(outs), out) <= 1e-13
    grads = [grad[:, a:b] for a, b, _, _ in cuts]
    found = stream_attention_backward(parts, grads, forward=forward, grad_sink=sink, **options)
    actual = sink.whole() | {"hyperplanes": found.hyperplanes, "beta": found.beta}
    for name, right in zip(names, expected, strict=True):
        assert relative_error(actual[name], right) <= 1e-12, name


def test_bad_sources_say_so() -> None:
    case = Case("causal")
    options = case.options
    with pytest.raises(TypeError, match="source: got a tuple of 2"):
        stream_attention([(torch.zeros(1), torch.zeros(1))], **options)
    with pytest.raises(TypeError, match="source: got int"):
        stream_attention(3, **options)
    with pytest.raises(ValueError, match="source: got no segments"):
        stream_attention([], **options)
    with pytest.raises(ValueError, match="grad_source: got 6 segments"):
        stream_attention_backward(case.source(5), case.grad_source(4), **options)
    with pytest.raises(ValueError, match="keep_every: got 0"):
        stream_attention(case.source(5), keep_every=0, **options)
    with pytest.raises(ValueError, match="segment: got sizes that sum to 3"):
        ArraySource(case.arrays, [1, 2])
    with pytest.raises(ValueError, match="arrays: got lengths"):
        ArraySource({"query": torch.zeros(1, 3), "key": torch.zeros(1, 4)}, 2)
    forward = stream_attention(case.source(5), **options)
    with pytest.raises(ValueError, match="forward: got one without boundary states"):
        stream_attention_backward(case.source(5), case.grad_source(5), forward=forward, **options)


FOUR = torch.zeros(1, 4, 2, 8)


@pytest.mark.parametrize(
    ("segment", "error", "message"),
    [
        ({"query": FOUR, "key": FOUR, "values": FOUR}, TypeError, r"source: got a mapping of .*'values'"),
        ((FOUR, FOUR, None), TypeError, "value of a segment: got NoneType, allowed is a Tensor"),
        ((FOUR, FOUR[0], FOUR), ValueError, r"key of a segment: got shape \[4, 2, 8\], allowed is \[B, t"),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_bad_segments_say_so(causal: bool, segment: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        stream_attention([segment], torch.randn(2, 2, 2, 8), 2.0, causal=causal)


def test_bad_arguments_of_a_stream_say_so(tmp_path: Path) -> None:
    segments, planes = [(FOUR,) * 3] * 3, torch.randn(2, 2, 2, 8)
    for change, error, message in (
        ({"count": 2}, ValueError, "count: got 2, allowed is None or what source has, 3"),
        ({"count": "3"}, TypeError, "count: got '3', allowed is an integer"),
        ({"tokens": 13}, ValueError, "tokens: got 13, allowed is what the source had, 12"),
        ({"tokens": 13, "sink": tmp_path / "out.npy"}, ValueError, "tokens: got 13"),
        ({"sink": torch.zeros(1, 12, 2, 8, dtype=torch.int32)}, TypeError, "sink: got an array of torch.int32"),
        ({"initial_state": 3}, TypeError, "initial_state: got int, allowed is RaceState"),
    ):
        for causal in (False, True):
            with pytest.raises(error, match=message):
                stream_attention(segments, planes, 2.0, causal=causal, **change)
    assert not (tmp_path / "out.npy").exists()
    for planes, error, message in ((None, TypeError, "got NoneType"), (torch.zeros(2, 2), ValueError, "got shape")):
        with pytest.raises(error, match=f"hyperplanes: {message}"):
            stream_attention(segments, planes, 2.0)
    with pytest.raises(TypeError, match=r"segment: got 2\.5, allowed is an integer"):
        ArraySource(FOUR, 2.5)


@pytest.mark.parametrize("name", ["causal", "full-all"])
def test_a_backward_pass_over_other_tokens_is_refused(name: str) -> None:
    """As many segments of other lengths have other states before them: the gradients would be wrong without a word."""
    case = Case(name)
    source, grads, options = list(case.source(5).walk()), list(case.grad_source(5).walk()), case.options
    forward = stream_attention([*source[1:], source[0]], keep_every=1 if options.get("causal") else None, **options)
    with pytest.raises(ValueError, match=r"source: got \(.* queries and keys in segment \d, allowed is"):
        stream_attention_backward(source, grads, forward=forward, **options)
    with pytest.raises(ValueError, match=r"grad_source: got shape \[.*\] in segment \d, allowed is \["):
        stream_attention_backward(source, [x[:, :1] for x in grads], **options)
    with pytest.raises((TypeError, ValueError), match=r"grad_source: got (NoneType|another number)"):
        stream_attention_backward(source, [None] * len(source), **options)
    for given, error in ((3, TypeError), ((torch.zeros(1),) * 2, ValueError), ((1, 2), TypeError)):
        with pytest.raises(error, match="grad_state: "):
            stream_attention_backward(source, grads, grad_state=given, **options)
    with pytest.raises(TypeError, match="forward: got int, allowed is what stream_attention returned"):
        stream_attention_backward(source, grads, forward=3, **options)


def test_an_initial_state_alone_and_no_tokens() -> None:
    case = Case("causal-all")
    empty = {name: x[:, :0] for name, x in case.arrays.items()}
    forward = stream_attention([empty], **case.options)
    assert torch.equal(forward.state.mass, case.options["initial_state"].mass)


# --------------------------------------------------------------------------------------------------- files


def test_numpy_files_in_and_out(tmp_path: Path) -> None:
    case = Case("causal-all", torch.float32)
    for name, x in case.arrays.items():
        np.save(tmp_path / f"{name}.npy", x.numpy())
    arrays = {name: open_npy(tmp_path / f"{name}.npy") for name in case.arrays}
    stream_attention(ArraySource(arrays, 4), sink=tmp_path / "out.npy", **case.options)
    assert_within_budget(torch.from_numpy(np.load(tmp_path / "out.npy")), case.out.detach(), torch.float32)
    mapped = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in case.arrays}
    stream_attention(ArraySource(mapped, 4), sink=tmp_path / "again.npy", **case.options)
    assert np.array_equal(np.load(tmp_path / "out.npy"), np.load(tmp_path / "again.npy"))
    assert {path.suffix for path in tmp_path.iterdir()} == {".npy"}  # no unfinished files are left


def test_arrays_are_filled(tmp_path: Path) -> None:
    case = Case("full-all")
    out = np.lib.format.open_memmap(tmp_path / "o.npy", mode="w+", dtype="float64", shape=tuple(case.out.shape))
    stream_attention(case.source(4), sink=out, **case.options)
    assert relative_error(torch.from_numpy(np.load(tmp_path / "o.npy")), case.out) <= 1e-13
    sinks = {name: torch.full_like(case.inputs[name], float("nan")).detach() for name in ("query", "key", "value")}
    stream_attention_backward(
        case.source(4), case.grad_source(4), grad_sink=sinks, grad_state=case.grad_state, **case.options
    )
    for name, x in sinks.items():
        assert relative_error(x, case.gradients[name]) <= 1e-12
    with pytest.raises(ValueError, match="sink: got an array of shape"):
        stream_attention(case.source(4), sink=sinks["query"][:, :-1], **case.options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_in_and_out(tmp_path: Path, dtype: torch.dtype) -> None:
    case = Case("causal-all", dtype)
    save_file({n: x.contiguous() for n, x in case.arrays.items()}, tmp_path / "in.safetensors")
    source = ArraySource(open_safetensors(tmp_path / "in.safetensors"), 4)
    stream_attention(source, sink=tmp_path / "out.safetensors", **case.options)
    assert_within_budget(load_file(tmp_path / "out.safetensors")["out"], case.out.detach(), dtype)
    stream_attention_backward(
        source,
        case.grad_source(4),
        grad_sink=tmp_path / "g.safetensors",
        grad_state=case.grad_state,
        **case.options,
    )
    written = load_file(tmp_path / "g.safetensors")
    assert set(written) == {"query", "key", "value", "log_decay"}
    for name, x in written.items():
        assert_within_budget(x, case.gradients[name], dtype, "backward", name=name)


def test_a_file_for_each_gradient(tmp_path: Path) -> None:
    case = Case("full-all")
    sinks = {name: tmp_path / f"{name}.npy" for name in ("query", "key", "value")}
    stream_attention_backward(
        case.source(4), case.grad_source(4), grad_sink=sinks, grad_state=case.grad_state, **case.options
    )
    for name, path in sinks.items():
        assert relative_error(torch.from_numpy(np.load(path)), case.gradients[name]) <= 1e-12


def test_bad_files_say_so(tmp_path: Path) -> None:
    case = Case("causal", torch.bfloat16)
    with pytest.raises(ValueError, match=r"sink: got torch.bfloat16 for a \.npy file"):
        stream_attention(case.source(4), sink=tmp_path / "out.npy", **case.options)
    with pytest.raises(ValueError, match=r"sink: got '.*out\.bin'"):
        stream_attention(case.source(4), sink=tmp_path / "out.bin", **case.options)
    with pytest.raises(ValueError, match="needs the number of tokens"):
        stream_attention(segments_of(case, 4), sink=tmp_path / "out.safetensors", **case.options)
    stream_attention(segments_of(case, 4), sink=FileSink(tmp_path / "a.safetensors", tokens=23), **case.options)
    assert load_file(tmp_path / "a.safetensors")["out"].shape == case.out.shape
    with pytest.raises(ValueError, match="takes one array of"):
        stream_attention_backward(case.source(4), case.grad_source(4), grad_sink=tmp_path / "g.npy", **case.options)
    np.save(tmp_path / "f.npy", np.asfortranarray(np.zeros((2, 3, 4))))
    with pytest.raises(ValueError, match="Fortran order"):
        open_npy(tmp_path / "f.npy")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match="cut short"):
        open_safetensors(tmp_path / "cut.safetensors")
    (tmp_path / "text.npy").write_text("no NumPy, a text")
    with pytest.raises(ValueError, match=r"text\.npy: got a file cut short or no \.npy file"):
        open_npy(tmp_path / "text.npy")
    for text in (b"hello", b"[1]  "):
        (tmp_path / "text.safetensors").write_bytes((5).to_bytes(8, "little") + text)
        with pytest.raises(ValueError, match=r"text\.safetensors: got no safetensors file"):
            open_safetensors(tmp_path / "text.safetensors")
    save_file({"query": torch.zeros(5)}, tmp_path / "flat.safetensors")
    with pytest.raises(ValueError, match=r"got shape \[5\] of 'query', allowed is \[B, T"):
        open_safetensors(tmp_path / "flat.safetensors")


# -------------------------------------------------------------------------------------- journal and crashes


class Crash(Exception):
    """In place of a kill."""


class Crashing(ArraySource):
    """Fails at its n-th read."""

    left = 10**9

    def __getitem__(self, index: int) -> Any:
        if self.left == 0:
            raise Crash
        self.left -= 1
        return super().__getitem__(index)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", ["causal-all", "full-all", "causal-head-decay"])
def test_a_crash_anywhere_and_on(name: str, every: int, tmp_path: Path) -> None:
    case = Case(name)
    out, sinks = tmp_path / "out.npy", {n: tmp_path / f"{n}.npy" for n in ("query", "key", "value")}
    found = None
    for reads in range(1, 60):  # each attempt crashes one read later than the last
        source = Crashing(case.arrays, 2)
        source.left = reads
        try:
            forward = stream_attention(
                source, sink=out, keep_every=2, journal=tmp_path / "f", journal_every=every, **case.options
            )
            found = stream_attention_backward(
                source,
                case.grad_source(2),
                forward=forward,
                grad_sink=sinks,
                grad_state=case.grad_state,
                journal=tmp_path / "b",
                journal_every=every,
                **case.options,
            )
            break
        except Crash:
            continue
    assert found is not None
    assert reads > 2
    assert relative_error(torch.from_numpy(np.load(out)), case.out) <= 1e-13
    actual = vars(found) | {n: torch.from_numpy(np.load(path)) for n, path in sinks.items()}
    for key, expected in case.gradients.items():
        if actual.get(key) is not None:
            assert relative_error(actual[key], expected) <= 1e-12, key


def test_a_crash_leaves_no_file_that_looks_whole(tmp_path: Path) -> None:
    case = Case("causal")
    source = Crashing(case.arrays, 2)
    source.left = 4
    with pytest.raises(Crash):
        stream_attention(source, sink=tmp_path / "out.npy", **case.options)
    assert not (tmp_path / "out.npy").exists()
    with pytest.raises(Crash):
        stream_attention(source, sink=tmp_path / "out.npy", **case.options)
    source.left = 1000
    stream_attention(source, sink=tmp_path / "out.npy", **case.options)
    assert relative_error(torch.from_numpy(np.load(tmp_path / "out.npy")), case.out) <= 1e-13


def test_a_journal_of_another_stream_is_refused(tmp_path: Path) -> None:
    case = Case("causal")
    stream_attention(case.source(4), journal=tmp_path, **case.options)
    other = case.options | {"hyperplanes": case.options["hyperplanes"] + 1}
    with pytest.raises(ValueError, match="the journal of another stream"):
        stream_attention(case.source(4), journal=tmp_path, **other)
    state = stream_attention(case.source(4), **case.options).state
    with pytest.raises(ValueError, match="the journal of another stream"):
        stream_attention(case.source(4), journal=tmp_path, initial_state=state, **case.options)
    gradients = (case.source(4), case.grad_source(4))
    stream_attention_backward(*gradients, journal=tmp_path / "back", **case.options)
    with pytest.raises(ValueError, match="the journal of another stream"):
        stream_attention_backward(*gradients, journal=tmp_path / "back", grad_state=state, **case.options)


def test_a_finished_stream_returns_at_once(tmp_path: Path) -> None:
    case = Case("causal-all")
    first = stream_attention(case.source(4), keep_every=1, journal=tmp_path, **case.options)
    source = Crashing(case.arrays, 4)
    source.left = 0
    again = stream_attention(source, keep_every=1, journal=tmp_path, **case.options)
    assert torch.equal(first.state.value_sum, again.state.value_sum)
    assert again.key_lengths == first.key_lengths


def test_sinks_remember_what_they_have_to(tmp_path: Path) -> None:
    class Total(Sink):
        total = torch.zeros((), dtype=torch.float64)

        def write(self, pieces: Any, start: int) -> None:
            self.total = self.total + pieces["out"].sum()

        def state(self) -> dict[str, Tensor]:
            return {"total": self.total}

        def restore(self, state: Any) -> None:
            self.total = state["total"]

    case = Case("causal")
    source = Crashing(case.arrays, 2)
    source.left = 5
    with pytest.raises(Crash):
        stream_attention(source, sink=Total(), journal=tmp_path, **case.options)
    source.left, sink = 1000, Total()
    stream_attention(source, sink=sink, journal=tmp_path, **case.options)
    torch.testing.assert_close(sink.total, case.out.sum())


def test_progress_tells_each_phase() -> None:
    case, told = Case("full"), []
    stream_attention_backward(
        case.source(10), case.grad_source(10), progress=lambda *what: told.append(what), **case.options
    )
    assert [what[0] for what in told] == ["keys"] * 4 + ["queries"] * 4 + ["keys"] * 4
    assert told[-1][1:] == (4, 4)
    with pytest.raises(TypeError, match="progress: got 3"):
        stream_attention(case.source(10), progress=3, **case.options)  # type: ignore[arg-type]


def test_a_given_state_is_left_as_it_was() -> None:
    case = Case("causal-all")
    state: RaceState = case.options["initial_state"]
    before = state.clone()
    backward(case, 3)
    assert torch.equal(state.mass, before.mass)
    assert not state.mass.requires_grad


@pytest.mark.parametrize("name", ["causal", "full"])
def test_one_segment_at_a_time(name: str) -> None:
    """When a segment is asked for, nobody holds the one before it any more."""
    case, alive = Case(name), []
    held: list[int] = []

    class Watched(ArraySource):
        def __getitem__(self, index: int) -> Any:
            gc.collect()
            held.append(sum(ref() is not None for ref in alive))
            part = super().__getitem__(index)
            part = {n: x.clone() for n, x in part.items()} if isinstance(part, dict) else part.clone()
            alive.extend(weakref.ref(x) for x in (part.values() if isinstance(part, dict) else [part]))
            return part

    source, grads = Watched(case.arrays, 4), Watched(case.grad, 4)
    forward = stream_attention(source, sink=lambda *_: None, keep_every=1, **case.options)
    assert set(held) == {0}
    stream_attention_backward(source, grads, forward=forward, grad_sink=lambda *_: None, **case.options)
    assert max(held) <= len(case.arrays)  # the segment itself, when its gradient is asked for
