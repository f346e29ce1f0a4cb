"""Speed of the Triton backend on one GPU: the table of targets, lengths, peers, decode, memory.

    python -m benchmarks.gpu                                   # everything, into benchmarks/results/
    python -m benchmarks.gpu --only table decode --output /tmp/x.json
    python -m benchmarks.gpu --plot benchmarks/results/gpu-NAME.json

The floor is the time to copy the bytes that any implementation must read and write once (forward: q, k, v, out;
forward and backward: 11 such tensors) at the bandwidth of a large device copy measured in the same run. Times are
medians of CUDA events after warm-up. Peers are torch's scaled_dot_product_attention with its flash and cuDNN
backends; flash-linear-attention where it is installed. All bfloat16, D = Dv = 128 unless a row says otherwise.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import multiprocessing
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from race_attention.backends.triton.decode import decode_
from race_attention.backends.triton.ops import triton_forward

RESULTS = Path(__file__).parent / "results"
HEADS, DIM, MILLION = 4, 128, 1 << 20
CONFIGURATIONS = ((2, 2), (3, 3), (4, 4))  # (P, L)
Step = Callable[[], Any]


def measure(step: Step, repeats: int = 7, warm: int = 2) -> float:
    """Median milliseconds."""
    for _ in range(warm):
        step()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def graphed(step: Step) -> float:
    """Median milliseconds of a captured graph's replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replays() -> None:
        for _ in range(20):
            graph.replay()

    return measure(replays, 15) / 20


def bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.numel() * 2 / measure(lambda: target.copy_(source)) * 1e3


def tokens_of(tokens: int, heads: int, grad: bool, batch: int = 1) -> Tensor:
    x = torch.randn(batch, tokens, heads, DIM, dtype=torch.bfloat16, device="cuda")
    return x.requires_grad_(grad)


class Race:
    """A call of the operator at (P, L), forward alone or with its backward pass; beta learns, hyperplanes do not."""

    def __init__(
        self, planes: int, tables: int, tokens: int, causal: bool, backward: bool, heads: int = HEADS,
        decay: bool = False,
    ) -> None:  # fmt: skip
        self.inputs = [tokens_of(tokens, heads, backward) for _ in range(3)]
        self.planes = torch.randn(heads, tables, planes, DIM, device="cuda") * DIM**-0.5
        self.beta = torch.full((heads,), 4.0, device="cuda", requires_grad=backward)
        self.decay = -0.01 * torch.rand(1, tokens, heads, device="cuda") if decay else None
        if self.decay is not None and backward:
            self.decay.requires_grad_()
        self.causal, self.backward = causal, backward
        self.grad = torch.randn_like(self.inputs[2]) if backward else None

    def __call__(self) -> Any:
        nothing = (None, None, None, None, None)
        out = triton_forward(*self.inputs, self.planes, self.beta, self.decay, *nothing, self.causal)[0]
        if not self.backward:
            return out
        wanted = [*self.inputs, self.beta] + ([] if self.decay is None else [self.decay])
        return torch.autograd.grad(out, wanted, self.grad)


class Exact:
    """torch's exact attention with one of its backends."""

    def __init__(self, backend: SDPBackend, tokens: int, causal: bool, backward: bool, heads: int) -> None:
        self.inputs = [tokens_of(tokens, heads, backward).transpose(1, 2) for _ in range(3)]
        self.grad = torch.randn_like(self.inputs[2]) if backward else None
        self.backend, self.causal, self.backward = backend, causal, backward

    def __call__(self) -> Any:
        with sdpa_kernel(self.backend):
            query, key, value = self.inputs
            out = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return torch.autograd.grad(out, self.inputs, self.grad) if self.backward else out


def freed() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _compile(job: tuple[Any, ...]) -> None:
    """In a process of its own: fills Triton's cache on disk."""
    planes, tables, causal, backward, decay = job
    Race(planes, tables, 4096, causal, backward, decay=decay)()
    torch.cuda.synchronize()


