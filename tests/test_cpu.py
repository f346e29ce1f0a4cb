"""The CPU backend beyond the equivalence table: instruction sets, threads, strides, operators, refusals, extremes."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from race_attention import RaceState, race_attention, sample_hyperplanes
from race_attention.backends import cpu, cpu_library
from race_attention.checks import check
from race_attention.testing import assert_within_budget, leaves, make_inputs, oracle, relative_error
from tests.helpers import (
    BACKENDS,
    CASES,
    by_oracle,
    evaluate,
    expected,
    in_double,
    inputs_of,
    skip_unless_runnable,
    whole,
)

BACKEND = next(b for b in BACKENDS if b.name == "cpu")
DTYPES = pytest.mark.parametrize("dtype", BACKEND.dtypes, ids=str)
SERVED = [name for name, options in CASES.items() if options.get("readout") != "bucket"]


@pytest.fixture(autouse=True)
def _built(request):
    if request.function.__name__ != "test_without_a_library_the_reference_serves_and_says_why":
        skip_unless_runnable(BACKEND)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def in_a_process(code: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **variables}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


# ---- instruction sets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_keeps_the_budgets(isa):
    """Every case and dtype, forward and backward, in a process that is told which instruction set to use."""
    if isa not in cpu_library.load().isas():
        pytest.skip(f"this processor has no {isa}")
    done = in_a_process(
        """
        import torch
        torch.set_num_threads(1)
        from tests.helpers import CASES, LONG_CASES, BACKENDS, check, whole
        from race_attention.backends import cpu
        print(cpu.instruction_set())
        backend = next(b for b in BACKENDS if b.name == "cpu")
        for dtype in backend.dtypes:
            for case in (*CASES, *LONG_CASES):
                if {**CASES, **LONG_CASES}[case].get("readout") != "bucket":
                    check(backend, dtype, case, whole)
        """,
        RACE_ATTENTION_CPU_ISA=isa,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == isa


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_nan_under_every_instruction_set(isa):
    if isa not in cpu_library.load().isas():
        pytest.skip(f"this processor has no {isa}")
    code = "import pytest, sys; sys.exit(pytest.main(['-q', 'tests/test_nonfinite.py', '-k', 'cpu-cpu']))"
    done = in_a_process(code, RACE_ATTENTION_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("RACE_ATTENTION_CPU_LIBRARY", "/nowhere/lib.so", "was not built: there is no /nowhere/lib.so"),
        ("RACE_ATTENTION_CPU_ISA", "abacus", "got 'abacus', allowed on this processor is one of baseline"),
    ],
)
def test_without_a_library_the_reference_serves_and_says_why(variable, value, says):
    if variable.endswith("ISA"):
        skip_unless_runnable(BACKEND)
    done = in_a_process(
        """
        import torch
        from race_attention import race_attention
        from race_attention.testing import make_inputs
        inputs = make_inputs()
        assert torch.isfinite(race_attention(**inputs)).all()
        try:
            race_attention(**inputs, backend="cpu")
        except ValueError as error:
            print(error)
        """,
        **{variable: value},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert says in done.stdout


def test_what_is_not_served_is_said():
    half = make_inputs(dtype=torch.float16)
    with pytest.raises(ValueError, match="float32, float64 and bfloat16, not float16"):
        race_attention(**half, backend="cpu")
    with pytest.raises(ValueError, match="global readout only"):
        race_attention(**make_inputs(), readout="bucket", backend="cpu")
    assert cpu.instruction_set() in cpu.describe()["instruction set"]


# ---- accuracy -------------------------------------------------------------------------------------------------


def differentiable(case: str):
    options = {**CASES[case], "batch": 1, "dim": 2, "value_dim": 1, "tables": 1, "planes": 2}
    options |= {"lengths": (2, 0, 1)} if "lengths" in options else {"tokens": 3}
    options |= {"key_lengths": (1, 2, 0)} if "key_lengths" in options else {}
    options |= {"keys": 4} if "keys" in options else {}
    inputs = make_inputs(**options, dtype=torch.float64, requires_grad=True, seed=5)
    if "log_decay" in inputs:
        inputs["log_decay"] = (inputs["log_decay"].detach() - 0.1).requires_grad_()
    names, tensors = zip(*leaves(inputs).items(), strict=True)
    state = inputs.get("initial_state")

    def function(*tensors):
        given = dict(zip(names, tensors, strict=True))
        mass, value_sum = given.pop("initial_state.mass", None), given.pop("initial_state.value_sum", None)
        if state is not None:
            given["initial_state"] = RaceState(mass, value_sum, state.log_decay, state.tokens)
        out, after = race_attention(**{**inputs, **given}, return_state=True, backend="cpu")
        return out, after.mass, after.value_sum

    return function, tensors


@pytest.mark.parametrize("case", SERVED)
def test_derivatives_against_differences(case):
    function, tensors = differentiable(case)
    assert torch.autograd.gradcheck(function, tensors, eps=1e-6, atol=1e-7, rtol=1e-6, check_undefined_grad=True)


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buckets_of_single_tokens(dtype, beta):
    """A row of one key has its buckets as mass: tanh and exp over their whole range, small factors relatively.

    To a few units in the last place; of bfloat16 tokens to a tenth of those tokens' own rounding.
    """
    x = torch.cat([torch.logspace(-7, 1.5, 700), -torch.logspace(-7, 1.5, 700)]).to(dtype)
    inputs = {
        "query": x.view(-1, 1, 1, 1),
        "key": x.view(-1, 1, 1, 1),
        "value": torch.ones(len(x), 1, 1, 1, dtype=dtype),
        "hyperplanes": torch.ones(1, 1, 1, 1),
    }
    _, state = race_attention(**inputs, beta=beta, return_state=True, backend="cpu")
    _, right = oracle(**inputs, beta=torch.tensor(beta), return_state=True)
    worst = ((state.mass - right.mass) / right.mass).abs().max().item()
    # u falls by exp(-z), z = 2 beta tanh: an error of 2 ulp in tanh is one of 2 z ulp in u.
    assert worst <= ((6 + 4 * beta) * 2**-24 if dtype == torch.float32 else (1 + 1.5 * beta) * 1e-4)
    assert (state.mass.sum(-1) - 1).abs().max().item() <= 2**-23  # a token counts as one, however it is spread


@DTYPES
@pytest.mark.parametrize(("planes", "beta"), [(10, 1e4), (1, 1e4), (4, 1e-3)])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e4])
def test_extremes_stay_finite_and_within_the_hull(dtype, planes, beta, magnitude):
    inputs = make_inputs(
        causal=True,
        tokens=37,
        dim=5,
        tables=1,
        planes=planes,
        beta=beta,
        decay="token",
        dtype=dtype,
        requires_grad=True,
    )
    with torch.no_grad():
        inputs["query"] *= magnitude
        inputs["key"] *= -magnitude
    out = race_attention(**inputs, backend="cpu")
    low, high = inputs["value"].cummin(1).values, inputs["value"].cummax(1).values
    slack = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert bool(((out >= low - slack) & (out <= high + slack)).all())
    for gradient in torch.autograd.grad(out.square().sum(), list(leaves(inputs).values())):
        assert bool(gradient.isfinite().all())


def test_a_key_of_the_opposite_corner_is_still_seen():
    """Ten planes of opposite signs: the weight is 2**-130, and its reciprocal no float32."""
    inputs = make_inputs(
        batch=1, tokens=1, heads=1, dim=4, tables=1, planes=10, beta=1e4, causal=True, requires_grad=True
    )
    with torch.no_grad():
        inputs["query"].copy_(-10 * inputs["key"])
        inputs["key"] *= 10
    out = race_attention(**inputs, backend="cpu")
    assert torch.allclose(out, inputs["value"], rtol=1e-5)
    for gradient in torch.autograd.grad(out.sum(), list(leaves(inputs).values())):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("log_decay", [-2.0, -5.0, -8.0, -12.0])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_decay_gradient_where_a_token_sees_hardly_more_than_itself(log_decay, kv_heads):
    inputs = make_inputs(
        causal=True, tokens=300, decay="token", heads=4, kv_heads=kv_heads, dim=20, beta=1.0, requires_grad=True, seed=3
    )
    with torch.no_grad():
        inputs["log_decay"].mul_(0.1).add_(log_decay)
    found, right = (of["gradient of log_decay"] for of in (evaluate(whole, inputs, backend="cpu"), by_oracle(inputs)))
    assert_within_budget(found, right, torch.float32, "backward")


@pytest.mark.parametrize("strength", [-30.0, -100.0, -1e4])
def test_strong_decay(strength):
    inputs = make_inputs(causal=True, tokens=50, decay="token", masked=0.3, requires_grad=True, seed=3)
    with torch.no_grad():
        inputs["log_decay"][:, ::5] = strength
        inputs["key_mask"][:, ::5] = True  # every output sees a key within the range of float32
    actual = evaluate(whole, inputs, backend="cpu")
    right = evaluate(lambda given: oracle(**given, return_state=True), in_double(inputs))
    for name, value in right.items():
        if name != "tokens":
            direction = "backward" if name.startswith("gradient") else "forward"
            assert_within_budget(actual[name], value, torch.float32, direction, name=name, scale=1e-3)


# ---- threads ------------------------------------------------------------------------------------------------------

THREADED = {
    "causal, one head": {"causal": True, "tokens": 9000, "batch": 1, "heads": 1, "decay": "token"},
    "causal, grouped": {"causal": True, "tokens": 5000, "batch": 1, "heads": 6, "kv_heads": 3, "masked": 0.2},
    "causal, uneven": {"causal": True, "lengths": (7000, 1, 0, 3, 900, *[5] * 200), "initial_state": True},
    "full, one head": {"tokens": 6000, "keys": 9000, "batch": 1, "heads": 1, "initial_state": True},
    "full, uneven": {"lengths": (5000, 0, 40, 1), "key_lengths": (3, 9, 7000, 2), "heads": 4, "kv_heads": 2},
}


@pytest.mark.parametrize("name", THREADED)
def test_results_do_not_depend_on_the_threads(name, threads):
    inputs = make_inputs(**THREADED[name], dim=16, planes=3, requires_grad=True)
    threads(1)
    alone = evaluate(whole, inputs, backend="cpu")
    reference = evaluate(whole, in_double(inputs), backend="reference")
    for key, right in reference.items():
        if key != "tokens":
            assert relative_error(alone[key], right, scale=1e-2) <= 1e-5, key
    for count in (2, 3, 16):
        threads(count)
        together = evaluate(whole, inputs, backend="cpu")
        for key in alone:
            assert torch.equal(alone[key], together[key]), (count, key)


# Large enough (8 MB) that a thread passes over several heads together.
LARGE_OPTIONS = {"causal": True, "batch": 1, "heads": 4, "dim": 128, "value_dim": 128, "tables": 2, "planes": 2}
LARGE = {
    "plain": {"tokens": 8400},
    "decay, state": {"tokens": 8400, "decay": "token", "initial_state": True, "masked": 0.2},
    "grouped": {"tokens": 8400, "heads": 8, "kv_heads": 4, "dim": 64, "value_dim": 64},
    "packed": {"lengths": (6000, 1, 0, 2400), "decay": "head"},
    "strong decay": {"tokens": 8400, "decay": "token", "heads": 1, "kv_heads": 1, "strong": True},
    "full": {"causal": False, "tokens": 8400, "initial_state": True, "masked": 0.2},
    "full, grouped": {"causal": False, "tokens": 8400, "heads": 8, "kv_heads": 4, "dim": 64, "value_dim": 64},
    "full, packed": {"causal": False, "lengths": (6000, 1, 0, 2400), "key_lengths": (2000, 3, 700, 8000)},
}


def large_inputs(name, dtype):
    options = {**LARGE_OPTIONS, **LARGE[name]}
    strong = options.pop("strong", False)
    inputs = make_inputs(**options, dtype=dtype, requires_grad=True)
    if strong:  # blocks that end early, and states that vanish
        with torch.no_grad():
            inputs["log_decay"][:, 1::7] = -12.0
            inputs["log_decay"][:, ::5] = -30.0
    return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_heads_passed_over_together(name, dtype, threads):
    """By one thread, two, three that take a row's runs in turns, five with pieces of it: the same to the bit."""
    inputs = large_inputs(name, dtype)
    threads(1)
    alone = evaluate(whole, inputs, backend="cpu")
    for key, right in evaluate(whole, in_double(inputs), backend="reference").items():
        if key != "tokens":
            direction = "backward" if key.startswith("gradient") else "forward"
            assert_within_budget(alone[key], right, dtype, direction, name=key, scale=1e-2)
    for count in (2, 3, 5):
        threads(count)
        together = evaluate(whole, inputs, backend="cpu")
        for key in alone:
            assert torch.equal(alone[key], together[key]), (count, key)


