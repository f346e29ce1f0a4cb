"""``stream_backward``: the exact gradient of a whole model over a context that does not fit in memory.

Forward, segment by segment, keeping only the states at the boundaries; then, from the last segment back, each is
computed again with its graph, and the gradients of its final states, which the segment after it has left, go
in beside its loss, those of its initial states come out. Nothing is truncated: it is the chain rule over

    state_{i+1}, out_i = model(segment_i, state_i)          loss = sum_i weight_i * loss_fn(out_i, segment_i)

with one segment's graph alive at a time. Two forward passes and one backward (three forward passes where only
every n-th boundary is kept).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import trees
from .narrow import WideGradients
from .progress import Progress, progress_of
from .randomness import Randomness
from .segments import Indexed, indexed
from .stateful import Carrier, ModelState, Reached, StreamError

Call = Callable[[nn.Module, Any], Any]
LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class StreamedLoss:
    """What :func:`stream_backward` returns.

    Attributes:
        loss: scalar float64, the weighted sum over segments, without ``loss_scale``.
        losses: [n] float64, what ``loss_fn`` returned for each segment, without weights.
        state: of the model after the last token, cut from the graph.
    """

    loss: Tensor
    losses: Tensor
    state: ModelState


def model_on_first(model: nn.Module, segment: Any) -> Any:
    """How a model is called by default: on a tensor, the first of a tuple or list, or a mapping as keywords."""
    if isinstance(segment, Tensor):
        return model(segment)
    if isinstance(segment, (tuple, list)):
        return model(segment[0])
    if isinstance(segment, dict):
        return model(**segment)
    raise TypeError(
        f"segments: got a {type(segment).__name__}, allowed are a tensor, a tuple whose first is the input, or a "
        f"dict of keywords; for others give call(model, segment)"
    )


def stream_backward(
    model: nn.Module,
    segments: Any,
    loss_fn: LossFunction,
    *,
    call: Call = model_on_first,
    weights: Sequence[float] | None = None,
    loss_scale: float | Tensor = 1.0,
    count: int | None = None,
    initial_state: ModelState | None = None,
    keep_every: int = 1,
    offload: torch.device | str | None = None,
    stop_early: bool = True,
    progress: bool | Callable[[str, int, int | None], object] = False,
) -> StreamedLoss:
    """Adds the exact gradients of the summed loss to ``.grad`` of the parameters, one segment in memory at a time.

    What the ordinary ``loss_fn(model(all tokens)).backward()`` would do, where it fits. Mixing over tokens has to
    go through stateful modules (:mod:`race_attention.streaming.stateful`); :func:`check_streaming` says whether
    it does. Autocast, activation checkpointing (not reentrant), ``torch.compile`` of the model or of its parts,
    clipping and accumulation after it work as ever. torch's random state is kept for every segment, so dropout
    falls alike both times; python's and numpy's are not. Gradients of bfloat16 and float16 parameters are
    accumulated over the segments in float32.

    Args:
        model: any module.
        segments: the context, cut along its tokens into pieces of any sizes, in order: a sequence, or a function
            of the index with ``count``. Read two times (three with keep_every > 1), so no iterator.
        loss_fn: ``loss_fn(output, segment)``, a scalar: the *sum* over the segment's tokens, or a mean with
            ``weights``. The loss is the sum over segments of weight * loss.
        call: ``call(model, segment) -> output``; by default the model is called on the segment's first item.
        weights: [n], one for each segment; for means, its share of the tokens. Default 1 each.
        loss_scale: multiplies every loss before it is differentiated: 1 / tokens for a mean of sums, or
            ``GradScaler.get_scale()``. Not in the returned losses.
        count: the number of segments, where ``segments`` is a function.
        initial_state: of the model after earlier tokens, through which no gradient flows. Default none.
        keep_every: keeps the states at every n-th boundary only and computes those between once more:
            memory for boundaries / n, and one more forward pass.
        offload: where boundary states wait, for example "cpu". Default: where they are.
        stop_early: in passes that are after the states alone, leaves out what follows the last stateful module
            (an output layer, most often). Switch it off for models whose forward must not end by an exception.
        progress: a bar (needs rich), or a function of (phase, done, total).

    Returns:
        :class:`StreamedLoss`.

    Raises:
        StreamError: the model cannot be run so.
        ValueError, TypeError: naming the argument, what was given and what is allowed.
    """
    source = indexed("segments", segments, count)
    weights = _weights(weights, len(source))
    if not isinstance(keep_every, int) or keep_every < 1:
        raise ValueError(f"keep_every: got {keep_every!r}, allowed is an integer, 1 or more")
    if initial_state is not None and not isinstance(initial_state, ModelState):
        raise TypeError(f"initial_state: got {type(initial_state).__name__}, allowed is ModelState")
    if len(source) == 0:
        raise ValueError("segments: got none, allowed is one or more")
    with ExitStack() as stack:
        carrier = stack.enter_context(Carrier(model))
        bar = stack.enter_context(progress_of(progress))
        stack.callback(torch.clear_autocast_cache)
        sweeps = _Sweeps(carrier, source, call, offload, stop_early)
        last_block = sweeps.forward(initial_state, keep_every, bar)
        wide = stack.enter_context(WideGradients(model))
        return _backward(sweeps, last_block, loss_fn, weights, loss_scale, wide, bar)


class _Sweeps:
    """The passes without a graph, and what they keep: states at boundaries, random states of segments."""

    def __init__(
        self, carrier: Carrier, source: Indexed, call: Call, offload: torch.device | str | None, stop_early: bool
    ):
        self.carrier, self.source, self.call = carrier, source, call
        self.offload, self.stop_early = offload, stop_early
        self.device = next((p.device for p in carrier.model.parameters()), torch.device("cpu"))
        self.kept: dict[int, ModelState | None] = {}
        self.random: list[Randomness] = []
        self.every = 1
        self.last_call: tuple[str, int] | None = None  # of the stateful calls of a segment

    def forward(self, initial: ModelState | None, every: int, bar: Progress) -> list[ModelState | None]:
        """The first pass; returns the states before each segment of the last block of ``every``."""
        self.every = every
        state = None if initial is None else initial.detach()
        block: list[ModelState | None] = []
        for index in range(len(self.source)):
            self.random.append(Randomness.capture(self.device))
            if index % every == 0:
                self.kept[index], block = self._put(state), []
            block.append(state)
            if index + 1 < len(self.source):  # the last segment is computed once, with its graph
                state = self._states_after(index, state)
                bar.show("forward", index + 1, len(self.source) - 1)
        return block

    def block(self, first: int) -> list[ModelState | None]:
        """The states before each segment of an earlier block, computed again from the one kept."""
        state = self._get(first)
        states = [state]
        for index in range(first, first + self.every - 1):
            self.random[index].restore()
            state = self._states_after(index, state)
            states.append(state)
        return states

    def _states_after(self, index: int, state: ModelState | None) -> ModelState:
        segment = self.source[index]
        with torch.no_grad():
            torch.clear_autocast_cache()  # what is cast without a graph must not be met again with one
            with suppress(Reached):
                self.carrier.run(lambda: self.call(self.carrier.model, segment), state, self.last_call)
            after = ModelState(trees.tree_map(trees.compact, self.carrier.state().modules))
        if self.stop_early and self.last_call is None:
            self.last_call = self._last_call()
        return after

    def _last_call(self) -> tuple[str, int] | None:
        """The last stateful call of a segment, if the order is plain: each module called once."""
        order = self.carrier.order()
        return (order[-1], 0) if order and len(set(order)) == len(order) else None

    def _put(self, state: ModelState | None) -> ModelState | None:
        return state if state is None or self.offload is None else state.to(self.offload)

    def _get(self, index: int) -> ModelState | None:
        state = self.kept[index]
        return state if state is None or self.offload is None else state.to(self.device)


def _backward(
    sweeps: _Sweeps,
    states: list[ModelState | None],
    loss_fn: LossFunction,
    weights: Sequence[float],
    loss_scale: float | Tensor,
    wide: WideGradients,
    bar: Progress,
) -> StreamedLoss:
    """The pass from the last segment back."""
    count = len(sweeps.source)
    losses: list[Tensor] = [torch.zeros(())] * count
    adjoints: list[Tensor | None] | None = None
    final, random_after = ModelState(), None
    for index in reversed(range(count)):
        if not states:
            states = sweeps.block(index + 1 - sweeps.every)
        before = states.pop()
        sweeps.kept.pop(index, None)
        sweeps.random[index].restore()
        losses[index], after, adjoints = _segment(sweeps, index, before, adjoints, weights[index] * loss_scale, loss_fn)
        wide.collect()
        if random_after is None:
            final, random_after = after, Randomness.capture(sweeps.device)
        bar.show("backward", count - index, count)
    assert random_after is not None
    random_after.restore()  # the next context draws other numbers
    each = torch.stack([x.to(device="cpu", dtype=torch.float64) for x in losses])
    return StreamedLoss((each * torch.tensor(weights, dtype=torch.float64)).sum(), each, final)


def _segment(
    sweeps: _Sweeps,
    index: int,
    before: ModelState | None,
    adjoints: list[Tensor | None] | None,
    factor: float | Tensor,
    loss_fn: LossFunction,
) -> tuple[Tensor, ModelState, list[Tensor | None]]:
    """One segment with its graph: its loss, its final state, the gradients of its initial state's tensors."""
    carrier, segment = sweeps.carrier, sweeps.source[index]
    model, call = carrier.model, sweeps.call
    inside = None if before is None else ModelState(trees.as_leaves(before.modules))
    with torch.enable_grad():
        torch.clear_autocast_cache()
        out = carrier.run(lambda: call(model, segment), inside)
        after = carrier.state()
        loss = loss_fn(out, segment)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss_fn: got {given} from it, allowed is a scalar tensor")
        roots = [loss * factor] if loss.requires_grad else []
        cotangents: list[Tensor | None] = [None] * len(roots)
        ends = [x for x in trees.leaves(after.modules) if trees.is_float(x)]
        if adjoints is not None:
            _check_connected(carrier, before, after, adjoints, ends)
            for end, adjoint in zip(ends, adjoints, strict=True):
                if adjoint is not None and end.requires_grad:
                    roots.append(end)
                    cotangents.append(adjoint.to(end))
    if not roots:
        raise StreamError("loss_fn: its loss does not depend on anything that wants a gradient")
    carrier.replay(True)
    with _no_autocast():
        torch.autograd.backward(roots, cotangents)
    carrier.replay(False)
    starts = [] if inside is None else [x for x in trees.leaves(inside.modules) if trees.is_float(x)]
    return loss.detach(), after.detach(), [x.grad for x in starts]


def _check_connected(
    carrier: Carrier, before: ModelState | None, after: ModelState, adjoints: list[Tensor | None], ends: list[Tensor]
) -> None:
    """Raises where a gradient would be lost on its way through a module's state."""
    if len(adjoints) != len(ends):
        raise StreamError("the states of two segments differ in their number of tensors")
    if before is None:
        return
    for name, states in after.modules.items():
        floats = [x for x in trees.leaves(states) if trees.is_float(x)]
        if floats and not any(x.requires_grad for x in floats):
            raise StreamError(
                f"{name or 'the model'}: its new state does not depend on its old one by autograd; it runs under "
                f"no_grad, detaches its state, or in a reentrant checkpoint (use_reentrant=False is needed)"
            )


def _no_autocast() -> ExitStack:
    """As an ordinary backward pass, which is not under autocast either."""
    stack = ExitStack()
    for kind in ("cpu", "cuda", "xpu"):
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    given = [float(w) for w in weights]
    if len(given) != count:
        raise ValueError(f"weights: got {len(given)}, allowed is one for each of the {count} segments")
    return given
