"""Uses the installed wheel where nothing but torch is installed; run by .ci/clean-wheel.

The arguments are the backends that must serve on this machine; what the others say is printed.
"""

import importlib.util
import sys
import time

start = time.perf_counter()
import torch  # noqa: E402

torch_seconds = time.perf_counter() - start
import race_attention  # noqa: E402
from race_attention import backends  # noqa: E402
from race_attention.testing import assert_within_budget, oracle  # noqa: E402

print(f"race_attention {race_attention.__version__}, torch {torch.__version__}")
print(f"import: torch {torch_seconds:.2f} s, race_attention {time.perf_counter() - start - torch_seconds:.2f} s more")
for name in ("numpy", "safetensors", "triton", "typer", "rich"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed: this environment is not clean"

torch.manual_seed(0)
hyperplanes = race_attention.sample_hyperplanes(2, 2, 2, 16)
inputs = [torch.randn(1, 33, 2, 16, requires_grad=True) for _ in range(3)]
grad_out = torch.randn(1, 33, 2, 16)


def results(attention, **options):
    """The output and the gradients of queries, keys and values."""
    out = attention(*inputs, hyperplanes, 4.0, causal=True, **options)
    return out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(out.dtype))


expected = results(oracle)
for name in backends.NAMES:
    try:
        found = results(race_attention.race_attention, backend=name)
    except ValueError as reason:
        if name in sys.argv[1:]:
            raise
        print(reason)
        continue
    for part, got, wanted in zip(("forward", *["backward"] * 3), found, expected, strict=True):
        assert_within_budget(got, wanted, torch.float32, part)
    print(f"backend {name!r}: ran forward and backward, within the error budget")