@pytest.mark.parametrize("name", ["plain", "full"])
def test_gradients_that_nobody_wants_are_not_written(name, threads):
    """Results leave the kernels in several ways: each must see that there is no place for one."""
    threads(2)
    inputs = large_inputs(name, torch.float32)
    tokens = [inputs[key] for key in ("query", "key", "value")]
    out = race_attention(**inputs, backend="cpu")
    weight = torch.randn_like(out)
    wanted = torch.autograd.grad(out, tokens, weight)
    for place, x in enumerate(tokens):
        rest = {key: y.detach() if y is not x and isinstance(y, torch.Tensor) else y for key, y in inputs.items()}
        (alone,) = torch.autograd.grad(race_attention(**rest, backend="cpu"), x, weight)
        assert torch.equal(alone, wanted[place]), place


def test_other_threads_run_meanwhile():
    """The interpreter's lock is not held: the main thread goes on while another is in the library."""
    x = torch.randn(1, 1, 1, 64).expand(1, 2**20, 1, 64)
    planes = torch.randn(1, 4, 4, 64)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(lambda: race_attention(x, x, x[..., :1], planes, 1.0, causal=True, backend="cpu"))
        turns = 0
        while not call.done():
            time.sleep(0.002)
            turns += 1
    assert turns > 10


