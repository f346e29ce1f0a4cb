"""The table of implementations, the table of cases, and the routes by which a case can be computed.

A backend joins every test of this table by a line in BACKENDS. A route computes the same outputs and final
state from the same inputs in another way: in one call, segment by segment through states, sequence by
sequence, with padding between, or merged from the states of ranks. Each is held against the oracle, forward
and backward.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from race_attention import RaceState, race_attention, testing
from race_attention.testing import assert_within_budget, leaves, make_inputs, oracle, runnable_backends

Inputs = dict[str, Any]
Route = Callable[..., tuple[Tensor, RaceState]]

FLOAT64, FLOAT32, BFLOAT16, FLOAT16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


# ---------------------------------------------------------------------------------------- implementations


def _reference_chunks(patch: pytest.MonkeyPatch, size: int) -> None:
    from race_attention.backends import reference

    run = reference.run
    patch.setattr(reference, "run", lambda call: run(call, chunk_size=size))


@dataclass(frozen=True)
class Backend:
    """An implementation on a device.

    Attributes:
        set_chunk: makes it work in chunks of so many tokens until the patch is undone, where it can.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    set_chunk: Callable[[pytest.MonkeyPatch, int], None] | None = None


BACKENDS = (
    Backend("reference", "cpu", (FLOAT64, FLOAT32, BFLOAT16, FLOAT16), _reference_chunks),
    Backend("reference", "cuda", (FLOAT64, FLOAT32, BFLOAT16, FLOAT16), _reference_chunks),
    Backend("cpu", "cpu", (FLOAT64, FLOAT32, BFLOAT16)),
    Backend("triton", "cuda", (FLOAT32, BFLOAT16, FLOAT16)),
)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@functools.cache
def runnable() -> dict[str, tuple[str, ...]]:
    return runnable_backends()


def backend_params(*, dtypes: Iterable[torch.dtype] | None = None, chunked: bool = False) -> list[Any]:
    """pytest parameters (backend, dtype) for every line of the table whose device this machine has.

    Args:
        dtypes: only these.
        chunked: only backends whose chunks can be set.
    """
    wanted = None if dtypes is None else set(dtypes)
    return [
        pytest.param(
            b, dtype, id=f"{b.name}-{b.device}-{str(dtype)[6:]}", marks=[pytest.mark.gpu] * (b.device != "cpu")
        )
        for b in BACKENDS
        for dtype in b.dtypes
        if b.device in DEVICES and (wanted is None or dtype in wanted) and (b.set_chunk or not chunked)
    ]


def skip_unless_runnable(backend: Backend) -> None:
    """Skips where a backend is not built or installed; RACE_ATTENTION_REQUIRE=cpu,triton makes that a failure."""
    if backend.device in runnable().get(backend.name, ()):
        return
    reason = f"backend {backend.name} does not run on {backend.device} here"
    if backend.name in os.environ.get("RACE_ATTENTION_REQUIRE", "").split(","):
        pytest.fail(reason)
    pytest.skip(reason)


# ------------------------------------------------------------------------------------------------- cases

#: name -> options of make_inputs. Odd lengths, D no power of two, Dv != D are the rule.
CASES: dict[str, dict[str, Any]] = {
    "full": {"tokens": 13, "dim": 7, "value_dim": 5},
    "full-grouped": {"heads": 4, "kv_heads": 2, "dim": 7, "value_dim": 3, "planes": 3, "tables": 3},
    "full-one-key-head": {"heads": 3, "kv_heads": 1, "dim": 5, "planes": 1, "tables": 1, "beta": "scalar"},
    "full-cross": {"tokens": 9, "keys": 17, "dim": 6, "shared_hyperplanes": True, "scale": 0.5},
    "full-masked": {"tokens": 11, "keys": 15, "masked": 0.4, "mask_per_head": True, "planes": 4},
    "full-state": {"tokens": 9, "keys": 12, "initial_state": True, "masked": 0.3, "beta": 2.0},
    "full-packed": {"lengths": (5, 1, 0, 7), "heads": 4, "kv_heads": 2, "initial_state": True},
    "full-packed-cross": {"lengths": (3, 0, 5, 4), "key_lengths": (4, 2, 0, 6), "dim": 7, "masked": 0.2},
    "full-bucket": {"readout": "bucket", "dim": 7, "value_dim": 5, "masked": 0.3, "heads": 4, "kv_heads": 2},
    "causal": {"causal": True, "tokens": 13, "dim": 7, "value_dim": 5},
    "causal-grouped": {"causal": True, "heads": 4, "kv_heads": 2, "dim": 7, "value_dim": 3, "planes": 3, "tables": 3},
    "causal-masked": {"causal": True, "tokens": 15, "masked": 0.4, "mask_per_head": True, "beta": "scalar"},
    "causal-decay": {"causal": True, "decay": "head", "heads": 4, "tokens": 17, "dim": 6},
    "causal-decay-token": {"causal": True, "decay": "token", "heads": 6, "kv_heads": 3, "masked": 0.3, "value_dim": 5},
    "causal-state": {"causal": True, "decay": "token", "initial_state": True, "tokens": 11, "planes": 4, "tables": 1},
    "causal-packed": {"causal": True, "lengths": (5, 1, 0, 7), "dim": 7, "shared_hyperplanes": True},
    "causal-packed-all": {
        "causal": True,
        "lengths": (0, 6, 1, 8),
        "decay": "token",
        "initial_state": True,
        "masked": 0.2,
        "heads": 4,
        "kv_heads": 2,
        "scale": 0.7,
    },
    "causal-bucket": {"causal": True, "readout": "bucket", "decay": "head", "initial_state": True, "masked": 0.2},
}

