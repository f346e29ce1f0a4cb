"""The cases of benchmarks/fuzz.py: what a seed stands for, its arguments, its route, its question."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch
from torch import Tensor

from race_attention import race_attention
from race_attention.testing import make_inputs
from tests import helpers

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STRIDES = ("contiguous", "contiguous", "transposed", "expanded", "sliced")
#: Pairs of tokens times heads, tables and planes that the oracle compares within a second and a gigabyte.
PAIRS = {True: 40_000, False: 2_000_000}
#: Likewise on a GPU, in some gigabytes.
LONG_PAIRS = 100_000_000
#: Tokens of the cases called long: two of the longest runs and more.
LONG = 5_000
#: Of the twists, what kernels are compiled for.
HELD = ("strides", "wanted", "autocast", "asks", "route", "again")
#: What is longer is compared with the reference backend in float64, which the oracle is compared with elsewhere.
LONGEST = 20_000


def drawn(
    seed: int, dtypes: tuple[str, ...], small: bool, alike: int, buckets: int = 0, long: bool = False
) -> dict[str, Any]:
    """The case of a seed: options of make_inputs, and under "twists" what they do not cover.

    ``alike`` seeds have in common what kernels are compiled for: dtype, sizes of a token, numbers of buckets, and
    whether there are several heads a key head, a mask, decay, sequences; strides, the route and what is asked.
    ``buckets`` at most, and then mostly nearly so many. ``long``: up to LONG tokens, and sizes of a token a GPU likes.
    """
    rng = random.Random(seed // alike)

    def chance(share: float) -> bool:
        return rng.random() < share

    def size(most: int) -> int:
        """Any size, small ones as often as large, and those at the edges of tiles more often."""
        edge = rng.choice([16, 32, 64, 128, 256, 512]) + rng.choice([-1, 0, 0, 1])
        return edge if chance(0.4) and edge <= most else round(most ** rng.random())

    most_tokens, most_dim, most_buckets = (70, 40, buckets or 64) if small else (700, 256, buckets or 1024)
    most_pairs = PAIRS[small]
    if long:
        most_tokens, most_pairs = LONG, 10**15  # the reference knows what is right too
    planes = rng.choice([1, 2, 2, 3, 3, 4, 4, 5, 6, 8, 10])
    while 2**planes > most_buckets:
        planes -= 1
    tables = min(size(most_buckets), most_buckets >> planes, rng.choice([1, 2, 3, 4, 5, 16, 64]))
    if buckets:
        tables = (most_buckets >> planes) - rng.choice([0, 0, 0, 1]) * (2**planes < most_buckets)
    dim, value_dim, causal, dtype = size(most_dim), size(most_dim), chance(0.6), rng.choice(dtypes)
    share, decay, packed = rng.choice([1, 1, 2, 3]), rng.choice([None, None, "head", "token"]), chance(0.3)
    if long:
        dim, value_dim = rng.choice((16, 40, 64, 64, 128)), rng.choice((16, 40, 64, 64, 128))
    masked, state, wanted = chance(0.45), chance(0.3), "all" if chance(0.5) else "none" if chance(0.1) else None
    group, rng = rng, random.Random(seed)
    extreme, groups = chance(0.15), rng.choice([1, 1, 2, 3])
    options: dict[str, Any] = {
        "heads": groups * share,
        "kv_heads": groups,
        "dim": dim,
        "value_dim": value_dim,
        "tables": tables,
        "planes": planes,
        "shared_hyperplanes": chance(0.2),
        "beta": rng.choice([1e-3, 300.0, 1e4] if extreme else ["heads", "heads", "scalar", 0.3, 1.0, 4.0]),
        "causal": causal,
        "decay": decay if causal else None,
        "masked": rng.choice([0.1, 0.6, 0.97, 1.1]) if masked else 0.0,
        "mask_per_head": chance(0.3),
        "initial_state": state,
        "seed": seed,
    }
    options["scale"] = options["dim"] ** -0.5 * rng.choice([1.0, 1.0, 1.0, 2.0, 0.1]) if chance(0.8) else 1.0
    cost = options["heads"] * tables * planes
    if packed:
        most = max(1, min(most_tokens, int((most_pairs / cost) ** 0.5)))
        rows = rng.choice([0, 1, 2, 3, 6, 17])
        most = max(1, most // max(1, rows)) if long else most
        lengths = [0 if chance(0.2) else 1 if chance(0.2) else size(most) for _ in range(rows)]
        options["lengths"] = tuple(lengths)
        if not causal and chance(0.4):
            options["key_lengths"] = tuple(rng.sample(lengths, len(lengths)))
    else:
        options["batch"] = 0 if chance(0.02) else rng.choice([1, 1, 2, 3])
        most = max(1, min(most_tokens, int((most_pairs / (cost * max(1, options["batch"]))) ** 0.5)))
        options["tokens"] = 0 if chance(0.02) else size(most)
        if long and chance(0.7):
            options["tokens"] = rng.randint(most // 2, most)
        if not causal and chance(0.6):
            options["keys"] = 0 if chance(0.05) else size(most)
        if not small and not long and chance(0.06):
            options |= {"batch": rng.choice([1, 1, 2]), "tokens": size(LONGEST)}
    odd = [100.0 if dtype == "float16" else 1e4, 1e-3, 0.0]
    sizes = [1.0, *odd] if extreme else [1.0, 1.0, 1.0, 0.1]
    twists = _twists(rng, dtype, sizes, odd, extreme=extreme, small=small, wanted=wanted)
    if alike > 1:
        of_group = _twists(group, dtype, sizes, odd, extreme=extreme, small=small, wanted=wanted)
        twists |= {name: of_group[name] for name in HELD}
    if twists["route"] != "whole":  # there gradients of parameters are added up in their own dtype
        twists["parameters"] = None
    return {"seed": seed, "dtype": dtype, "long": long, "options": options, "twists": twists}


def _twists(
    rng: random.Random, dtype: str, sizes: list[float], odd: list[float], *, extreme: bool, small: bool, wanted: Any
) -> dict[str, Any]:
    """What make_inputs does not cover."""

    def chance(share: float) -> bool:
        return rng.random() < share

    return {
        "strides": [rng.choice(STRIDES) for _ in range(3)],
        "extreme": extreme,
        "magnitude": [rng.choice(sizes), rng.choice(sizes), rng.choice([1.0, 1.0, 1.0, *odd])],
        "wanted": wanted or rng.random(),
        "parameters": rng.choice([None, None, None, "float64", "bfloat16", "float32"]),
        "decay": rng.choice([None, None, "zero", "forget", "some forget"]),
        "same": chance(0.1),
        "hidden_row": chance(0.2),
        "narrow_state": chance(0.2),
        "odd_state": chance(0.3),
        "int32": chance(0.3),
        "autocast": chance(0.1) and dtype in ("bfloat16", "float16"),
        "threads": rng.choice([1, 1, 2, 3]),
        "asks": rng.choice(["all", "all", "out", "sum", "odd gradient"]),
        "route": rng.choice(["whole", "whole", "segments", "ranks", "sequences", "padding"]),
        "again": [] if chance(0.6) else [rng.choice([0, 0, 1, 4, 8]) for _ in range(1 if small else 4)],
        "sizes": tuple(rng.choice([13, 16, 33] if small else [1, 1, 2, 7, 16, 33, 64, 130]) for _ in range(3)),
    }


def has(case: dict[str, Any], wanted: tuple[str, ...]) -> bool:
    """Whether a case, and all that are alike, has ``wanted``: packed, state, decay, mask, causal, full or a dtype."""
    options = case["options"]
    there = {
        "packed": "lengths" in options,
        "state": options["initial_state"],
        "decay": options["decay"] is not None,
        "mask": options["masked"] > 0,
        "causal": options["causal"],
        "full": not options["causal"],
    }
    return all(there[name] if name in there else case["dtype"] == name for name in wanted)


def inputs_of(case: dict[str, Any], device: str) -> dict[str, Any]:
    """The arguments of race_attention of a case."""
    twists, dtype = case["twists"], DTYPES[case["dtype"]]
    inputs = make_inputs(**case["options"], dtype=dtype, device=device)
    rng = random.Random(case["seed"] + 1)
    for name, strides, magnitude in zip(("query", "key", "value"), twists["strides"], twists["magnitude"], strict=True):
        options = {**case["options"], "strides": strides, "magnitude": magnitude}
        inputs[name] = make_inputs(**options, dtype=dtype, device=device)[name]
    if twists["same"] and inputs["query"].shape == inputs["key"].shape == inputs["value"].shape:
        inputs["key"], inputs["value"] = inputs["query"].detach(), inputs["query"].detach()  # one memory, three leaves
    if twists["autocast"]:
        inputs.update({name: inputs[name].float() for name in ("query", "key", "value")})
    if twists["parameters"]:
        for name in ("hyperplanes", "beta", "log_decay"):
            if isinstance(inputs.get(name), Tensor):
                inputs[name] = inputs[name].to(DTYPES[twists["parameters"]])
        inputs["hyperplanes"] = inputs["hyperplanes"].transpose(1, 3).contiguous().transpose(1, 3)
    if "log_decay" in inputs and "key_mask" in inputs:  # of keys long past, decay may leave less than any number
        inputs["log_decay"] = inputs["log_decay"] * (60 / LONG if case["long"] else 0.1)
    elif "log_decay" in inputs and twists["decay"]:
        decay = inputs["log_decay"]
        forgets = torch.tensor([rng.random() < 0.1 for _ in range(decay.numel())], dtype=torch.bool, device=device)
        forgets = forgets.view(decay.shape)
        least = {"zero": decay * 0, "forget": decay - 2, "some forget": torch.where(forgets, decay - 300, decay)}
        inputs["log_decay"] = least[twists["decay"]].clamp(max=0)
    if "key_mask" in inputs and twists["hidden_row"] and inputs["key_mask"].shape[0]:
        inputs["key_mask"][0] = False
    if "initial_state" in inputs:
        state = inputs["initial_state"]
        mass, value_sum = state.mass, state.value_sum
        if twists["odd_state"]:
            mass, value_sum = (x.transpose(1, -1).contiguous().transpose(1, -1) for x in (mass, value_sum))
        narrow = torch.float32 if twists["narrow_state"] and twists["route"] != "ranks" else torch.float64
        fields = (mass.to(narrow), value_sum.to(narrow), state.log_decay.to(narrow))
        inputs["initial_state"] = type(state)(*fields, state.tokens)
    if twists["int32"]:
        inputs.update({name: x.int() for name, x in inputs.items() if name.startswith("cu_")})
    _want(inputs, twists["wanted"], rng)
    return inputs


def _want(inputs: dict[str, Any], wanted: Any, rng: random.Random) -> None:
    """Leaves that require gradients: all, none, or a share of them."""
    share = {"all": 1.0, "none": 0.0}.get(wanted, wanted)
    for x in inputs.values():
        for leaf in (x.mass, x.value_sum) if hasattr(x, "mass") else [x]:
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and rng.random() < share:
                leaf.requires_grad_()


def elsewhere(inputs: dict[str, Any], offset: int) -> dict[str, Any]:
    """The same with query, key and value copied, with their strides, so many numbers past the start of a memory."""
    moved = dict(inputs)
    for name in ("query", "key", "value"):
        x = inputs[name]
        if x.numel() and 0 not in x.stride():
            reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
            copy = x.new_empty(reach + offset).as_strided(x.shape, x.stride(), offset)
            moved[name] = copy.copy_(x.detach()).requires_grad_(x.requires_grad)
    return moved


def route_of(case: dict[str, Any], inputs: dict[str, Any], backend: str) -> helpers.Route:
    """The route and the question: what of the results the gradients are of."""
    twists, name = case["twists"], case["twists"]["route"]
    packed, sizes = "cu_seqlens" in inputs, twists["sizes"]
    tokens = inputs["key"].shape[1]
    route: Any = helpers.whole
    if name == "segments" and case["options"]["causal"] and not packed and tokens:
        route = partial(helpers.by_segments, sizes=sizes)
    elif name == "ranks" and not packed and tokens:
        route = partial(helpers.by_ranks, sizes=sizes)
    elif name == "sequences" and packed and inputs["cu_seqlens"].shape[0] > 1:
        route = helpers.by_sequences
    elif name == "padding" and not packed:
        route = helpers.with_padding
    if twists["asks"] in ("out", "sum") and route is helpers.whole:

        def route(inputs: dict[str, Any], **how: Any) -> Any:
            return race_attention(**inputs, **how), helpers.no_tokens(inputs)

    return partial(route, backend=backend)


def asked(case: dict[str, Any], results: tuple[Tensor, Any], inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """What is asked of output and state, of whichever implementation."""
    out, state = results
    asks = case["twists"]["asks"]
    if asks == "odd gradient" and out.requires_grad:
        out = out * 1  # so that the hook sees the gradient on its way to the backend
        results[0].register_hook(lambda x: x.transpose(1, 3).contiguous().transpose(1, 3))
    if asks == "sum":  # its gradient has strides of 0
        out = out.double().sum(1, keepdim=True)
    if asks in ("out", "sum"):
        state = helpers.no_tokens(inputs)
    return out, state
