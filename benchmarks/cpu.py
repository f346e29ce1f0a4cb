"""Speed of the CPU backend: against the floor, the reference, torch's attention, linear attention in plain torch.

    python -m benchmarks.cpu                          # all of it, into benchmarks/results/
    python -m benchmarks.cpu --only table --tokens 16384 --into /tmp
    python -m benchmarks.cpu --only table --rows "cpu float32 causal forward$"    # these into the file there is
    python -m benchmarks.cpu --plot benchmarks/results/cpu-NAME-lengths.json

The floor is the time to copy the bytes that any implementation must read and write once (forward: q, k, v, out;
forward and backward: 11 such tensors) at the bandwidth of a large copy measured just before. Every figure is
recorded as median and quantiles, with the machine, instruction set, versions and date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cpu_memory
from experiments.report import commit
from race_attention import race_attention, sample_hyperplanes
from race_attention._version import __version__
from race_attention.backends import cpu

RESULTS = Path(__file__).parent / "results"
HEADS, DIM = 4, 128
CONFIGURATIONS = ((2, 2), (3, 3), (4, 4))  # (P, L)
LENGTHS = [2**n for n in range(7, 23)]
PASSES = ("forward", "forward+backward")
MEMORY = "peak memory of forward+backward"


def others() -> float:
    """Seconds that the cores have worked so far for anybody but this process."""
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=9)[1:9]
    except OSError:
        return 0.0
    user, nice, system, _, _, *rest = (int(word) for word in words)
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - time.process_time()


def measure(call: Callable[[], Any], seconds: float = 1.5, least: int = 5, most: int = 200) -> dict[str, float]:
    """Median and quantiles of the seconds a call takes, after one that is not counted.

    Nor are those beside which other processes took more than a tenth of a core, unless there are no others.
    """
    begin = time.perf_counter()
    call()
    once = time.perf_counter() - begin
    if once > 1.0:
        least = min(least, 1 if once > 2.0 else 2)
    times: list[float] = []
    disturbed: list[float] = []
    begin = time.perf_counter()
    while (gone := time.perf_counter() - begin) < seconds or (len(times) < least and gone < 5 * max(seconds, once)):
        if len(times) >= most:
            break
        noise, start = others(), time.perf_counter()
        call()
        took = time.perf_counter() - start
        loud = others() - noise > 0.1 * took + 0.011  # the system counts in hundredths
        (disturbed if loud else times).append(took)
    kept = torch.tensor(times or disturbed, dtype=torch.float64)
    at = kept.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    counts = {"runs": len(times), "disturbed runs": len(disturbed)}
    return {"median": at[1], "q10": at[0], "q90": at[2], **counts}


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
        "instruction set": cpu.instruction_set(),
        "threads": torch.get_num_threads(),
        "shape": f"B = 1, H = G = {HEADS} unless said, D = Dv = {DIM}",
        "copy GB/s": bandwidth() / 1e9,
        "float32 matrix product GFLOP/s": gemm() / 1e9,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "race_attention": __version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def in_ms(times: dict[str, float]) -> dict[str, float]:
    return {name if "runs" in name else f"{name} ms": x if "runs" in name else x * 1e3 for name, x in times.items()}


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
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int = 128) -> Tensor:
    """Causal linear attention with elu + 1 features, normalised, in chunks of plain torch; T a multiple of a chunk."""
    chunk = min(chunk, q.shape[1])
    q, k, v = (x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4) for x in (F.elu(q) + 1, F.elu(k) + 1, v))
    v = F.pad(v, (0, 1), value=1.0)  # [B, H, N, C, Dv + 1]
    states = k.transpose(-1, -2) @ v
    before = F.pad(states.cumsum(2)[:, :, :-1], (0, 0, 0, 0, 1, 0))
    out = q @ before + (q @ k.transpose(-1, -2)).tril() @ v
    return (out[..., :-1] / out[..., -1:]).permute(0, 2, 3, 1, 4).flatten(1, 2)


def tokens_of(tokens: int, heads: int, dtype: torch.dtype) -> Tensor:
    """Random tokens; beyond 65,536 they repeat, since drawing millions takes longer than what is measured."""
    drawn = torch.randn(1, min(tokens, 65536), heads, DIM).to(dtype)
    return drawn.repeat(1, -(-tokens // 65536), 1, 1)[:, :tokens]


def timed(
    attention: Callable[..., Tensor], tokens: int, heads: int, dtype: torch.dtype, backward: bool, seconds: float
) -> dict[str, float]:
    """Times of an attention on random inputs."""
    q, k, v, grad = (tokens_of(tokens, heads, dtype) for _ in range(4))
    if not backward:
        return measure(lambda: attention(q, k, v), seconds)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    return measure(lambda: torch.autograd.grad(attention(*inputs), inputs, grad), seconds)


# ---- what is measured ---------------------------------------------------------------------------------------------


def said(row: dict[str, Any]) -> str:
    """What `--rows` is matched against, as in "cpu float32 causal forward" or "65536 forward+backward"."""
    words = [row.get("tokens"), row.get("name"), row.get("dtype")]
    if "causal" in row:
        words.append("causal" if row["causal"] else "full")
    return " ".join(str(word) for word in [*words, row["pass"]] if word is not None)


def table(tokens: int, rate: float, seconds: float, peers: bool, wanted: str) -> Iterator[dict[str, Any]]:
    """Every implementation at one length, forward and forward + backward; rows whose description matches."""
    for row, attention in implementations(peers):
        if not re.search(wanted, said(row)):
            continue
        backward, dtype = row["pass"] == PASSES[True], getattr(torch, row["dtype"])
        times = timed(attention, tokens, HEADS, dtype, backward, seconds)
        least = floor(tokens, HEADS, dtype, backward, rate)
        row |= {"times the floor": times["median"] / least, **in_ms(times), "floor ms": least * 1e3}
        yield row
    for planes, tables in CONFIGURATIONS:
        for dtype in ("float32", "bfloat16"):
            row = {"name": "cpu", "dtype": dtype, "pass": MEMORY, "causal": True, "P": planes, "L": tables}
            if re.search(wanted, said(row)):
                yield row | cpu_memory.measured_apart(planes, tables, tokens, dtype)


def implementations(peers: bool) -> Iterator[tuple[dict[str, Any], Callable[..., Tensor]]]:
    """The rows of the table, yet without times, and what is to be timed."""
    for backward in (False, True):
        kinds = [("cpu", dtype, True) for dtype in ("float32", "bfloat16")] + [("cpu", "float32", False)]
        kinds += [("reference", "float32", True)] if peers else []
        for name, dtype, causal in kinds:
            for planes, tables in CONFIGURATIONS:
                row = {"name": name, "dtype": dtype, "pass": PASSES[backward], "causal": causal}
                yield row | {"P": planes, "L": tables}, race(name, planes, tables, HEADS, causal)
        if peers:
            row = {"name": "linear attention (torch)", "dtype": "float32", "pass": PASSES[backward], "causal": True}
            yield row, linear_attention


def crossover(seconds: float, wanted: str) -> Iterator[dict[str, Any]]:
    """Against torch's exact attention, where a short sequence is the other's ground."""
    for tokens in (64, 128, 256, 512, 1024, 2048):
        for backward in (False, True):
            row: dict[str, Any] = {"tokens": tokens, "pass": PASSES[backward]}
            if not re.search(wanted, said(row)):
                continue
            exact = timed(softmax_attention, tokens, HEADS, torch.float32, backward, seconds)
            ours = {
                f"({p},{n})": timed(race("cpu", p, n, HEADS, True), tokens, HEADS, torch.float32, backward, seconds)
                for p, n in CONFIGURATIONS
            }
            row["softmax ms"] = exact["median"] * 1e3
            row |= {f"{name} ms": times["median"] * 1e3 for name, times in ours.items()}
            row |= {f"{name} times faster": exact["median"] / times["median"] for name, times in ours.items()}
            yield row


def lengths(longest: int, rate: float, seconds: float, wanted: str) -> Iterator[dict[str, Any]]:
    """Time against length, bfloat16, one head, so that the longest fits in 16 GB."""
    for tokens in (n for n in LENGTHS if n <= longest):
        for backward in (False, True):
            row: dict[str, Any] = {"tokens": tokens, "pass": PASSES[backward]}
            if not re.search(wanted, said(row)):
                continue
            row["floor ms"] = floor(tokens, 1, torch.bfloat16, backward, rate) * 1e3
            for planes, tables in CONFIGURATIONS:
                attention = race("cpu", planes, tables, 1, True)
                times = timed(attention, tokens, 1, torch.bfloat16, backward, seconds)
                row[f"({planes},{tables}) ms"] = times["median"] * 1e3
                row[f"({planes},{tables}) ns a token"] = times["median"] / tokens * 1e9
            yield row


def plot(path: Path) -> Path:
    """Draws the lengths of a result file beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads(path.read_text(encoding="utf-8"))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axis, name in zip(axes, PASSES, strict=True):
        rows = [row for row in result["rows"] if row["pass"] == name]
        for planes, tables in CONFIGURATIONS:
            times = [row[f"({planes},{tables}) ms"] / 1e3 for row in rows]
            axis.plot([row["tokens"] for row in rows], times, marker="o", ms=3, label=f"P={planes}, L={tables}")
        axis.plot([row["tokens"] for row in rows], [row["floor ms"] / 1e3 for row in rows], "k--", label="floor (copy)")
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend()
    about = result["context"]
    figure.suptitle(
        f"causal RACE attention, bfloat16, one head, D = Dv = {DIM}: {about['processor']}, "
        f"{about['instruction set']}, {about['threads']} threads, {about['date']}",
        fontsize=9,
    )
    figure.tight_layout()
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    return target


