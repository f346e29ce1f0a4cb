"""The demo's one picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.demo import Results


def plot(results: Results, path: Path) -> None:
    """Four panels: training, loss by position, what context brings, time of a layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 9), constrained_layout=True)
    _training(axes[0, 0], results)
    _positions(axes[0, 1], results)
    _context(axes[1, 0], results)
    _times(axes[1, 1], results)
    context, seconds = results.config["train"]["context"], results.training["seconds"]
    figure.suptitle(
        f"RACE attention, {results.parameters:,} parameters, a context of {context:,} bytes in one piece, "
        f"{seconds:.0f} s of training\n{results.machine.get('gpu') or results.machine['cpu']}, "
        f"torch {results.machine['torch']}, {results.machine['date'][:10]}",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _training(axis: Any, results: Results) -> None:
    trained = [r for r in results.curve if "bits" in r]
    held_out = [r for r in results.curve if "valid_bits" in r]
    seconds = {r["step"]: r["seconds"] for r in trained}
    axis.plot([r["seconds"] for r in trained], [r["bits"] for r in trained], color="tab:blue", lw=1, label="training")
    points = [seconds[r["step"]] for r in held_out]
    axis.plot(points, [r["valid_bits"] for r in held_out], "o-", color="tab:red", label="held out")
    for name, style in (("bigram", "--"), ("trigram", ":")):
        bits = getattr(results.ngrams, name)
        axis.axhline(bits, color="gray", ls=style, lw=1, label=f"{name} statistics {bits:.2f}")
    axis.set(title=f"Loss: held out {results.held_out:.3f} at the end", xlabel="seconds of training")
    axis.set(ylabel="bits a byte", ylim=(None, min(8.2, max(r["bits"] for r in trained) + 0.1)))
    axis.legend()


def _positions(axis: Any, results: Results) -> None:
    middles = [(max(b.start, b.end / 2) * b.end) ** 0.5 for b in results.positions]
    bits, errors = [b.bits for b in results.positions], [b.error for b in results.positions]
    axis.errorbar(middles, bits, yerr=errors, fmt="o-", color="tab:red", capsize=2)
    axis.set_xscale("log", base=2)
    axis.set(title="Held-out loss by position in the context", xlabel="position", ylabel="bits a byte")


def _context(axis: Any, results: Results) -> None:
    befores = list(results.context_gain)
    axis.plot(range(len(befores)), list(results.context_gain.values()), "o-", color="tab:purple")
    axis.set_xticks(range(len(befores)), [f"{b:,}" for b in befores])
    axis.set(title="Does context help? The same bytes, more before them")
    axis.set(xlabel="bytes of context before the measured ones", ylabel="bits a byte")


def _times(axis: Any, results: Results) -> None:
    race, softmax = results.race_seconds, results.softmax_seconds
    axis.loglog(list(race), list(race.values()), "o-", base=2, color="tab:blue", label="RACE")
    axis.loglog(list(softmax), list(softmax.values()), "s-", base=2, color="tab:orange", label="softmax (torch)")
    axis.set_yscale("log")
    stopped = [length for length in race if length not in softmax]
    if stopped:
        last = max(softmax)
        limit = results.config["limit"]
        axis.annotate(
            f"softmax stops here:\n{stopped[0]:,} tokens would take\nmore than {limit:g} s",
            (last, softmax[last]), xytext=(0.03, 0.74), textcoords="axes fraction",
            arrowprops={"arrowstyle": "->", "color": "tab:orange"}, color="tab:orange",
        )  # fmt: skip
    axis.set(title="One layer, forward and backward, batch 1", xlabel="tokens", ylabel="seconds")
    axis.legend(loc="lower right")
