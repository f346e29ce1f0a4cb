"""``check_streaming``: whether a model's gradient by segments is the ordinary one, and if not, because of whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import trees
from .model import Call, LossFunction, model_on_first, stream_backward
from .randomness import Randomness
from .segments import indexed
from .stateful import Carrier, ModelState, StreamError


@dataclass(frozen=True)
class StreamingCheck:
    """What :func:`check_streaming` found.

    Attributes:
        loss_error: relative difference of the two losses.
        gradient_errors: of each parameter, the norm of the difference over the norm of the ordinary gradient.
    """

    loss_error: float
    gradient_errors: dict[str, float]

    @property
    def worst(self) -> float:
        """The largest of all."""
        return max([self.loss_error, *self.gradient_errors.values()])


def check_streaming(
    model: nn.Module,
    segments: Any,
    loss_fn: LossFunction,
    *,
    join: Callable[[list[Any]], Any] | None = None,
    call: Call = model_on_first,
    weights: Sequence[float] | None = None,
    tolerance: float | None = None,
    dim: int = 1,
) -> StreamingCheck:
    """Compares :func:`stream_backward` with the ordinary gradient on a context that fits, and names who breaks it.

    Run it once on some hundred tokens before training. The model is put in eval mode meanwhile (dropout falls
    on other tokens when they come in segments), and gradients in ``.grad`` are left as they were.

    Args:
        model, segments, loss_fn, call, weights: as for :func:`stream_backward`.
        join: the segments as one; by default their tensors are concatenated along ``dim``.
        tolerance: relative error allowed; default 1e-9 for float64 models, 1e-3 for float32, 5e-2 for narrower.
        dim: the axis of tokens.

    Returns:
        :class:`StreamingCheck`.

    Raises:
        StreamError: the gradients differ; the message names the first module whose outputs differ although its
            inputs agree, that is, one which mixes tokens and does not carry its state.
    """
    source = indexed("segments", segments)
    parts = [source[index] for index in range(len(source))]
    whole = (join or (lambda items: _join(items, dim)))(parts)
    tolerance = _tolerance(model) if tolerance is None else tolerance
    training = {module: module.training for module in model.modules()}
    kept = {p: p.grad for p in model.parameters()}
    random = Randomness.capture(next((p.device for p in model.parameters()), torch.device("cpu")))
    model.eval()
    try:
        losses = [loss_fn(call(model, whole), whole)] if weights is None else None
        ordinary = _gradients(model, lambda: _ordinary(model, whole, loss_fn, call, parts, weights, losses, dim))
        streamed: list[Tensor] = []
        by_segments = _gradients(
            model,
            lambda: streamed.append(stream_backward(model, parts, loss_fn, call=call, weights=weights).loss),
        )
        errors = {name: _error(by_segments[name], ordinary[name]) for name in ordinary}
        loss = 0.0 if losses is None else _error(streamed[0], losses[0].detach().double().cpu().reshape(()))
        found = StreamingCheck(loss, errors)
        if not found.worst <= tolerance:
            raise StreamError(_blame(model, parts, whole, call, dim, tolerance, found))
        return found
    finally:
        for module, was in training.items():
            module.training = was
        for p, grad in kept.items():
            p.grad = grad
        random.restore()


def _ordinary(
    model: nn.Module,
    whole: Any,
    loss_fn: LossFunction,
    call: Call,
    parts: list[Any],
    weights: Sequence[float] | None,
    losses: list[Tensor] | None,
    dim: int,
) -> None:
    """The ordinary backward pass; with weights, over the losses of the segments' outputs."""
    if losses is not None:
        losses[0].backward()
        return
    assert weights is not None
    out = call(model, whole)
    if not isinstance(out, Tensor):
        raise TypeError(f"weights: got them with a model that returns {type(out).__name__}, allowed is a Tensor")
    sizes = [_length(part, dim) for part in parts]
    outs = out.split(sizes, dim=dim)
    pairs = zip(outs, parts, weights, strict=True)
    torch.stack([w * loss_fn(o, part) for o, part, w in pairs]).sum().backward()


def _length(part: Any, dim: int) -> int:
    return next(int(x.shape[dim]) for x in trees.leaves(part) if x.ndim > dim)


