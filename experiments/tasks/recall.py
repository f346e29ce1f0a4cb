"""Tasks that ask what a state remembers: associative recall (MQAR) and the retrieval of a needle."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.config import check
from experiments.models.blocks import ModelConfig
from experiments.models.lm import DecoderLM
from experiments.tasks.base import IGNORED, Split, SplitTask


@dataclass(frozen=True)
class MqarOptions:
    """Options of multi-query associative recall.

    Attributes:
        length: tokens.
        pairs: key-value pairs, each asked once; 4 * pairs at most ``length``.
        vocab: tokens; the lower half are keys, the upper half values.
        power: the distance from a pair to its question follows a power law with density ~ distance^(power - 1).
        train, valid: examples.
    """

    length: int = 256
    pairs: int = 16
    vocab: int = 8192
    power: float = 0.01
    train: int = 100000
    valid: int = 3000

    def __post_init__(self) -> None:
        fits = 1 <= 4 * self.pairs <= self.length and self.length % 2 == 0
        check(fits, "task_options.pairs", self.pairs, f"at most a quarter of length, {self.length}, which is even")
        check(self.vocab // 2 - 1 >= self.pairs, "task_options.vocab", self.vocab, "above 2 * pairs + 2")
        check(self.power > 0, "task_options.power", self.power, "above 0")


class Mqar(SplitTask):
    """Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927, section 4 and appendix E).

    All pairs come first, key value key value ...; later each key comes again once, at places drawn by the power
    law, and the model must answer its value. Random values fill the rest and count nothing.
    """

    def __init__(
        self, name: str, options: MqarOptions, *, data_dir: str | None, device: torch.device, seed: int
    ) -> None:
        self.options = options
        parts = {"train": (options.train, 2 * seed), "valid": (options.valid, 1)}  # odd seeds are held out
        super().__init__(name, {k: mqar_examples(options, n, s) for k, (n, s) in parts.items()}, device, seed)

    def make_model(self, config: ModelConfig, seed: int) -> nn.Module:
        return DecoderLM(ModelConfig(**{**vars(config), "vocab": self.options.vocab}), seed=seed)


@functools.lru_cache(maxsize=4)
def mqar_examples(options: MqarOptions, count: int, seed: int) -> Split:
    """Inputs and targets [count, length]; a target lies where its key is asked."""
    generator = torch.Generator().manual_seed(seed)
    half, pairs = options.vocab // 2, options.pairs
    keys = _different(1, half, count, pairs, generator)
    values = _different(half, options.vocab, count, pairs, generator)
    inputs = torch.randint(half, options.vocab, (count, options.length), generator=generator)
    inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
    targets = torch.full_like(inputs, IGNORED)
    slots = (options.length - 2 * pairs) // 2
    weights = torch.arange(1, slots + 1, dtype=torch.float64) ** (options.power - 1)
    places = 2 * pairs + 2 * torch.multinomial(weights.expand(count, -1), pairs, generator=generator)
    inputs.scatter_(1, places, keys)
    targets.scatter_(1, places, values)
    return Split(inputs, targets)


def _different(low: int, high: int, count: int, size: int, generator: torch.Generator) -> Tensor:
    """[count, size] integers from low to below high, different within a row."""
    rows = []
    for some in torch.full((count,), 0).split(4096):  # in parts: a row of the whole range each
        order = torch.rand(len(some), high - low, generator=generator)
        rows.append(order.topk(size, dim=1).indices + low)
    return torch.cat(rows)


@dataclass(frozen=True)
class NeedleOptions:
    """Options of needle retrieval.

    Attributes:
        length: bytes.
        needles: facts hidden in the text; one is asked for at its end.
        digits: of each fact's number.
        train, valid: examples.
    """

    length: int = 1024
    needles: int = 1
    digits: int = 4
    train: int = 20000
    valid: int = 500

    def __post_init__(self) -> None:
        check(self.needles >= 1, "task_options.needles", self.needles, "1 or more")
        check(self.digits >= 1, "task_options.digits", self.digits, "1 or more")
        room = (self.needles + 1) * (len(_fact("longest name", "")) + self.digits) + 40
        check(self.length >= room, "task_options.length", self.length, f"at least {room}")


NAMES = ("anna", "bela", "carl", "dora", "emil", "fred", "gina", "hugo", "ida", "jack", "kurt", "lena")
FILLER = ("the", "grass", "is", "green", "sky", "was", "blue", "and", "sun", "over", "hills", "shone", "while", "we")


def _fact(name: str, number: str) -> str:
    return f" The number of {name} is {number}."


class Needle(SplitTask):
    """A number stated once in a long filler text, at any depth, and asked for at the end; digits right count."""

    def __init__(
        self, name: str, options: NeedleOptions, *, data_dir: str | None, device: torch.device, seed: int
    ) -> None:
        self.options = options
        parts = {"train": (options.train, f"train {seed}"), "valid": (options.valid, "valid")}
        super().__init__(name, {k: needle_examples(options, n, s) for k, (n, s) in parts.items()}, device, seed)

    def make_model(self, config: ModelConfig, seed: int) -> nn.Module:
        return DecoderLM(ModelConfig(**{**vars(config), "vocab": 256}), seed=seed)


@functools.lru_cache(maxsize=4)  # a process that runs one method after another makes them once
def needle_examples(options: NeedleOptions, count: int, seed: str) -> Split:
    """Inputs and targets [count, length] bytes; only the digits of the answer are targets."""
    draw = random.Random(f"needle {seed}")
    texts = [_haystack(options, draw) for _ in range(count)]
    rows = torch.frombuffer(bytearray("".join(texts).encode()), dtype=torch.uint8).view(count, -1).long()
    targets = torch.full((count, options.length), IGNORED)
    targets[:, -options.digits :] = rows[:, -options.digits :]
    return Split(rows[:, :-1], targets)


def _haystack(options: NeedleOptions, draw: random.Random) -> str:
    """length + 1 characters that end with the answer."""
    names = draw.sample(NAMES, options.needles)
    numbers = ["".join(draw.choices("0123456789", k=options.digits)) for _ in names]
    facts = [_fact(name, number) for name, number in zip(names, numbers, strict=True)]
    asked = draw.randrange(options.needles)
    question = _fact(names[asked], numbers[asked])[:-1]
    room = options.length + 1 - len(question) - sum(map(len, facts))
    words: list[str] = []
    while room > 0:
        words.append((" " + draw.choice(FILLER))[:room])
        room -= len(words[-1])
    places = sorted((draw.randrange(len(words) + 1) for _ in facts), reverse=True)
    for place, fact in zip(places, facts, strict=True):
        words.insert(place, fact)
    return "".join(words) + question
