"""Several runs in one process that take turns, so that small models fill a GPU.

The kernels of a small model leave most of a GPU idle, and processes that share one do not overlap: it serves one after
the other. Here each run has a stream of its own, and the host goes round and starts a step of each, which a recorded
graph makes one short call. What one run has compiled, the others of its method use.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from experiments.rows import RunConfig
from experiments.run import Run
from experiments.step import EAGER_STEPS

#: Steps that a run takes alone at first: it compiles, records, and shows how much memory it needs.
ALONE = EAGER_STEPS + 2

#: What came of a run: its result, or why there is none.
Outcome = dict[str, Any] | Exception


def draws(config: RunConfig) -> bool:
    """Whether training draws random numbers on the device, whose generator runs that take turns would share."""
    sampled = config.model.mixer == "yoso" and bool(config.model.mixer_options.get("hashes", 32))
    return config.model.dropout > 0 or sampled


class _Turn:
    """A run that takes turns.

    Args:
        make: the run, given whether it may use what an earlier one has compiled.
        together: how many runs share the process.
        keep_compiled: whether there is an earlier one.
        stop_at: when it saves a checkpoint and stops, as time.time() tells.
    """

    def __init__(self, make: Callable[[bool], Run], together: int, keep_compiled: bool, stop_at: float) -> None:
        self.outcome: Outcome | None = None
        self.steps: Generator[None, None, dict[str, Any]] | None = None
        self.stream: torch.cuda.Stream | None = None
        try:
            before = _memory(reset=True)
            run = make(keep_compiled)
            run.together = together
            if run.device.type == "cuda":
                torch.cuda.synchronize()  # what was made lies on another stream
                self.stream = torch.cuda.Stream()
            self.steps = run.progress(stop_at - time.time())  # making the model took some of it
            for _ in range(ALONE):
                self.take()
            if run.device.type == "cuda":
                run.peak_gb = round((_memory() - before) / 1e9, 3)
        except Exception as error:  # whatever it is: the others go on
            self._end(error)

    def take(self) -> None:
        """One step, unless the run is over."""
        if self.steps is None:
            return
        try:
            with torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext():
                next(self.steps)
        except StopIteration as end:
            self._end(end.value)
        except Exception as error:
            self._end(error)

    def _end(self, outcome: Outcome) -> None:
        if isinstance(outcome, Exception):
            traceback.print_exception(outcome)
        self.outcome, self.steps = outcome, None


def train_together(makes: Sequence[Callable[[bool], Run]], stop_at: float) -> list[Outcome]:
    """Trains runs of one method to their ends, each as if it were alone, and returns what came of each.

    Args:
        makes: each makes a run, and is given ``keep_compiled`` of :class:`Run`.
        stop_at: when those that are not done save a checkpoint and stop, as time.time() tells.
    """
    turns = [_Turn(make, len(makes), number > 0, stop_at) for number, make in enumerate(makes)]
    while any(turn.outcome is None for turn in turns):
        for turn in turns:
            turn.take()
    return [turn.outcome for turn in turns if turn.outcome is not None]


def _memory(reset: bool = False) -> int:
    """Bytes of tensors on the device now, from where peaks count; or the peak."""
    if not torch.cuda.is_available():
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()
