"""The Triton kernels against the oracle: on a GPU as they are, without one in Triton's interpreter.

The interpreter computes float32 and, since its bfloat16 products are wrong, float16 with float32 products.
Run with TRITON_INTERPRET=1 where there is no GPU; without it these tests are skipped there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from race_attention.features import bucket_weights, sample_hyperplanes
from race_attention.testing import assert_within_budget, make_inputs, oracle
from tests.helpers import CASES, LONG_CASES, assert_equal_results, by_oracle, evaluate, expected, in_double, whole
from tests.interpreter import DEVICE, INTERPRETED, KERNELS_RUN

pytest.importorskip("triton")
from race_attention import race_attention

pytestmark = KERNELS_RUN
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (FLOAT32, FLOAT16) if INTERPRETED else (FLOAT32, FLOAT16, BFLOAT16)

#: Buckets in several tiles; D past 128, scaled as a layer would: at scale 1 every tanh of 200 terms saturates, and
#: 1 - tanh(y)**2 magnifies the rounding of y past any float32 budget.
WIDE: dict[str, dict[str, Any]] = {
    "causal-wide-one-table": {
        "causal": True, "batch": 1, "tokens": 40, "dim": 16, "planes": 8, "tables": 1, "heads": 2, "kv_heads": 1,
        "decay": "token", "initial_state": True,
    },
    "causal-wide-packed": {
        "causal": True, "lengths": (20, 0, 1, 17), "dim": 16, "planes": 1, "tables": 40, "heads": 2, "masked": 0.2,
    },
    "full-wide": {"batch": 1, "tokens": 20, "dim": 16, "planes": 5, "tables": 5, "heads": 2, "initial_state": True},
    "causal-many-planes": {
        "causal": True, "batch": 1, "tokens": 20, "dim": 16, "planes": 10, "tables": 1, "heads": 1, "beta": 20.0,
    },
    "causal-large-head": {
        "causal": True, "batch": 1, "tokens": 20, "dim": 200, "value_dim": 144, "scale": 0.07,
        "planes": 2, "tables": 2, "heads": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [n for n in {**CASES, **LONG_CASES} if "bucket" not in n])
def test_equals_the_oracle(case: str, dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == FLOAT16 and case != "causal-packed-all":
        pytest.skip("float16 differs from float32 in the loads alone: one case in the interpreter")
    options = CASES.get(case) or LONG_CASES[case]
    inputs = make_inputs(**options, dtype=dtype, device=DEVICE, requires_grad=True, seed=len(case))
    assert_equal_results(evaluate(whole, inputs, backend="triton"), expected(case, dtype), dtype)


@pytest.mark.parametrize("case", WIDE)
@pytest.mark.parametrize("dtype", DTYPES[:1] if INTERPRETED else DTYPES, ids=str)
def test_wide_shapes_equal_the_oracle(case: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(**WIDE[case], dtype=dtype, device=DEVICE, requires_grad=True, seed=len(case))
    right = evaluate(lambda given: oracle(**given, return_state=True), in_double(inputs))
    assert_equal_results(evaluate(whole, inputs, backend="triton"), right, dtype)


def _small(**options: Any) -> dict[str, Any]:
    given = {"batch": 1, "tokens": 9, "dim": 6, "value_dim": 5, "heads": 2, "planes": 2, "tables": 2} | options
    made = make_inputs(**given, dtype=FLOAT32, device=DEVICE, requires_grad=False, seed=3)
    return {name: x for name, x in made.items() if name != "return_state"}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("planes", "tables"), [(3, 2), (7, 1)])
def test_large_betas_keep_the_digits_of_small_projections(causal: bool, planes: int, tables: int) -> None:
    """beta multiplies the error of tanh: 1 - 2r with r near a half is good to 2**-24, and 1e4 times that is not."""
    inputs = make_inputs(
        batch=1, tokens=33, heads=1, planes=planes, tables=tables, causal=causal, scale=1e-4, device=DEVICE,
        requires_grad=True, seed=2,
    )  # fmt: skip
    inputs["beta"] = (1e4 * inputs["beta"] / 2).detach().requires_grad_()
    assert_equal_results(evaluate(whole, inputs, backend="triton"), by_oracle(inputs), FLOAT32)


def test_repeats_are_equal_to_the_bit() -> None:
    inputs = make_inputs(**CASES["causal-decay-token"], dtype=FLOAT32, device=DEVICE, requires_grad=True, seed=1)
    first = evaluate(whole, inputs, backend="triton")
    again = evaluate(whole, inputs, backend="triton")
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


def test_strides_are_read_in_place() -> None:
    inputs = _small(causal=True)
    right = race_attention(**inputs, backend="triton")
    for name in ("query", "key", "value"):
        inputs[name] = inputs[name].permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    assert torch.equal(race_attention(**inputs, backend="triton"), right)
    inputs["value"] = inputs["value"].transpose(2, 3).contiguous().transpose(2, 3)  # elements apart: copied
    assert torch.equal(race_attention(**inputs, backend="triton"), right)


@pytest.mark.parametrize("causal", [True, False])
def test_no_tokens(causal: bool) -> None:
    inputs = _small(causal=causal, initial_state=True)
    for name in ("query", "key", "value"):
        inputs[name] = inputs[name][:, :0].requires_grad_()
    out, state = race_attention(**inputs, backend="triton", return_state=True)
    assert out.shape == (1, 0, 2, 5)
    assert torch.equal(state.mass, inputs["initial_state"].mass.to(state.mass))
    torch.autograd.grad(out.sum() + 0 * inputs["key"].sum(), inputs["key"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_packed_sequence_without_tokens_in_every_dtype(dtype: torch.dtype) -> None:
    """What is kept for the backward pass is empty then, and has its own dtype all the same."""
    inputs = make_inputs(
        lengths=(0,), causal=True, decay="token", initial_state=True, dtype=dtype, device=DEVICE, requires_grad=True
    )
    assert_equal_results(evaluate(whole, inputs, backend="triton"), by_oracle(inputs), dtype)


@pytest.mark.parametrize("missing", ["queries", "keys"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_one_side_without_tokens(missing: str, kv_heads: int) -> None:
    """Queries that read a state alone, and keys that only add to one: the sweeps of a stream."""
    given = {"tokens": 0 if missing == "queries" else 40, "keys": 0 if missing == "keys" else 40}
    options = {"batch": 2, "heads": 2, "kv_heads": kv_heads, "dim": 16, "initial_state": True, "requires_grad": True}
    inputs = make_inputs(**given, **options, device=DEVICE)
    right = by_oracle(inputs)
    assert_equal_results(evaluate(whole, inputs, backend="triton"), right, FLOAT32)


def test_masked_garbage_is_not_read() -> None:
    inputs = _small(causal=True)
    inputs["key_mask"] = torch.ones(1, 9, dtype=torch.bool, device=DEVICE)
    inputs["key_mask"][:, 4:6] = False
    right = race_attention(**inputs, backend="triton")
    for name in ("key", "value"):
        inputs[name][:, 4:6] = float("nan")
    assert torch.equal(race_attention(**inputs, backend="triton"), right)


def test_decay_that_forgets_everything_keeps_the_digits_of_later_tokens() -> None:
    inputs = _small(causal=True)
    decay = torch.full((1, 9, 2), -0.1, device=DEVICE)
    decay[:, 3] = -1e4
    inputs["log_decay"] = decay
    right = oracle(**in_double(inputs))
    assert_within_budget(race_attention(**inputs, backend="triton"), right, FLOAT32, "forward")


def test_what_is_not_served_is_named() -> None:
    inputs = _small(causal=True)
    with pytest.raises(ValueError, match="readout"):
        race_attention(**inputs, backend="triton", readout="bucket")
    with pytest.raises(ValueError, match="bfloat16"):
        race_attention(**{n: x.double() if n in ("query", "key", "value") else x for n, x in inputs.items()},
                       backend="triton")  # fmt: skip


@pytest.mark.parametrize(
    ("case", "packed", "dtype"),
    [("full", False, FLOAT32), ("full", True, FLOAT32), ("causal", False, FLOAT32), ("causal", True, FLOAT32),
     ("causal", False, FLOAT16)],
)  # fmt: skip
def test_operators_pass_opcheck(case: str, packed: bool, dtype: torch.dtype) -> None:
    from race_attention.backends.triton.ops import triton_forward

    inputs = _small()
    tensors = [inputs[name].to(dtype).requires_grad_() for name in ("query", "key", "value")]
    planes = sample_hyperplanes(2, 2, 2, 6, device=DEVICE).requires_grad_()
    beta = torch.ones(2, device=DEVICE, requires_grad=True)
    decay = -torch.rand(1, 9, 2, device=DEVICE) if case == "causal" else None
    bounds = torch.tensor([0, 3, 3, 9], device=DEVICE) if packed else None
    arguments = (*tensors, planes, beta, decay, None, bounds, bounds, None, None, case == "causal")
    torch.library.opcheck(triton_forward, arguments)
    torch.library.opcheck(triton_forward, (*arguments, False))


def test_the_compilers_are_described() -> None:
    from race_attention.backends import triton

    facts = triton.describe()
    assert facts["triton"]
    assert facts["ptxas"]
    hopper = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
    assert ("warp-group matrix instructions" in facts) == hopper


def test_second_derivatives_are_refused() -> None:
    inputs = _small(causal=True)
    inputs["query"].requires_grad_()
    out = race_attention(**inputs, backend="triton")
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("tables", "planes"), [(2, 3), (5, 4), (1, 8)])
def test_decoding_is_the_causal_kernel_token_by_token(grouped: bool, tables: int, planes: int) -> None:
    from race_attention.backends.triton.decode import decode_

    generator = torch.Generator().manual_seed(0)
    groups, heads, tokens = 2, 4 if grouped else 2, 5
    q, k, v = (torch.randn(2, tokens, n, 7, generator=generator).to(DEVICE) for n in (heads, groups, groups))
    hyperplanes = sample_hyperplanes(groups, tables, planes, 7, device=DEVICE)
    beta = torch.full((groups,), 2.0, device=DEVICE)
    decay = -torch.rand(2, tokens, groups, generator=generator).to(DEVICE)
    mass = torch.zeros(2, groups, tables, 1 << planes, dtype=torch.float64, device=DEVICE)
    value_sum = torch.zeros(*mass.shape, 7, dtype=torch.float64, device=DEVICE)
    outs = [decode_(q[:, t], k[:, t], v[:, t], hyperplanes, beta, decay[:, t], mass, value_sum) for t in range(tokens)]
    right, state = oracle(q, k, v, hyperplanes, beta, causal=True, log_decay=decay, return_state=True)
    assert_within_budget(torch.stack(outs, 1), right, FLOAT32, "forward")
    assert_within_budget(mass, state.mass, FLOAT32, "forward")
    assert_within_budget(value_sum, state.value_sum, FLOAT32, "forward")


def test_decode_names_a_state_that_does_not_fit() -> None:
    from race_attention.backends.triton.decode import decode_

    x = torch.zeros(1, 2, 4, device=DEVICE)
    state = torch.zeros(1, 2, 1, 2, device=DEVICE)
    with pytest.raises(ValueError, match="value_sum"):
        decode_(x, x, x, sample_hyperplanes(2, 1, 1, 4, device=DEVICE), x[0, :, 0], None, state, state)


def test_shape_classes_know_nothing_of_lengths() -> None:
    from race_attention.backends.triton import plan

    shape = plan.shape_class(128, 128, 4, 4, BFLOAT16, "bf16")
    shortest, longest = plan.run_lengths(shape)
    for tokens in (1, 63, 64, 1000, 10**6, 10**7):
        for batch, groups in ((1, 4), (3, 64)):
            runs = plan.runs_of(batch, tokens, groups, shortest, longest, None)
            assert runs.count <= runs.capacity
            assert runs.per_row * runs.length >= tokens > (runs.per_row - 1) * runs.length


@pytest.mark.parametrize("lengths", [(5, 0, 0, 64, 1, 130), (0, 0), (), (7,), (1,) * 1100 + (200, 0)], ids=len)
def test_runs_of_packed_sequences(lengths: tuple[int, ...]) -> None:
    from race_attention.backends.triton.runs import packed_table

    bounds = torch.tensor((0, *lengths), device=DEVICE).cumsum(0)
    runs = [-(-length // 32) for length in lengths]
    count = sum(lengths) // 32 + len(lengths)
    right, firsts = [], [0]
    for row, (number, begin, end) in enumerate(zip(runs, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        right += [[row, begin + 32 * r, min(begin + 32 * (r + 1), end), int(r == number - 1)] for r in range(number)]
        firsts.append(firsts[-1] + number)
    right += [[0, 0, 0, 0]] * (count - len(right))
    table, first = packed_table(bounds, 32, count)
    assert table.tolist() == right
    assert first.tolist() == firsts


def test_the_users_table_comes_first(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from race_attention.backends.triton import configs

    monkeypatch.setenv("RACE_ATTENTION_CONFIG", str(tmp_path / "own.json"))
    configs._users_table.cache_clear()
    name = configs.key("causal_readout", 128, 128, 64, BFLOAT16)
    configs.write_users_table({name: configs.Config(128, 8, 3)}, "some GPU")
    assert configs.config("causal_readout", 128, 128, 64, BFLOAT16) == configs.Config(128, 8, 3)
    assert configs.config("causal_readout", 64, 128, 64, BFLOAT16) != configs.Config(128, 8, 3)
    monkeypatch.undo()
    configs._users_table.cache_clear()


def test_autotuning_keeps_the_fastest_that_is_right(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that would be fastest is compiled wrongly here, and another does not compile."""
    from race_attention.backends.triton import autotune, configs
    from race_attention.backends.triton.ops import triton_forward

    wrong, fails, slow, fast = (configs.Config(*c) for c in ((64, 4, 1), (64, 8, 1), (16, 4, 1), (32, 4, 1)))
    times = {wrong: 1.0, fast: 2.0, slow: 3.0}

    def on_trial() -> configs.Config:
        return next(reversed(configs._trial.values()))

    def forward(*inputs: Any) -> Any:
        if on_trial() == fails:
            raise RuntimeError("out of registers")
        out, *rest = triton_forward(*inputs)
        return (out * 1.1 if on_trial() == wrong else out, *rest)

    monkeypatch.setenv("RACE_ATTENTION_CONFIG", str(tmp_path / "own.json"))
    monkeypatch.setattr(configs, "KERNELS", ("full_accumulate", "full_readout"))
    monkeypatch.setattr(autotune, "triton_forward", forward)
    monkeypatch.setattr(autotune, "_time", lambda step: times[on_trial()])
    monkeypatch.setattr(autotune, "_CHECKED", 70)
    configs._users_table.cache_clear()
    lines: list[str] = []
    try:
        candidates = (wrong, fails, slow, fast)
        autotune.autotune(16, 16, 2, 2, FLOAT32, tokens=64, candidates=candidates, report=lines.append)
        assert set(configs._users_table().values()) == {fast}
        assert len(configs._users_table()) == 2
    finally:
        monkeypatch.undo()
        configs._users_table.cache_clear()
    assert sum("wrong: out has a relative error of 1.0e-01" in line for line in lines) == 2
    assert sum("RuntimeError" in line for line in lines) == 2


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="a CUDA graph needs a GPU")
def test_a_graph_captures_decoding_and_the_kernels() -> None:
    inputs = _small(causal=True)
    race_attention(**inputs, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = race_attention(**inputs, backend="triton")
    inputs["value"].mul_(2)
    graph.replay()
    assert torch.equal(out, race_attention(**inputs, backend="triton"))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_compiled_whole_with_dynamic_lengths_once(dtype: torch.dtype, causal: bool) -> None:
    """One graph for all lengths, of one chunk or several; the kernels are called as they are, whatever the compiler."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda **given: race_attention(**given), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (20, 33, 140):
            inputs = _small(causal=causal, tokens=tokens)
            given = {name: inputs[name].to(dtype) for name in ("query", "key", "value")}
            given["key"].requires_grad_()
            inputs |= given
            out, right = compiled(**inputs, backend="triton"), race_attention(**inputs, backend="triton")
            assert torch.equal(out, right)
            gradients = [torch.autograd.grad(x.square().sum(), inputs["key"])[0] for x in (out, right)]
            assert torch.equal(*gradients)


def test_features_are_those_of_the_reference() -> None:
    """A single key: the final mass is its buckets."""
    inputs = _small(tokens=1, planes=4, tables=3)
    _, state = race_attention(**inputs, backend="triton", return_state=True)
    planes = inputs["hyperplanes"].double() * inputs.get("scale", 1.0)
    beta = torch.as_tensor(inputs["beta"], dtype=torch.float64).to(DEVICE).expand(2)
    right = bucket_weights(inputs["key"].double()[:, 0, :, None], planes.expand(2, -1, -1, -1), beta)
    assert_within_budget(state.mass, right[:, :, 0], FLOAT32, "forward")


def test_a_kernel_that_does_not_fit_has_fewer_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    from race_attention.backends.triton import start

    tried: list[int] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return self

        def __call__(self, x: torch.Tensor, *, num_stages: int) -> None:
            tried.append(num_stages)
            if num_stages > 1 or fails:
                raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")

    fails, x = False, torch.zeros(1)
    start.start(Kernel(), (1,), x, num_stages=3)
    assert tried == [3, 2, 1]
    fails = True
    with pytest.raises(triton.runtime.errors.OutOfResources):
        start.start(Kernel(), (1,), x, num_stages=2)


@pytest.mark.parametrize(
    ("ptxas", "newer", "given", "wanted"),
    [
        ("12.8", "12.9", None, {"TRITON_PTXAS_PATH": "/newer"}),
        ("12.8", "12.9", "/mine", {"DISABLE_MMA_V3": "1"}),
        ("12.8", None, None, {"DISABLE_MMA_V3": "1"}),
        ("13.0", "12.9", None, {}),
        (None, None, None, {"DISABLE_MMA_V3": "1"}),
    ],
)
def test_hopper_compiles_with_a_ptxas_that_is_right(
    ptxas: str | None, newer: str | None, given: str | None, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from race_attention.backends.triton import start

    def tool(path: str, version: str | None) -> Any:
        return None if version is None else SimpleNamespace(path=path, version=version)

    nvidia = SimpleNamespace(ptxas=tool("/old", ptxas), ptxas_blackwell=tool("/newer", newer))
    monkeypatch.setattr(start, "triton", SimpleNamespace(knobs=SimpleNamespace(nvidia=nvidia)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    if given is not None:
        monkeypatch.setenv("TRITON_PTXAS_PATH", given)
    assert start._environment.__wrapped__() == wanted
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert start._environment.__wrapped__() == {}
