"""The state protocol: how a model runs over a long text in segments, its own code unchanged.

A module that mixes tokens is *stateful* when it can hand on all that later tokens need of earlier ones. Three
ways to say so:

    RaceAttention (and whatever has its ``forward(x, ..., state=None, return_state=False)``): nothing to do, or
        ``register_stateful(YourClass)``;
    a method ``forward_with_state(state, *args, **kwargs) -> (output, state)``, with None as the state before
        the first token;
    ``register_stateful(TheirClass, adapter)`` for modules that cannot be changed.

While :class:`Carrier` is entered, each stateful module of the model receives its state and leaves its new one,
whatever the code between: the model's ``forward`` neither takes nor returns states.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from race_attention.nn import RaceAttention
from race_attention.state import row_index

from . import trees

#: forward, state, args, kwargs -> output, new state. ``forward`` is the module's own, bound.
Adapter = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], tuple[Any, Any]]

_ADAPTERS: dict[type[nn.Module], Adapter] = {}


class StreamError(RuntimeError):
    """A model that cannot be run in segments exactly; the message names the module and why."""


def state_by_keyword(
    forward: Callable[..., Any], state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """The adapter of modules with ``forward(..., state=None, return_state=False) -> (output, state)``."""
    if kwargs.get("state") is not None or kwargs.get("return_state"):
        raise StreamError("a stateful module was called with a state by the model itself; call it without")
    kwargs = {name: given for name, given in kwargs.items() if name not in ("state", "return_state")}
    result = forward(*args, **kwargs, state=state, return_state=True)
    return result[0], result[1]


def register_stateful(cls: type[nn.Module], adapter: Adapter = state_by_keyword) -> None:
    """Declares that modules of a class (and of its subclasses) carry their state from segment to segment.

    Args:
        cls: a subclass of ``nn.Module`` whose output at a token depends on that token and on the state alone.
        adapter: ``adapter(forward, state, args, kwargs) -> (output, new state)``; ``forward`` is the module's
            own, bound. State is None before the first token; a state is a tensor, or a tuple, list, dict or
            dataclass of tensors. By default ``forward(*args, **kwargs, state=state, return_state=True)``.

    Example:
        torch's GRU returns its state beside its output, and takes it as a second argument::

            def gru(forward, state, args, kwargs):
                out, state = forward(*args, state, **kwargs)
                return (out, state), state

            register_stateful(nn.GRU, gru)

    Raises:
        TypeError: not a class of modules, or an adapter that cannot be called.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls: got {cls!r}, allowed is a subclass of nn.Module")
    if not callable(adapter):
        raise TypeError(f"adapter: got {adapter!r}, allowed is a callable")
    _ADAPTERS[cls] = adapter


register_stateful(RaceAttention)