def test_calls_from_several_threads(threads):
    threads(2)
    cases = [c for c in SERVED if "packed" not in c] * 3
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda case: evaluate(whole, inputs_of(case, torch.float64), backend="cpu"), cases))
    for case, actual in zip(cases, results, strict=True):
        assert relative_error(actual["out"], expected(case, torch.float64)["out"]) <= 1e-12


class _Outputs(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        inputs = make_inputs(causal=True, tokens=3000, dim=16, seed=index)
        return race_attention(**inputs, backend="cpu")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_after_fork(threads):
    threads(2)
    data = _Outputs()
    here = [data[n] for n in range(len(data))]  # threads have run in this process before it forks
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert all(torch.equal(x, y) for x, y in zip(here, loader, strict=True))


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or os.name == "nt", reason="no such signal here")
def test_a_long_call_can_be_interrupted():
    done = in_a_process(
        """
        import os, signal, threading, time, torch
        from race_attention import race_attention
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with SIGINT ignored
        x = torch.randn(1, 1, 1, 64).expand(1, 2**25, 1, 64)
        threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        begin = time.monotonic()
        try:
            race_attention(x, x, x[..., :1], torch.randn(1, 4, 4, 64), 1.0, causal=True, backend="cpu")
        except KeyboardInterrupt:
            print("interrupted", time.monotonic() - begin < 6)
        """
    )
    assert done.stdout.strip() == "interrupted True", done.stderr[-2000:]