def _gradients(model: nn.Module, compute: Callable[[], object]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    compute()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {n: torch.zeros_like(model.get_parameter(n)) if g is None else g for n, g in found.items()}


def _error(actual: Tensor, expected: Tensor) -> float:
    size = expected.double().norm().item()
    difference = (actual.double() - expected.double()).norm().item()
    return difference / size if size > 0 else difference


def _tolerance(model: nn.Module) -> float:
    """By the narrowest dtype; gradients of whole models err more than single layers."""
    sizes = [p.dtype.itemsize for p in model.parameters() if p.is_floating_point()]
    return {8: 1e-9, 4: 1e-3}.get(min(sizes, default=8), 5e-2)


def _join(parts: list[Any], dim: int) -> Any:
    rows = [trees.leaves(part) for part in parts]
    joined = [torch.cat(xs, dim=dim) if xs[0].ndim > dim else xs[0] for xs in zip(*rows, strict=True)]
    return trees.with_leaves(parts[0], iter(joined))


class _Recorder:
    """The inputs and outputs of every module, in the order in which they finish."""

    def __init__(self, model: nn.Module):
        self.calls: list[tuple[str, list[Tensor], list[Tensor]]] = []
        self._stack = ExitStack()
        for name, module in model.named_modules():
            hook = module.register_forward_hook(self._hook(name), with_kwargs=True)
            self._stack.callback(hook.remove)

    def _hook(self, name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            self.calls.append((name, _floats((args, kwargs)), _floats(out)))

        return note

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _floats(tree: Any) -> list[Tensor]:
    """Detached tensors anywhere in arguments or outputs; what is no state tree is passed over."""
    if isinstance(tree, (tuple, list)):
        return [x for part in tree for x in _floats(part)]
    if isinstance(tree, dict):
        return [x for part in tree.values() for x in _floats(part)]
    return [tree.detach()] if isinstance(tree, Tensor) else []


@torch.no_grad()
def _blame(
    model: nn.Module, parts: list[Any], whole: Any, call: Call, dim: int, tolerance: float, found: StreamingCheck
) -> str:
    with _Recorder(model) as once:
        call(model, whole)
    pieces = []
    with Carrier(model) as carrier:
        state: ModelState | None = None
        for part in parts:
            with _Recorder(model) as recorder:
                carrier.run(lambda part=part: call(model, part), state)  # type: ignore[misc]
            state = carrier.state()
            pieces.append(recorder.calls)
    summary = f"by segments the gradient differs from the ordinary one by {found.worst:.2g}, allowed is {tolerance:.2g}"
    order = [name for name, _, _ in once.calls]
    for segment in pieces:
        if [name for name, _, _ in segment] != order:
            return f"{summary}; the model calls other modules when its tokens come in segments"
    for index, (name, inputs, outputs) in enumerate(once.calls):
        agree = all(_agrees(x, [s[index][1][i] for s in pieces], dim, tolerance) for i, x in enumerate(inputs))
        same = all(_agrees(x, [s[index][2][i] for s in pieces], dim, tolerance) for i, x in enumerate(outputs))
        if agree and not same:
            who = f"{name!r} ({type(model.get_submodule(name)).__name__})" if name else "the model itself"
            return (
                f"{summary}: {who} mixes tokens, or counts positions, without carrying a state: its inputs agree, "
                f"its outputs do not. Make it stateful (see register_stateful), or replace it"
            )
    worst = max(found.gradient_errors, key=lambda n: found.gradient_errors[n], default="none")
    return (
        f"{summary}, first in {worst!r}, although all outputs agree: a state is cut from the graph, or loss_fn is not "
        f"a sum over tokens (give weights for means)"
    )


def _agrees(whole: Tensor, pieces: list[Tensor], dim: int, tolerance: float) -> bool:
    """Whether the pieces, concatenated along the axis of tokens, are the whole; if it has none, all equal it."""
    if whole.ndim > dim and sum(x.shape[dim] for x in pieces if x.ndim > dim) == whole.shape[dim]:
        joined = torch.cat(pieces, dim=dim)
    elif all(x.shape == whole.shape for x in pieces):
        return all(_error(x, whole) <= max(tolerance, 1e-6) for x in pieces)
    else:
        axes = [
            a for a in range(whole.ndim) if sum(x.shape[a] for x in pieces if x.ndim == whole.ndim) == whole.shape[a]
        ]
        if not axes:
            return False
        joined = torch.cat(pieces, dim=axes[0])
    return joined.shape == whole.shape and _error(joined, whole) <= max(tolerance, 1e-6)
