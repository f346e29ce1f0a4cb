"""The package imports with torch alone, and quickly; what is optional is imported when it is used."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import race_attention

SOURCE = str(Path(race_attention.__file__).parents[1])

#: Blocks every top-level module except the standard library, torch and what importing torch alone brings in.
BLOCKER = """
    import sys
    sys.path.insert(0, {source!r})
    import torch
    allowed = set(sys.stdlib_module_names) | {{name.partition(".")[0] for name in sys.modules}} | {{"race_attention"}}
    allowed |= {{"torch", "numpy", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "filelock", "fsspec"}}
    allowed -= {{"triton", "safetensors", "typer", "rich", "matplotlib", "transformers"}}
    for name in ("triton", "safetensors"):
        assert name not in sys.modules or name == "triton", name
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] not in allowed:
                raise ImportError("blocked: " + name)
    sys.meta_path.insert(0, Block())
"""


def fresh(code: str, *, blocked: bool = True, numpy: bool = True) -> str:
    """What the code prints in a fresh process."""
    start = textwrap.dedent(BLOCKER).format(source=SOURCE) if blocked else f"import sys; sys.path.insert(0, {SOURCE!r})"
    if not numpy:
        start = "import sys; sys.modules['numpy'] = None\n" + start
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", start + "\n" + textwrap.dedent(code)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_but_torch_blocked():
    out = fresh(
        """
        import race_attention
        from race_attention import RaceAttention, RaceState, race_attention as core, sample_hyperplanes
        from race_attention import scaled_dot_product_race
        x = torch.randn(1, 9, 2, 8, requires_grad=True)
        planes = sample_hyperplanes(2, 2, 2, 8)
        out, state = core(x, x, x, planes, 1.5, causal=True, return_state=True, backend="reference")
        (out.sum() + state.value_sum.sum()).backward()
        layer = RaceAttention(16, 2, causal=True, conv_size=3, decay="per_token", norm_gate=True, rope=1e4)
        layer(torch.randn(2, 5, 16)).sum().backward()
        print("fine", sorted(set(race_attention.__all__)))
        """
    )
    assert out.startswith("fine")
    for name in ("RaceAttention", "RaceState", "race_attention", "sample_hyperplanes", "scaled_dot_product_race"):
        assert f"'{name}'" in out


def test_testing_needs_torch_alone():
    out = fresh(
        """
        from race_attention.testing import make_inputs, oracle
        print(tuple(oracle(**make_inputs(tokens=3)).shape))
        """
    )
    assert out.strip() == "(2, 3, 2, 8)"


def test_nothing_optional_is_imported_before_it_is_used():
    out = fresh(
        """
        import torch
        before = set(sys.modules)
        import race_attention
        new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
        backends = sorted(name for name in sys.modules if name.startswith("race_attention.backends."))
        print(sorted(new), backends)
        """,
        blocked=False,
    )
    assert out.strip() == "['race_attention'] ['race_attention.backends.call']"


def test_import_is_quick():
    """Beside torch, importing takes less than half a second; the best of three, since the machine may be busy."""
    took = []
    for _ in range(3):
        out = fresh(
            """
            import time
            import torch
            begin = time.perf_counter()
            import race_attention
            print(time.perf_counter() - begin)
            """,
            blocked=False,
        )
        took.append(float(out))
        if took[-1] < 0.5:
            return
    pytest.fail(f"importing race_attention took {took} seconds beside torch, allowed is 0.5")


def test_import_leaves_torch_as_it_was():
    out = fresh(
        """
        import torch
        def settings():
            return (
                torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                torch.are_deterministic_algorithms_enabled(), torch.random.get_rng_state().sum().item(),
            )
        before = settings()
        import race_attention
        print(settings() == before)
        """,
        blocked=False,
    )
    assert out.strip() == "True"