# ---- memory ---------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("strides", ["transposed", "expanded", "sliced"])
@pytest.mark.parametrize("causal", [False, True])
def test_any_strides(dtype, strides, causal):
    """Views of memory that must not be read are NaN ("sliced"), the last dimension has stride 2."""
    inputs = make_inputs(causal=causal, tokens=35, dim=16, value_dim=8, strides=strides, dtype=dtype)
    spread = torch.full((*inputs["value"].shape, 2), float("nan"), dtype=dtype)
    spread[..., 0] = inputs["value"]
    inputs["value"] = spread[..., 0]
    out = race_attention(**inputs, backend="cpu")
    assert_within_budget(out, oracle(**in_double(inputs)), dtype)


@pytest.mark.parametrize("causal", [False, True])
def test_offsets_past_2_31(causal):
    """Tokens so far apart that element offsets exceed 32 bits; the memory between them is never touched."""
    far = 2**30 + 8
    room = torch.empty(3 * far, dtype=torch.bfloat16)
    places = {
        name: room.as_strided((1, 3, 1, 8), (0, far, 8, 1), 16 * n) for n, name in enumerate(("query", "key", "value"))
    }
    inputs = make_inputs(causal=causal, batch=1, tokens=3, heads=1, dtype=torch.bfloat16)
    for name, place in places.items():
        place.copy_(inputs[name])
    right = race_attention(**inputs, backend="cpu")
    assert torch.equal(race_attention(**{**inputs, **places}, backend="cpu"), right)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is kept on Linux")
