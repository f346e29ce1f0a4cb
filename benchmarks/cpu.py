"""Speed of the CPU backend: against the floor, the reference, torch's attention, linear attention in plain torch.

    python -m benchmarks.cpu                          # the table and the lengths, into benchmarks/results/
    python -m benchmarks.cpu --only table --tokens 16384 --output /tmp/x.json
    python -m benchmarks.cpu --plot benchmarks/results/cpu-NAME.json

The floor is the time to copy the bytes that any implementation must read and write once (forward: q, k, v, out;
forward and backward: 11 such tensors) at the bandwidth of a large copy measured just before. Every figure is
recorded as median and quantiles, with the machine, instruction set, versions and date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from race_attention import race_attention, sample_hyperplanes
from race_attention._version import __version__
from race_attention.backends import cpu

RESULTS = Path(__file__).parent / "results"
HEADS, DIM = 4, 128
CONFIGURATIONS = ((2, 2), (3, 3), (4, 4))  # (P, L)
LENGTHS = [2**n for n in range(7, 23)]


def measure(call: Callable[[], Any], seconds: float = 1.5, least: int = 5, most: int = 200) -> dict[str, float]:
    """Median and quantiles of the seconds a call takes, after one that is not counted."""
    call()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < least or (time.perf_counter() - begin < seconds and len(times) < most):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    at = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return {"median": at[1], "q10": at[0], "q90": at[2], "runs": len(times)}


def bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    source, target = torch.ones(2**26), torch.empty(2**26)
    return 2 * source.numel() * 4 / measure(lambda: target.copy_(source), 1.0)["median"]


def gemm() -> float:
    """Floating-point operations a second of torch's float32 matrix product."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / measure(lambda: a @ a, 1.0)["median"]