def _same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(row.get(key) == other.get(key) for key in ("name", "dtype", "pass", "causal", "P", "L", "tokens"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="of the table")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="of the lengths")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="at least, for each figure")
    parser.add_argument("--only", nargs="*", choices=("table", "crossover", "lengths"), default=None)
    parser.add_argument("--rows", default="", help="only rows that match: 'cpu float32 causal forward$', '^65536 '")
    parser.add_argument("--without-peers", action="store_true", help="leaves the slow ones out of the table")
    parser.add_argument("--into", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=None, help="only draws a result file of lengths")
    options = parser.parse_args()
    if options.plot is not None:
        print(plot(options.plot))
        return
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    parts: dict[str, tuple[str, Callable[[float], Iterable[dict[str, Any]]]]] = {
        "table": (
            f"CPU, T = {options.tokens}",
            lambda rate: table(options.tokens, rate, options.seconds, not options.without_peers, options.rows),
        ),
        "crossover": (
            "CPU, against torch's scaled_dot_product_attention (causal, float32)",
            lambda _: crossover(min(options.seconds, 0.3), options.rows),
        ),
        "lengths": (
            "CPU, time against length (causal, bfloat16, one head)",
            lambda rate: lengths(options.longest, rate, min(options.seconds, 0.5), options.rows),
        ),
    }
    for name in options.only or parts:
        title, run = parts[name]
        about = machine()
        print(about)
        path = options.into / f"cpu-{about['instruction set']}-{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        if options.rows and path.exists():
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        for row in run(about["copy GB/s"] * 1e9):  # written as it grows; a row takes the place of its like
            print({name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in row.items()}, flush=True)
            row["commit"] = about["commit"]
            rows = [*(other for other in rows if not _same(row, other)), row]
            result = {"title": title, "context": about, "rows": rows}
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