def test_large_results_take_the_memory_of_those_that_are_gone():
    """And only of those: a result, or a view of it, keeps its memory as long as it lives."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    library = cpu_library.load()
    library.forget()
    query, key, value = (torch.randn(1, 66000, 1, 128) for _ in range(3))  # 33.8 MB
    planes = torch.randn(1, 1, 1, 128)

    def call():
        return race_attention(query, key, value, planes, 1.0, causal=True, backend="cpu")

    first = call()
    right, view, place = first.clone(), first[0, 7], first.data_ptr()
    del first
    second = call()
    assert second.data_ptr() != place
    assert torch.equal(view, right[0, 7])
    del view
    third = call()
    assert third.data_ptr() == place
    assert torch.equal(third, right)
    assert torch.equal(second, right)
    with torch.inference_mode():
        assert torch.equal(call(), right)
    query.requires_grad_()
    (gradient,) = torch.autograd.grad(call().sum(), query)
    assert gradient.shape == query.shape
    assert gradient.is_contiguous()
    assert bool(gradient.isfinite().all())
    library.forget()


@pytest.mark.slow
def test_more_than_2_31_elements():
    """2**29 + 3 tokens of 4 + 4 numbers in the memory of one: the mean of equal values, and every one counted."""
    count = 2**29 + 3
    x = torch.randn(1, 1, 1, 4).expand(1, count, 1, 4)
    one = x[:, :1]
    out, state = race_attention(one, x, x, torch.randn(1, 1, 1, 4), 1.0, return_state=True, backend="cpu")
    assert torch.allclose(out, one, rtol=1e-5)
    assert abs(state.mass.sum().item() / count - 1) <= 1e-5


@pytest.mark.slow
def test_memory_beyond_results_and_gradients():
    """Forward and backward at T = 65,536: peak at most 1.2 times gradients and output."""
    done = in_a_process(
        """
        import resource, torch
        from race_attention import race_attention
        torch.set_num_threads(2)
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        def run(count):
            q, k, v = (torch.randn(1, count, 4, 128).requires_grad_() for _ in range(3))
            grad = torch.randn(1, count, 4, 128)
            before = peak()
            race_attention(q, k, v, torch.randn(4, 4, 4, 128), 1.0, causal=True, backend="cpu").backward(grad)
            return peak() - before, 4 * q.numel() * 4
        run(64)
        used, results = run(65536)
        print(used / results)
        """
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) <= 1.2


# ---- operators -----------------------------------------------------------------------------------------------------


def operands(case: str, dtype=torch.float32):
    inputs = inputs_of(case, dtype)
    options = dict.fromkeys(("log_decay", "key_mask", "cu_seqlens", "cu_seqlens_key", "initial_state"))
    rest = {"causal": False, "scale": 1.0, "readout": "global", "return_state": True}
    call = check(**{**options, **rest, **inputs})
    return (
        *(call.query, call.key, call.value, call.hyperplanes, call.beta, call.log_decay, call.key_mask),
        *(call.cu_seqlens, call.cu_seqlens_key, call.initial_mass, call.initial_value_sum, call.causal, True, True),
    )


@pytest.mark.parametrize(
    "case", ["full-packed-cross", "full-state", "causal-packed-all", "causal-state", "causal-grouped"]
)
def test_opcheck(case):
    given = operands(case)
    torch.library.opcheck(torch.ops.race_attention.cpu_forward.default, given)
    with torch.no_grad():
        out, mass, value_sum, saved = torch.ops.race_attention.cpu_forward(*given)
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in given[:12]]
    wanted = [x is not None for x in (*given[:6], *given[9:11])]
    backward = (*plain, saved, out, mass, value_sum, wanted)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.race_attention.cpu_backward.default, backward, test_utils=utilities)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["causal-decay-token", "full-masked"])
def test_compile_and_export(case):
    inputs = inputs_of(case, torch.float32)
    names, tensors = zip(*((n, x) for n, x in inputs.items() if isinstance(x, torch.Tensor)), strict=True)
    rest = {n: x for n, x in inputs.items() if n not in names}

    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return race_attention(**dict(zip(names, tensors, strict=True)), **rest, backend="cpu")

    right = Layer()(*tensors)
    (gradient,) = torch.autograd.grad(right.sum(), tensors[0])
    torch._dynamo.reset()
    compiled = torch.compile(Layer(), fullgraph=True)(*tensors)
    assert torch.equal(compiled, right)
    assert torch.equal(torch.autograd.grad(compiled.sum(), tensors[0])[0], gradient)
    plain = tuple(x.detach() for x in tensors)
    assert torch.equal(torch.export.export(Layer(), plain).module()(*plain), right)


def test_second_derivatives_are_refused():
    inputs = make_inputs(requires_grad=True)
    out = race_attention(**inputs, backend="cpu")
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="first order only"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("place", "change", "says"),
    [
        (1, lambda x: x[:, :, :, :-1], "key: got"),
        (2, lambda x: x[:, :-1], "value: got"),
        (3, lambda x: x.double(), "hyperplanes: got"),
        (4, lambda x: x[:-1], "beta: got"),
        (5, lambda x: x[:, :-1], "log_decay: got"),
        (6, lambda x: x.to(torch.uint8), "key_mask: got"),
        (7, lambda x: x.flip(0), "cu_seqlens: got"),
        (8, lambda x: x + 1, "cu_seqlens: got"),
        (9, lambda x: x.float(), "initial_mass: got"),
        (10, lambda x: x[:-1], "initial_value_sum: got"),
    ],
)
def test_the_operator_itself_checks_what_the_library_would_read(place, change, says):
    given = [x.detach() if isinstance(x, torch.Tensor) else x for x in operands("causal-packed-all")]
    given[place] = change(given[place])
    with pytest.raises(ValueError, match=says):
        torch.ops.race_attention.cpu_forward(*given)


@pytest.mark.parametrize("mode", ["torch.inference_mode()", "torch.device('meta')", "torch.no_grad()"])
def test_the_first_call_decides_nothing_for_those_after(mode):
    """A model that is looked at before it is trained: what the module keeps must not be of the first call's mode."""
    done = in_a_process(f"""
        import torch
        from race_attention import race_attention
        from race_attention.testing import make_inputs
        inputs, learned = (make_inputs(causal=True, requires_grad=wanted) for wanted in (False, True))
        with {mode}:
            first = race_attention(**inputs, backend="cpu")
        out = race_attention(**learned, backend="cpu")
        assert torch.equal(out, first)
        out.sum().backward()
        assert learned["query"].grad.any()
    """)
    assert done.returncode == 0, done.stderr