#: The same at lengths that span several chunks of any backend.
LONG_CASES: dict[str, dict[str, Any]] = {
    "full-long": {"batch": 1, "tokens": 70, "keys": 1500, "dim": 24, "value_dim": 20, "planes": 3},
    "full-packed-long": {"lengths": (131, 1, 0, 277), "dim": 16, "masked": 0.2, "heads": 4, "kv_heads": 2},
    "causal-long": {"causal": True, "batch": 1, "tokens": 421, "dim": 24, "value_dim": 20, "planes": 3},
    "causal-decay-long": {
        "causal": True,
        "batch": 1,
        "tokens": 389,
        "decay": "token",
        "masked": 0.2,
        "heads": 4,
        "kv_heads": 2,
        "initial_state": True,
    },
    "causal-packed-long": {"causal": True, "lengths": (131, 1, 0, 277), "decay": "head", "heads": 3, "planes": 4},
}


def inputs_of(case: str, dtype: torch.dtype, device: str = "cpu", *, requires_grad: bool = True) -> Inputs:
    options = CASES.get(case) or LONG_CASES[case]
    return make_inputs(**options, dtype=dtype, device=device, requires_grad=requires_grad, seed=len(case))


@contextmanager
def one_run() -> Iterator[None]:
    """Runs of the GPU's kernels as long as calls of a million tokens have, where a program goes from block to block."""
    from race_attention.backends.triton import plan, replay

    replay.forget()
    with mock.patch.object(plan, "EXTRA_RUNS", 0):
        yield
    replay.forget()


def in_double(inputs: Inputs, device: torch.device | str = "cpu") -> Inputs:
    """The same numbers as float64 leaves: what the oracle is asked."""

    def moved(x: Any) -> Any:
        if isinstance(x, RaceState):
            x = x.detach().to(device).to(torch.float64)
            return RaceState(x.mass.requires_grad_(), x.value_sum.requires_grad_(), x.log_decay, x.tokens)
        if isinstance(x, Tensor):
            x = x.detach().to(device)
            return x.double().requires_grad_() if x.is_floating_point() else x
        return x

    return {name: moved(x) for name, x in inputs.items()}


# ------------------------------------------------------------------------------------------------ routes


def whole(inputs: Inputs, **how: Any) -> tuple[Tensor, RaceState]:
    return race_attention(**inputs, **how, return_state=True)


def tokens_between(inputs: Inputs, begin: int, end: int, names: Iterable[str]) -> Inputs:
    """The inputs with tokens begin .. end - 1 of every named argument that has a token axis."""
    cut = dict(inputs)
    for name in names:
        x = inputs.get(name)
        if isinstance(x, Tensor) and not (name == "log_decay" and x.ndim == 1):
            cut[name] = x[:, begin:end]
    return cut


ALONG_QUERIES = ("query",)
ALONG_KEYS = ("key", "value", "log_decay", "key_mask")


