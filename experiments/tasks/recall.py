"""Tasks that ask what a state remembers: associative recall (MQAR) and the retrieval of a needle."""

from __future__ import annotations

import dataclasses
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
        needles: facts hidden in the text, at most 12.
        questions: how many of them are asked for at its end.
        rounds: how many times over in training, each time in another order; once where it is scored. What was just
            answered is easy to find, so that looking something up is learned soon, whatever the length.
        digits: of each fact's number.
        train, valid: examples.
    """

    length: int = 1024
    needles: int = 1
    questions: int = 1
    rounds: int = 1
    digits: int = 4
    train: int = 20000
    valid: int = 500

    def __post_init__(self) -> None:
        most = len(NAMES)
        check(1 <= self.needles <= most, "task_options.needles", self.needles, f"in [1, {most}]")
        check(1 <= self.questions <= self.needles, "task_options.questions", self.questions, f"in [1, {self.needles}]")
        for name in ("rounds", "digits"):
            check(getattr(self, name) >= 1, f"task_options.{name}", getattr(self, name), "1 or more")
        room = (self.needles + self.questions * self.rounds) * len(_fact(max(NAMES, key=len), "0" * self.digits)) + 40
        check(self.length >= room, "task_options.length", self.length, f"at least {room}")


NAMES = ("anna", "bela", "carl", "dora", "emil", "fred", "gina", "hugo", "ida", "jack", "kurt", "lena")
FILLER = ("the", "grass", "is", "green", "sky", "was", "blue", "and", "sun", "over", "hills", "shone", "while", "we")


def _fact(name: str, number: str) -> str:
    return f" {name}={number}."


class Needle(SplitTask):
    """Numbers stated once each in a long filler text, at any depth, some asked for at its end; digits right count.

    ``... the sky anna=4711. was blue ... bela=0815. we ... bela=0815. anna=4711.``: a model is asked for the digits of
    the last two. That more than one is asked makes the task quick to learn; a guess has 10 %.
    """

    def __init__(
        self, name: str, options: NeedleOptions, *, data_dir: str | None, device: torch.device, seed: int
    ) -> None:
        self.options = options
        parts = {"train": (options.train, f"train {seed}"), "valid": (options.valid, "valid")}
        once = dataclasses.replace(options, rounds=1)
        splits = {k: needle_examples(options if k == "train" else once, n, s) for k, (n, s) in parts.items()}
        super().__init__(name, splits, device, seed)

    def make_model(self, config: ModelConfig, seed: int) -> nn.Module:
        return DecoderLM(ModelConfig(**{**vars(config), "vocab": 256}), seed=seed)


@functools.lru_cache(maxsize=4)  # a process that runs one method after another makes them once
def needle_examples(options: NeedleOptions, count: int, seed: str) -> Split:
    """Inputs and targets [count, length] bytes; only the digits of the answers are targets."""
    draw = random.Random(f"needle {seed}")
    filler = " " + " ".join(draw.choices(FILLER, k=options.length + 10_000))  # examples read it from different places
    texts = [_haystack(options, filler, draw) for _ in range(count)]
    rows = torch.frombuffer(bytearray("".join(text for text, _ in texts).encode()), dtype=torch.uint8)
    rows = rows.view(count, -1).long()
    answers = torch.tensor([starts for _, starts in texts])[..., None] + torch.arange(options.digits)
    asked = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, answers.flatten(1), value=True)
    return Split(rows[:, :-1], rows.masked_fill(~asked, IGNORED)[:, 1:])


def _haystack(options: NeedleOptions, filler: str, draw: random.Random) -> tuple[str, list[int]]:
    """length + 1 characters that end with the questions, and where in them the answers' digits start."""
    names = draw.sample(NAMES, options.needles)
    facts = [_fact(name, "".join(draw.choices("0123456789", k=options.digits))) for name in names]
    questions = draw.sample(facts, options.questions)
    asked = [fact for _ in range(options.rounds) for fact in draw.sample(questions, options.questions)]
    room = options.length + 1 - sum(map(len, facts + asked))
    start = draw.randrange(len(filler) - room)
    text = filler[start : start + room]
    places = sorted(text.find(" ", draw.randrange(room)) % room for _ in facts)  # not found: before its last letter
    parts = [text[a:b] for a, b in zip([0, *places], [*places, room], strict=True)]
    text = "".join(part + fact for part, fact in zip(parts, [*facts, ""], strict=True))
    starts = []
    for fact in asked:
        starts.append(len(text) + len(fact) - 1 - options.digits)
        text += fact
    return text, starts