def _own_method(
    forward: Callable[..., Any], state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """The adapter of modules with ``forward_with_state``; ``forward`` is that method here."""
    result = forward(state, *args, **kwargs)
    return result[0], result[1]


def adapter_of(module: nn.Module) -> Adapter | None:
    """How to hand a module its state, or None where it has none."""
    if callable(getattr(type(module), "forward_with_state", None)):
        return _own_method
    for cls in type(module).__mro__:
        if cls in _ADAPTERS:
            return _ADAPTERS[cls]
    return None


def stateful_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The stateful modules of a model by name; those inside another stateful one are its own business.

    Raises:
        StreamError: one of them looks at later tokens.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if adapter_of(module) is None or any(name.startswith(outer + ".") or outer == "" for outer in found):
            continue
        if isinstance(module, RaceAttention) and not module.causal:
            raise StreamError(f"{name or 'the model'}: got RaceAttention with causal=False, allowed is a causal layer")
        found[name] = module
    return found


@dataclass
class ModelState:
    """The state of a whole model after some tokens.

    Attributes:
        modules: of each stateful module by name, its states in the order of its calls (one, as a rule).
    """

    modules: dict[str, list[Any]] = field(default_factory=dict)

    def detach(self) -> ModelState:
        """The same numbers, cut from the autograd graph."""
        return ModelState(trees.detach(self.modules))

    def clone(self) -> ModelState:
        """A copy with memory of its own. Needed by modules alone that change a state in place; ours do not."""
        return ModelState(trees.tree_map(Tensor.clone, self.modules))

    def to(self, device: torch.device | str) -> ModelState:
        """The state on another device."""
        return ModelState(trees.move(self.modules, device))

    def select(self, rows: Tensor | list[int]) -> ModelState:
        """The given rows of the batch in the given order, repeated ones too; rows are the first axis of a state."""

        def chosen(state: Any) -> Any:
            if hasattr(state, "select") and not isinstance(state, Tensor):
                return state.select(rows)
            return trees.tree_map(lambda x: x[row_index(rows, x.device)], state)

        return ModelState({name: [chosen(state) for state in states] for name, states in self.modules.items()})


class Reached(Exception):
    """The last stateful module has left its state; what follows it does not matter to later segments."""


class _Slot:
    """What one module receives and leaves. Plain data, so that torch.compile can guard and replay it."""

    def __init__(self, adapter: Adapter, forward: Callable[..., Any], name: str, order: list[str]):
        self.adapter, self.forward, self.name = adapter, forward, name
        self.order = order  # names of all modules, as they are called
        self.before: list[Any] = []
        self.after: list[Any] = []
        self.first = True  # no token came before
        self.replaying = False  # activation checkpointing runs it again
        self.stop_after = -1  # ends the sweep at this call


def _calls(name: str, calls: int, where: str) -> str:
    return f"{name or 'the model'}: called {calls} times {where}"


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands in for ``forward`` of a stateful module while a :class:`Carrier` is entered."""
    slot: _Slot = self._stream_slot  # type: ignore[assignment]
    if slot.replaying:
        if len(slot.after) != 1:
            raise StreamError(_calls(slot.name, len(slot.after), "a segment, allowed under checkpointing is one call"))
        return slot.adapter(slot.forward, None if slot.first else slot.before[0], args, kwargs)[0]
    call = len(slot.after)
    if not slot.first and call >= len(slot.before):
        raise StreamError(_calls(slot.name, call + 1, f"in this segment, {len(slot.before)} in the one before"))
    out, after = slot.adapter(slot.forward, None if slot.first else slot.before[call], args, kwargs)
    slot.after.append(after)
    slot.order.append(slot.name)
    if not torch.compiler.is_compiling() and call == slot.stop_after:
        raise Reached
    return out


class Carrier:
    """Hands states to a model's stateful modules and takes the new ones, for as long as it is entered.

    Args:
        model: any module; names are kept under a ``torch.compile`` wrapper too.

    Raises:
        StreamError: a stateful module looks at later tokens, or the model is in a stream already.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules = stateful_modules(model)
        self._slots: dict[str, _Slot] = {}
        self._replaced: dict[str, Any] = {}
        self._order: list[str] = []

    def __enter__(self) -> Carrier:
        for name, module in self.modules.items():
            if "_stream_slot" in module.__dict__:
                raise StreamError(f"{name or 'the model'}: in a stream already; a model can be in one at a time")
        for name, module in self.modules.items():
            adapter = adapter_of(module)
            assert adapter is not None
            own = module.forward_with_state if adapter is _own_method else module.forward
            slot = _Slot(adapter, own, name, self._order)  # type: ignore[arg-type]
            self._replaced[name] = module.__dict__.get("forward")
            self._slots[name] = module.__dict__["_stream_slot"] = slot
            module.__dict__["forward"] = types.MethodType(_forward, module)
        return self

    def __exit__(self, *_: object) -> None:
        for name, module in self.modules.items():
            slot = self._slots.get(name)
            if slot is None or module.__dict__.get("_stream_slot") is not slot:
                continue
            del module.__dict__["_stream_slot"], module.__dict__["forward"]
            if self._replaced[name] is not None:  # other code had put a forward in the instance
                module.__dict__["forward"] = self._replaced[name]
        self._slots.clear()

    def run(self, call: Callable[[], Any], state: ModelState | None, stop_after: tuple[str, int] | None = None) -> Any:
        """Calls the model once, on the tokens that follow ``state``; :meth:`state` then has the new one.

        Args:
            call: calls the model.
            state: before these tokens; None before the first.
            stop_after: ends the call once this module has been called so often, with :class:`Reached`.
        """
        self._order.clear()
        for name, slot in self._slots.items():
            slot.before = [] if state is None else list(state.modules.get(name, []))
            slot.after, slot.first, slot.replaying = [], state is None, False
            slot.stop_after = stop_after[1] if stop_after is not None and stop_after[0] == name else -1
        return call()

    def state(self) -> ModelState:
        """After the last :meth:`run`.

        Raises:
            StreamError: a module was called less often than in the segment before.
        """
        for slot in self._slots.values():
            if not slot.first and len(slot.after) != len(slot.before):
                raise StreamError(
                    _calls(slot.name, len(slot.after), f"in this segment, {len(slot.before)} in the one before")
                )
        return ModelState({name: list(slot.after) for name, slot in self._slots.items()})

    def replay(self, replaying: bool) -> None:
        """Says that calls until the next :meth:`run` are activation checkpointing's."""
        for slot in self._slots.values():
            slot.replaying = replaying

    def order(self) -> list[str]:
        """The names of the stateful modules in the order in which the last :meth:`run` has called them."""
        return list(self._order)


def forward_with_state(model: nn.Module, state: ModelState | None, *args: Any, **kwargs: Any) -> tuple[Any, ModelState]:
    """Runs a whole model on the tokens that follow ``state``: prefill in chunks of any size, decode by steps.

    Args:
        model: whose mixing over tokens goes through stateful modules.
        state: after the tokens so far, None before the first; it is left as it was, so that keeping it is a
            snapshot, using it twice a fork, and going back to it a rewind.
        args, kwargs: of the model's own forward.

    Returns:
        What the model returns, and the state after these tokens. Differentiable through both.
    """
    with Carrier(model) as carrier:
        out = carrier.run(lambda: model(*args, **kwargs), state)
        return out, carrier.state()
