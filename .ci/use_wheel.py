"""Uses the installed wheel where nothing but torch is installed; run by .ci/clean-wheel."""

import importlib.util
import sys
import time

start = time.perf_counter()
import torch  # noqa: E402

torch_seconds = time.perf_counter() - start
import race_attention  # noqa: E402
from race_attention._version import __version__  # noqa: E402
from race_attention.backends import MODULES, load  # noqa: E402

print(f"race_attention {__version__}, torch {torch.__version__}")
print(f"import: torch {torch_seconds:.2f} s, race_attention {time.perf_counter() - start - torch_seconds:.2f} s more")
for name in ("numpy", "safetensors", "triton", "typer", "rich"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed: this environment is not clean"

hyperplanes = race_attention.sample_hyperplanes(2, 2, 2, 16)
inputs = [torch.randn(1, 33, 2, 16, requires_grad=True) for _ in range(3)]
results = {}
for name in MODULES:
    module = load(name) if name != "triton" else None  # needs a GPU and the package triton
    if module is None:
        continue
    try:
        out = race_attention.race_attention(*inputs, hyperplanes, 4.0, causal=True, backend=name)
    except (ValueError, RuntimeError, NotImplementedError) as reason:
        print(f"backend {name}: not here ({reason})")
        if name == "reference" or "--require-compiled" in sys.argv:
            raise
        continue
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    results[name] = (out.detach(), *gradients)
    print(f"backend {name}: ran forward and backward")
for name, tensors in results.items():
    for got, wanted in zip(tensors, results["reference"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"backend {n}: {text}")