def test_compiled_lengths_then_options():
    """Once lengths have changed, T is a symbol in one tensor and a number in one that comes later: equal, though."""
    compiled = torch.compile(lambda given: race_attention(**given, backend="cpu"), fullgraph=True, backend="eager")
    options = [{"tokens": 5}, {"tokens": 9}, {"tokens": 5, "decay": "token"}, {"tokens": 9, "masked": 0.3}]
    options += [{"tokens": 5, "initial_state": True}, {"batch": 3, "tokens": 9, "initial_state": True}]
    for some in options:
        inputs = make_inputs(causal=True, **some)
        assert relative_error(compiled(inputs), race_attention(**inputs, backend="cpu")) <= 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("causal", [True, False])
def test_one_compilation_serves_all_lengths(causal):
    """Shorter than a run of the backward, of one, of several; exported too, with gradients wanted."""
    hyperplanes = sample_hyperplanes(1, 2, 2, 8).requires_grad_()

    class Layer(torch.nn.Module):
        def forward(self, x):
            return race_attention(x, x, x, hyperplanes, 2.0, causal=causal, backend="cpu")

    def inputs(tokens):
        return torch.randn(2, tokens, 2, 8)

    torch._dynamo.reset()
    compiled = torch.compile(Layer(), fullgraph=True, dynamic=True, backend="aot_eager")
    tokens = torch.export.Dim("tokens", min=2, max=100_000)
    exported = torch.export.export(Layer(), (inputs(50),), dynamic_shapes={"x": {1: tokens}}).module()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (50, 2, 130, 300, 1000):
            x = inputs(length)
            right = Layer()(x)
            assert torch.equal(compiled(x), right)
            assert torch.equal(exported(x), right)
            (gradient,) = torch.autograd.grad(right.sum(), hyperplanes)
            assert torch.equal(torch.autograd.grad(compiled(x).sum(), hyperplanes)[0], gradient)