def machine() -> dict[str, Any]:
    """What a result needs to be understood later."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return {
        "processor": found.group(1) if found else platform.processor(),
        "instruction_set": cpu.instruction_set(),
        "threads": torch.get_num_threads(),
        "copy_bytes_per_second": bandwidth(),
        "gemm_flops_per_second": gemm(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "race_attention": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def floor(tokens: int, heads: int, dtype: torch.dtype, backward: bool, rate: float) -> float:
    """Seconds to move what must be moved."""
    return (11 if backward else 4) * tokens * heads * DIM * dtype.itemsize / rate


# ---- implementations --------------------------------------------------------------------------------------------


def race(backend: str, planes: int, tables: int, heads: int, causal: bool) -> Callable[..., Tensor]:
    hyperplanes = sample_hyperplanes(heads, tables, planes, DIM)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = race_attention(q, k, v, hyperplanes, 1.0, scale=DIM**-0.5, causal=causal, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return call


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention, causal."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int = 128) -> Tensor:
    """Causal linear attention with elu + 1 features, normalised, in chunks of plain torch; T a multiple of a chunk."""
    chunk = min(chunk, q.shape[1])
    q, k, v = (x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4) for x in (F.elu(q) + 1, F.elu(k) + 1, v))
    v = F.pad(v, (0, 1), value=1.0)  # [B, H, N, C, Dv + 1]
    states = k.transpose(-1, -2) @ v
    before = F.pad(states.cumsum(2)[:, :, :-1], (0, 0, 0, 0, 1, 0))
    out = q @ before + (q @ k.transpose(-1, -2)).tril() @ v
    return (out[..., :-1] / out[..., -1:]).permute(0, 2, 3, 1, 4).flatten(1, 2)


def timed(
    attention: Callable[..., Tensor], tokens: int, heads: int, dtype: torch.dtype, backward: bool, seconds: float
) -> dict[str, float]:
    """Times of an attention on random inputs."""
    q, k, v, grad = (torch.randn(1, tokens, heads, DIM).to(dtype) for _ in range(4))
    if not backward:
        return measure(lambda: attention(q, k, v), seconds)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    return measure(lambda: torch.autograd.grad(attention(*inputs), inputs, grad), seconds)


# ---- what is measured ---------------------------------------------------------------------------------------------


def table(tokens: int, rate: float, seconds: float) -> list[dict[str, Any]]:
    """Every implementation at one length, forward and forward + backward."""
    rows: list[dict[str, Any]] = []

    def add(name: str, attention: Callable[..., Tensor], dtype: torch.dtype, backward: bool, **more: Any) -> None:
        times = timed(attention, tokens, HEADS, dtype, backward, seconds)
        least = floor(tokens, HEADS, dtype, backward, rate)
        rows.append(
            {
                "name": name,
                "dtype": str(dtype)[6:],
                "pass": "forward+backward" if backward else "forward",
                "tokens": tokens,
                **more,
                **times,
                "floor": least,
                "times_floor": times["median"] / least,
            }
        )
        print("  ".join(f"{key}={x:.4g}" if isinstance(x, float) else f"{key}={x}" for key, x in rows[-1].items()))

    for backward in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            for planes, tables in CONFIGURATIONS:
                more = {"planes": planes, "tables": tables}
                add("cpu", race("cpu", planes, tables, HEADS, True), dtype, backward, causal=True, **more)
        for planes, tables in CONFIGURATIONS:
            more = {"planes": planes, "tables": tables}
            add("cpu", race("cpu", planes, tables, HEADS, False), torch.float32, backward, causal=False, **more)
            add(
                "reference",
                race("reference", planes, tables, HEADS, True),
                torch.float32,
                backward,
                causal=True,
                **more,
            )
        add("linear attention (torch)", linear_attention, torch.float32, backward, causal=True)
    return rows


def crossover(seconds: float) -> list[dict[str, Any]]:
    """Against torch's exact attention, where a short sequence is the other's ground."""
    rows = []
    for tokens in (64, 128, 256, 512, 1024, 2048):
        for backward in (False, True):
            exact = timed(softmax_attention, tokens, HEADS, torch.float32, backward, seconds)
            ours = {
                f"({p},{n})": timed(race("cpu", p, n, HEADS, True), tokens, HEADS, torch.float32, backward, seconds)
                for p, n in CONFIGURATIONS
            }
            rows.append(
                {"tokens": tokens, "pass": "forward+backward" if backward else "forward", "sdpa": exact, "cpu": ours}
            )
            ratios = {name: round(exact["median"] / times["median"], 2) for name, times in ours.items()}
            print(f"T={tokens} {rows[-1]['pass']}: sdpa {exact['median'] * 1e3:.3f} ms, times faster: {ratios}")
    return rows


def lengths(longest: int, rate: float, seconds: float) -> list[dict[str, Any]]:
    """Time against length, bfloat16, one head, so that the longest fits in 16 GB."""
    rows = []
    for tokens in (n for n in LENGTHS if n <= longest):
        for backward in (False, True):
            for planes, tables in CONFIGURATIONS:
                times = timed(race("cpu", planes, tables, 1, True), tokens, 1, torch.bfloat16, backward, seconds)
                least = floor(tokens, 1, torch.bfloat16, backward, rate)
                row = {"tokens": tokens, "backward": backward, "planes": planes, "tables": tables, **times}
                rows.append({**row, "floor": least})
        print(f"T={tokens}: {[round(r['median'] / tokens * 1e9) for r in rows[-6:]]} ns a token")
    return rows


def plot(path: Path) -> Path:
    """Draws the lengths of a result file beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads(path.read_text(encoding="utf-8"))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axis, backward in zip(axes, (False, True), strict=True):
        rows = [r for r in result["lengths"] if r["backward"] == backward]
        for planes, tables in CONFIGURATIONS:
            mine = [r for r in rows if (r["planes"], r["tables"]) == (planes, tables)]
            axis.plot(
                [r["tokens"] for r in mine],
                [r["median"] for r in mine],
                marker="o",
                ms=3,
                label=f"P={planes}, L={tables}",
            )
        mine = [r for r in rows if r["planes"] == 2]
        axis.plot([r["tokens"] for r in mine], [r["floor"] for r in mine], "k--", label="floor (copy)")
        axis.set(xscale="log", yscale="log", xlabel="tokens", title="forward + backward" if backward else "forward")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend()
    about = result["machine"]
    figure.suptitle(
        f"causal RACE attention, bfloat16, one head, D = Dv = {DIM}: {about['processor']}, "
        f"{about['instruction_set']}, {about['threads']} threads, {about['date']}",
        fontsize=9,
    )
    figure.tight_layout()
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="of the table")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="of the lengths")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="at least, for each figure")
    parser.add_argument("--only", nargs="*", choices=("table", "crossover", "lengths"), default=None)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None, help="only draws a result file")
    options = parser.parse_args()
    if options.plot is not None:
        print(plot(options.plot))
        return
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result: dict[str, Any] = {"machine": machine(), "shape": {"batch": 1, "heads": HEADS, "dim": DIM, "value_dim": DIM}}
    print(result["machine"])
    output = options.output or RESULTS / f"cpu-{result['machine']['instruction_set']}.json"
    if output.exists():  # parts measured at other times stay, with the machine of their own time
        result = {**json.loads(output.read_text(encoding="utf-8")), **result}
    rate = result["machine"]["copy_bytes_per_second"]
    wanted = options.only or ("table", "crossover", "lengths")
    if "table" in wanted:
        result["table"] = table(options.tokens, rate, options.seconds)
    if "crossover" in wanted:
        result["crossover"] = crossover(min(options.seconds, 0.3))
    if "lengths" in wanted:
        result["lengths"] = lengths(options.longest, rate, min(options.seconds, 0.5))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