def _pieces(length: int, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Bounds of pieces of the given sizes, repeated until the length is used up."""
    bounds, begin, turn = [], 0, 0
    while begin < length:
        end = min(length, begin + sizes[turn % len(sizes)])
        bounds.append((begin, end))
        begin, turn = end, turn + 1
    return bounds


def by_segments(inputs: Inputs, *, sizes: tuple[int, ...], **how: Any) -> tuple[Tensor, RaceState]:
    """Causal: each segment starts from the state that the one before it returned."""
    state, outs = inputs.get("initial_state"), []
    for begin, end in _pieces(inputs["query"].shape[1], sizes):
        segment = tokens_between(inputs, begin, end, ALONG_QUERIES + ALONG_KEYS)
        out, state = race_attention(**{**segment, "initial_state": state}, **how, return_state=True)
        outs.append(out)
    return torch.cat(outs, dim=1), state


def by_ranks(inputs: Inputs, *, sizes: tuple[int, ...], **how: Any) -> tuple[Tensor, RaceState]:
    """Every rank computes the state of its keys alone; the states before it are merged and given to it."""
    before = inputs.get("initial_state") or no_tokens(inputs)
    inputs = {name: x for name, x in inputs.items() if name != "initial_state"}
    causal, outs = inputs.get("causal", False), []
    for begin, end in _pieces(inputs["key"].shape[1], sizes):
        rank = tokens_between(inputs, begin, end, ALONG_KEYS + (ALONG_QUERIES if causal else ()))
        if causal:
            outs.append(race_attention(**rank, **how, initial_state=before))
        else:
            rank["query"] = rank["query"][:, :0]
        before = before.merge(race_attention(**rank, **how, return_state=True)[1])
    if causal:
        return torch.cat(outs, dim=1), before
    nothing = tokens_between(inputs, 0, 0, ALONG_KEYS)
    return race_attention(**nothing, **how, initial_state=before), before


def by_sequences(inputs: Inputs, **how: Any) -> tuple[Tensor, RaceState]:
    """Packed: each sequence in a call of its own."""
    bounds = inputs["cu_seqlens"].tolist()
    key_bounds = inputs.get("cu_seqlens_key", inputs["cu_seqlens"]).tolist()
    state = inputs.get("initial_state")
    rest = {name: x for name, x in inputs.items() if not name.startswith("cu_seqlens")}
    outs, states = [], []
    for row in range(len(bounds) - 1):
        one = tokens_between(rest, bounds[row], bounds[row + 1], ALONG_QUERIES)
        one = tokens_between(one, key_bounds[row], key_bounds[row + 1], ALONG_KEYS)
        if state is not None:
            one["initial_state"] = state.select([row])
        out, after = race_attention(**one, **how, return_state=True)
        outs.append(out)
        states.append(after)
    fields = ("mass", "value_sum", "log_decay", "tokens")
    return torch.cat(outs, dim=1), RaceState(*(torch.cat([getattr(s, f) for s in states]) for f in fields))


def with_padding(inputs: Inputs, **how: Any) -> tuple[Tensor, RaceState]:
    """Padding between the tokens, masked by key_mask and without decay, changes nothing."""
    generator = torch.Generator().manual_seed(1)
    batch, keys, groups = inputs["key"].shape[:3]
    device = inputs["key"].device
    padding = 6
    order = torch.randperm(keys + padding, generator=generator)
    kept = order[:keys].sort().values.to(device)  # place of each token

    def padded(x: Tensor, fill: float) -> Tensor:
        filling = torch.randn(batch, keys + padding, *x.shape[2:], generator=generator) * fill
        return filling.to(x).index_copy(1, kept, x)

    changed = dict(inputs)
    names = ("query", "key", "value") if inputs.get("causal") else ("key", "value")
    changed.update({name: padded(inputs[name], 3.0) for name in names})
    mask = inputs.get("key_mask")
    mask = torch.ones(batch, keys, dtype=torch.bool, device=device) if mask is None else mask
    changed["key_mask"] = padded(mask, 0.0)
    if inputs.get("log_decay") is not None:
        changed["log_decay"] = padded(inputs["log_decay"].expand(batch, keys, groups), 0.0)
    out, state = race_attention(**changed, **how, return_state=True)
    return out[:, kept] if inputs.get("causal") else out, state


def no_tokens(inputs: Inputs) -> RaceState:
    """The neutral state of these inputs."""
    tables, planes = inputs["hyperplanes"].shape[1:3]
    rows = inputs["cu_seqlens"].shape[0] - 1 if "cu_seqlens" in inputs else inputs["key"].shape[0]
    groups, value_dim = inputs["value"].shape[2:]
    return RaceState.zeros(rows, groups, tables, planes, value_dim, device=inputs["key"].device)


# -------------------------------------------------------------------------------------------- evaluation


def evaluate(route: Route, inputs: Inputs, **how: Any) -> dict[str, Tensor]:
    """Output, final state, and every gradient of one fixed random functional of both."""
    out, state = route(inputs, **how)
    results = {"out": out, "mass": state.mass, "value_sum": state.value_sum}
    results |= {"log_decay of the state": state.log_decay, "tokens": state.tokens.double()}
    generator = torch.Generator().manual_seed(2)
    loss = torch.zeros((), dtype=torch.float64, device=out.device)
    for name, size in (("out", 1.0), ("mass", 0.1), ("value_sum", 0.1)):
        # bfloat16 holds these numbers exactly, so that every dtype is asked the same question
        cotangent = (size * torch.randn(results[name].shape, generator=generator)).bfloat16().to(out.device)
        loss = loss + (results[name].double() * cotangent.double()).sum()
    wanted = leaves(inputs)
    if wanted:
        gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
        results |= {f"gradient of {name}": g for name, g in zip(wanted, gradients, strict=True)}
    return {name: x.detach() for name, x in results.items()}


class Right(dict[str, Tensor]):
    """What the oracle says, float64; and of three sums over all tokens, which may cancel, how large the terms are.

    Soft buckets that are rounded to 16 bits move each token's term by a part of its own size, whatever else is exact:
    the sum then moves by that part of the root of the terms' sum of squares, and not of itself. With bfloat16 buckets
    and float64 for all else, the gradient of beta in the case "one-token-short" of test_triton_causal_gradients.py,
    terms of 1.0 that add up to 0.015, is 1.6 % off, which is 0.03 % of the terms; the value sums of "one-plane" in
    test_triton_causal.py, terms of 7.6 that add up to 3.5, are 0.51 % off, 0.23 % of the terms. A log_decay given by
    head is in a query's output as often as there are tokens from a key to it: in the case "edges", "all" of
    test_triton_packed.py (seed 4) queries add 128, which come to 51 and -6.

    Attributes:
        terms: the root of the sum of squares of what tokens add, by the name of the result.
    """

    def __init__(self, results: dict[str, Tensor], terms: dict[str, float]) -> None:
        super().__init__(results)
        self.terms = terms


def by_oracle(
    inputs: Inputs,
    asked: Callable[[Any, Inputs], Any] = lambda results, inputs: results,
    device: torch.device | str = "cpu",
) -> Right:
    """Results and gradients of the float64 oracle, for inputs as they are.

    Args:
        inputs: of the oracle, of any dtype.
        asked: what of its output and state the results are.
        device: where it computes.
    """
    of_beta, of_sums, of_decay = [torch.zeros(())], [torch.zeros(())], [torch.zeros(())]
    sides, final_state, start = testing._side_probabilities, testing._Run.final_state, testing._Run.__init__

    def for_each_query(run: testing._Run, *arguments: Any) -> None:
        """A head's decay is in a pair's weight as often as there are tokens from the key to the query or the end."""
        start(run, *arguments)
        if not arguments[5].requires_grad or not run.left_BKG.shape[1]:
            return
        token = torch.arange(run.left_BKG.shape[1], device=run.left_BKG.device)
        between = (token[:, None] - token)[..., None]
        pairs, left = run.weight_BQKG.detach() * between, run.left_BKG.detach() * between[-1:, :]
        run.weight_BQKG.register_hook(lambda gradient: of_decay.append((gradient * pairs).sum(2).square().sum().cpu()))
        if run.left_BKG.requires_grad:
            run.left_BKG.register_hook(lambda gradient: of_decay.append((gradient * left).square().sum().cpu()))

    def for_each_token(x: Tensor, planes: Tensor, beta: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        share = x.shape[2] // planes.shape[0]
        beta = beta.repeat_interleave(share, 0).expand(x.shape[:3]).clone()
        if beta.requires_grad:
            beta.register_hook(lambda gradient: of_beta.append(gradient.square().sum().cpu()))
        return sides(x, planes.repeat_interleave(share, 0), beta, floor)

    def with_terms(run: testing._Run) -> tuple[Tensor, Tensor]:
        weight = run.left_BKG[..., None, None] * testing._buckets(*run.key_side)
        squares = torch.einsum("bkglr,bkgv->", weight.square(), run.value_BKGv.square())
        of_sums.append(squares.detach().cpu())
        return final_state(run)

    with (
        mock.patch.object(testing, "_side_probabilities", for_each_token),
        mock.patch.object(testing._Run, "final_state", with_terms),
        mock.patch.object(testing._Run, "__init__", for_each_query),
    ):
        results = evaluate(lambda x: asked(oracle(**x, return_state=True), x), in_double(inputs, device))
    terms = {"gradient of beta": of_beta, "value_sum": of_sums}
    if inputs.get("log_decay") is not None and inputs["log_decay"].ndim == 1:
        terms["gradient of log_decay"] = of_decay
    results = {name: x.cpu() for name, x in results.items()}
    return Right(results, {name: float(sum(squares)) ** 0.5 for name, squares in terms.items()})


@functools.lru_cache(maxsize=64)
def expected(case: str, dtype: torch.dtype) -> Right:
    """What the oracle says of a case whose inputs are rounded to ``dtype``."""
    return by_oracle(inputs_of(case, dtype))


def assert_decay_gradient(inputs: Inputs, dtype: torch.dtype) -> None:
    """log_decay's gradient of out alone, on the kernels of a GPU: a state's would hide what small weights are worth."""
    found = []
    for given, backend in ((inputs, "triton"), (in_double(inputs), "reference")):
        out = race_attention(**given, backend=backend)
        assert isinstance(out, Tensor)
        along = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        found.append(torch.autograd.grad(out, given["log_decay"], along.to(out))[0].cpu())
    assert_within_budget(*found, dtype, "backward", name="the gradient of log_decay")


def assert_equal_results(actual: dict[str, Tensor], right: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert actual.keys() == right.keys()
    for name, value in right.items():
        if name == "tokens":
            assert torch.equal(actual[name].cpu(), value.cpu()), f"tokens: {actual[name]} and not {value}"
            continue
        direction = "backward" if name.startswith("gradient") else "forward"
        halves = dtype in (torch.bfloat16, torch.float16)
        scale = right.terms.get(name, 0.0) if halves and isinstance(right, Right) else 0.0
        assert_within_budget(actual[name], value, dtype, direction, scale=scale, name=name)


def check(backend: Backend, dtype: torch.dtype, case: str, route: Route, **options: Any) -> None:
    """One cell of the equivalence table."""
    skip_unless_runnable(backend)
    inputs = inputs_of(case, dtype, backend.device)
    try:
        actual = evaluate(route, inputs, backend=backend.name, **options)
    except ValueError as error:
        if backend.name == "reference" or not str(error).startswith("backend:"):
            raise
        pytest.skip(str(error))
    assert_equal_results(actual, expected(case, dtype), dtype)


# ------------------------------------------------------------------------------------- other ways of autograd


def assert_batched_gradients_are_those_of_each(backend: str, **options: Any) -> None:
    """``is_grads_batched``, and with it ``jacobian(vectorize=True)``: a batch of gradients goes back at once."""
    inputs = make_inputs(causal=True, decay="token", tokens=20, requires_grad=True, **options)
    for _ in range(3):  # some backends remember a layout that they have met
        out = race_attention(**inputs, backend=backend)
        wanted = [inputs["query"], inputs["key"], inputs["beta"]]
        along = torch.randn(2, *out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        together = torch.autograd.grad(out, wanted, along, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(out, wanted, one, retain_graph=True) for one in along]
        for x, alone in zip(together, zip(*each, strict=True), strict=True):
            assert_within_budget(x, torch.stack(alone), torch.float32, "backward")


# ------------------------------------------------------------------------------------------------- memory


def assert_negated_views_are_read(backend: str, *, packed: bool, **options: Any) -> None:
    """Views marked as negated, whose memory holds the opposite, give the same to the bit: inputs, states, gradients.

    ``z.conj().imag`` is one, and what comes back through complex numbers.
    """
    options |= {"lengths": (5, 8)} if packed else {"decay": "token", "initial_state": True, "masked": 0.3}
    inputs = make_inputs(causal=True, return_state=True, **options)
    wanted = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]

    def results(of: Callable[[Tensor], Tensor], return_state: bool) -> list[Tensor]:
        given = {name: of(x) if name in wanted else x for name, x in inputs.items()} | {"return_state": return_state}
        if not packed:
            state = inputs["initial_state"]
            given["initial_state"] = RaceState(*map(of, (state.mass, state.value_sum, state.log_decay)), state.tokens)
        leaf = [given[name].requires_grad_() for name in wanted]
        found = race_attention(**given, backend=backend)
        ends = [found[0], found[1].mass, found[1].value_sum, found[1].log_decay] if return_state else [found]
        roots = [x for x in ends if x.requires_grad]
        return [*ends, *torch.autograd.grad(roots, leaf, [of(0.5 * x.detach()) for x in roots])]

    for return_state in (False, True):
        for _ in range(3):  # some backends remember a layout that they have met
            plain, negated = (results(of, return_state) for of in (torch.clone, lambda x: torch._neg_view(-x).detach()))
            assert all(map(torch.equal, plain, negated))