def compile_all() -> None:
    jobs = [(p, t, causal, True, False) for p, t in CONFIGURATIONS for causal in (True, False)]
    jobs += [(p, t, True, True, True) for p, t in CONFIGURATIONS]
    jobs += [(6, 2, True, False, False), (8, 1, True, False, False)]
    with multiprocessing.get_context("spawn").Pool(len(jobs)) as pool:
        pool.map(_compile, jobs, chunksize=1)


def table(report: Callable[..., None]) -> None:
    """The rows of the targets at 1,048,576 tokens."""
    for planes, tables in CONFIGURATIONS:
        for causal in (True, False):
            for backward in (False, True):
                step: Step = Race(planes, tables, MILLION, causal, backward)
                report("table", P=planes, L=tables, causal=causal, backward=backward, tokens=MILLION, ms=measure(step))
                del step
                freed()
        for backward in (False, True):
            step = Race(planes, tables, MILLION, True, backward, decay=True)
            report(
                "table", P=planes, L=tables, causal=True, backward=backward, tokens=MILLION, decay=True,
                ms=measure(step),
            )  # fmt: skip
            del step
            freed()
    for planes, tables in ((6, 2), (8, 1)):
        step = Race(planes, tables, MILLION, True, False)
        report("table", P=planes, L=tables, causal=True, backward=False, tokens=MILLION, ms=measure(step, 3))
        del step
        freed()


def lengths(report: Callable[..., None]) -> None:
    """From 1K tokens on, against exact attention; short ones also as captured graphs."""
    for heads, longest, exact_longest in ((4, 1 << 24, 1 << 16), (64, 1 << 20, 1 << 14)):
        for power in range(10, 25):
            tokens = 1 << power
            if tokens > longest:
                break
            for planes, tables in ((2, 2), (4, 4)):
                step: Step = Race(planes, tables, tokens, True, True, heads=heads)
                own: dict[str, Any] = {
                    "P": planes,
                    "L": tables,
                    "heads": heads,
                    "tokens": tokens,
                    "causal": True,
                    "backward": True,
                }
                report("lengths", **own, ms=measure(step, 3 if power > 20 else 7))
                if power < 16:
                    report("lengths", **own, graph=True, ms=graphed(step))
                del step
                freed()
            if tokens > exact_longest:
                continue
            for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
                for causal in (True, False):
                    step = Exact(backend, tokens, causal, True, heads)
                    own = {"heads": heads, "tokens": tokens, "causal": causal, "backward": True, "peer": name}
                    report("lengths", **own, ms=measure(step, 5))
                    del step
                    freed()


def twelve(report: Callable[..., None]) -> None:
    """12,000,000 tokens forward and backward, resident, and the longest that fits."""
    for tokens in (12_000_000, 16_000_000):
        for planes, tables in ((2, 2), (4, 4)):
            freed()
            torch.cuda.reset_peak_memory_stats()
            try:
                step: Step = Race(planes, tables, tokens, True, True)
                ms = measure(step, 3, 1)
            except torch.OutOfMemoryError:
                report("resident", P=planes, L=tables, tokens=tokens, causal=True, backward=True, ms=None)
                continue
            peak = torch.cuda.max_memory_allocated() / 2**30
            report("resident", P=planes, L=tables, tokens=tokens, causal=True, backward=True, ms=ms, peak_gib=peak)
            del step
    freed()


