"""First and second derivatives of the reference against differences, for every input and option."""

from __future__ import annotations

import pytest
import torch

from race_attention import RaceState, race_attention
from race_attention.testing import leaves, make_inputs
from tests.helpers import CASES

#: Small enough for differences in every direction; odd shapes stay odd.
SMALL = {"batch": 1, "dim": 2, "value_dim": 1, "tables": 1, "planes": 2}
SIZES = {"tokens": 3, "keys": 3}


def small(case: str) -> dict:
    options = {**CASES[case], **SMALL}
    if "lengths" in options:
        options["lengths"] = (2, 0, 1)
        if "key_lengths" in options:
            options["key_lengths"] = (1, 2, 0)
    else:
        options |= SIZES
        if "keys" in CASES[case]:
            options["tokens"] = 2
    if options.get("heads", 2) > 2:
        options["heads"], options["kv_heads"] = 2, options.get("kv_heads", 2) and 1
    options["tables"] = 2 if case in ("full", "causal") else 1
    inputs = make_inputs(**options, dtype=torch.float64, seed=7)
    if "log_decay" in inputs:  # away from its bound 0, so that differences stay within it
        inputs["log_decay"] = inputs["log_decay"] - 0.1
    return {name: as_leaf(x) for name, x in inputs.items()}


def as_leaf(x):
    if isinstance(x, RaceState):
        return RaceState(x.mass.requires_grad_(), x.value_sum.requires_grad_(), x.log_decay, x.tokens)
    return x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def as_function(inputs):
    """race_attention as a function of its differentiable tensors alone, with the state among the results."""
    names, tensors = zip(*leaves(inputs).items(), strict=True)
    state = inputs.get("initial_state")

    def function(*tensors):
        given = dict(zip(names, tensors, strict=True))
        mass, value_sum = given.pop("initial_state.mass", None), given.pop("initial_state.value_sum", None)
        if state is not None:
            given["initial_state"] = RaceState(mass, value_sum, state.log_decay, state.tokens)
        out, after = race_attention(**{**inputs, **given}, return_state=True, backend="reference")
        results = [out, after.mass, after.value_sum, after.log_decay]
        return tuple(x for x in results if x.requires_grad)

    return function, tensors


@pytest.mark.parametrize("case", list(CASES))
def test_first_derivatives(case):
    function, tensors = as_function(small(case))
    assert torch.autograd.gradcheck(function, tensors, eps=1e-6, atol=1e-7, rtol=1e-6, check_undefined_grad=True)


@pytest.mark.parametrize("case", list(CASES))
def test_second_derivatives(case):
    function, tensors = as_function(small(case))
    assert torch.autograd.gradgradcheck(function, tensors, eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_only_what_is_asked_gets_a_gradient(causal):
    """Each input alone: the others need not require gradients."""
    names = ["query", "key", "value", "hyperplanes", "beta", *(["log_decay"] if causal else [])]
    everything = make_inputs(causal=causal, decay="token" if causal else None, dtype=torch.float64, requires_grad=True)
    race_attention(**everything, backend="reference").square().sum().backward()
    for name in names:
        alone = make_inputs(causal=causal, decay="token" if causal else None, dtype=torch.float64)
        alone[name].requires_grad_()
        race_attention(**alone, backend="reference").square().sum().backward()
        assert torch.allclose(alone[name].grad, everything[name].grad, rtol=1e-12, atol=1e-14)


def test_state_carries_gradients_between_calls():
    """The loss of the second segment reaches the keys of the first through the state, and detach cuts it."""
    first = make_inputs(causal=True, requires_grad=True)
    second = {**make_inputs(causal=True, seed=1), "hyperplanes": first["hyperplanes"].detach(), "beta": 1.5}
    _, state = race_attention(**first, return_state=True, backend="reference")
    race_attention(**second, initial_state=state, backend="reference").square().sum().backward()
    for name in ("key", "value", "hyperplanes", "beta"):
        assert first[name].grad.any(), name
    assert first["query"].grad is None or not first["query"].grad.any()
    assert not race_attention(**second, initial_state=state.detach(), backend="reference").requires_grad