def decode(report: Callable[..., None]) -> None:
    """One token, one layer, captured."""
    for batch in (1, 64):
        for planes, tables in CONFIGURATIONS:
            q, k, v = (torch.randn(batch, HEADS, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(3))
            hyperplanes = torch.randn(HEADS, tables, planes, DIM, device="cuda") * DIM**-0.5
            beta = torch.full((HEADS,), 4.0, device="cuda")
            for dtype in (torch.float64, torch.float32):
                mass = torch.ones(batch, HEADS, tables, 1 << planes, dtype=dtype, device="cuda")
                value_sum = torch.zeros(*mass.shape, DIM, dtype=dtype, device="cuda")

                def step(given: Any = (q, k, v, hyperplanes, beta, None, mass, value_sum)) -> Tensor:
                    return decode_(*given)

                report("decode", P=planes, L=tables, batch=batch, state=str(dtype), ms=graphed(step))


def repeats(report: Callable[..., None]) -> None:
    """Whether repeats are equal to the bit."""
    for planes, tables in CONFIGURATIONS:
        step = Race(planes, tables, 1 << 17, True, True, decay=True)
        first, second = step(), step()
        report("repeats", P=planes, L=tables, equal=all(torch.equal(a, b) for a, b in zip(first, second, strict=True)))


PARTS: dict[str, Callable[[Callable[..., None]], None]] = {
    "table": table,
    "decode": decode,
    "repeats": repeats,
    "twelve": twelve,
    "lengths": lengths,
}


def context() -> dict[str, Any]:
    """The machine, the versions and the date."""
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "driver": subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "flash_linear_attention": importlib.util.find_spec("fla") is not None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def floor_of(row: dict[str, Any], bytes_per_second: float) -> float | None:
    """Milliseconds to move what a row must move."""
    if "tokens" not in row:
        return None
    tensors = 11 if row.get("backward") else 4
    return tensors * row["tokens"] * row.get("heads", HEADS) * DIM * 2 / bytes_per_second * 1e3


def plot(path: Path) -> None:
    """Time against length with the floor, and the fraction of the copy bandwidth against S."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = json.loads(path.read_text(encoding="utf-8"))
    rows = found["rows"]
    figure, axes = plt.subplots(1, 3, figsize=(18, 5))
    for axis, heads in zip(axes, (4, 64), strict=False):
        series: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row["part"] != "lengths" or row["heads"] != heads or not row["causal"] or row["ms"] is None:
                continue
            name = row.get("peer") or f"RACE ({row['P']},{row['L']})" + (", graph" if row.get("graph") else "")
            series.setdefault(name, []).append((row["tokens"], row["ms"]))
            if name == "RACE (2,2)":
                series.setdefault("floor", []).append((row["tokens"], row["floor_ms"]))
        for name, points in series.items():
            axis.loglog(*zip(*points, strict=True), "k--" if name == "floor" else "o-", label=name, markersize=3)
        axis.set(title=f"forward and backward, causal, B·H = {heads}", xlabel="tokens", ylabel="ms")
        axis.legend()
    for causal in (True, False):
        for backward in (False, True):
            points = sorted(
                (row["L"] << row["P"], row["floor_ms"] / row["ms"])
                for row in rows
                if row["part"] == "table" and (row["causal"], row["backward"]) == (causal, backward)
                and not row.get("decay")
            )  # fmt: skip
            label = ("causal" if causal else "full") + (", forward and backward" if backward else ", forward")
            axes[2].semilogx(*zip(*points, strict=True), "o-", base=2, label=label)
    axes[2].set(title="fraction of the copy's bandwidth, 1M tokens", xlabel="buckets S", ylim=(0, 1))
    axes[2].legend()
    machine = found["context"]
    figure.suptitle(f"{machine['gpu']}, bfloat16, D = 128, torch {machine['torch']}, {machine['date'][:10]}")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    given = parser.parse_args()
    if given.plot:
        plot(given.plot)
        return
    torch.manual_seed(0)
    compile_all()
    machine, speed = context(), bandwidth()
    freed()
    rows: list[dict[str, Any]] = []
    name = machine["gpu"].lower().replace(" ", "-")
    output = given.output or RESULTS / f"gpu-{name}-{machine['date'][:10]}.json"
    output.parent.mkdir(parents=True, exist_ok=True)

    def report(part: str, **row: Any) -> None:
        floor = floor_of(row, speed)
        rows.append({"part": part, **row} | ({} if floor is None else {"floor_ms": floor}))
        ratio = f"  {row['ms'] / floor:.2f} x floor" if floor and row.get("ms") else ""
        print(part, row, ratio, flush=True)
        found = {"context": machine, "copy_bytes_per_second": speed, "rows": rows}
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    for part in given.only:
        PARTS[part](report)


if __name__ == "__main__":
    main()
