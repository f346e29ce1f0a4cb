"""ListOps at the lengths of the Long Range Arena, from a generator of our own.

Grammar and sizes of Tay et al. 2020 (arXiv 2011.04006, section 2.2.1) after Nangia and Bowman 2018 (arXiv
1804.06028): nested MIN, MAX, MED(ian) and SM (sum modulo 10) of 2 to 10 arguments, at most 10 deep, 500 to 2,000
tokens. A node below the deepest level is an operator with probability 1/4, otherwise a digit.
"""

from __future__ import annotations

import functools
import random
import statistics
from dataclasses import dataclass

import torch
from torch import nn

from experiments.config import check
from experiments.models.blocks import ModelConfig
from experiments.models.encoder import HeadConfig, SequenceClassifier
from experiments.tasks.base import Split, SplitTask

#: The tokens by number; 0 is padding.
TOKENS = ("", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
NUMBERS = {token: number for number, token in enumerate(TOKENS)}
OPERATORS = TOKENS[11:15]
END = NUMBERS["]"]


@dataclass(frozen=True)
class ListOpsOptions:
    """Options of ListOps.

    Attributes:
        train, valid, test: examples of each split.
        shortest, longest: tokens of an example.
        depth, arguments: at most.
        pool: as in :class:`~experiments.models.encoder.HeadConfig`.
    """

    train: int = 96000
    valid: int = 2000
    test: int = 2000
    shortest: int = 500
    longest: int = 2000
    depth: int = 10
    arguments: int = 10
    pool: str = "mean"

    def __post_init__(self) -> None:
        check(self.arguments >= 2, "task_options.arguments", self.arguments, "2 or more")
        check(1 <= self.shortest <= self.longest, "task_options.shortest", self.shortest, "between 1 and longest")


class ListOps(SplitTask):
    """Ten classes, the value of the expression. Examples depend on the options and the split alone."""

    def __init__(
        self, name: str, options: ListOpsOptions, *, data_dir: str | None, device: torch.device, seed: int
    ) -> None:
        self.options = options
        counts = {"train": options.train, "valid": options.valid, "test": options.test}
        splits = {part: generate(part, count, options) for part, count in counts.items()}
        super().__init__(name, splits, device, seed)

    def make_model(self, config: ModelConfig, seed: int) -> nn.Module:
        fitted = ModelConfig(**{**vars(config), "vocab": len(TOKENS)})
        return SequenceClassifier(fitted, HeadConfig(10, self.options.pool), seed=seed)


@functools.lru_cache(maxsize=3)  # a process that runs one method after another makes them once
def generate(part: str, count: int, options: ListOpsOptions) -> Split:
    """``count`` different expressions of a split, as padded rows, and their values."""
    draw = random.Random(f"listops {part}")
    rows = torch.zeros(count, options.longest, dtype=torch.int64)
    values: list[int] = []
    seen: set[bytes] = set()
    while len(values) < count:
        tokens: list[int] = []
        value = _expression(draw, 1, options, tokens)
        if value is None or len(tokens) < options.shortest:
            continue
        key = bytes(tokens)
        if key not in seen:
            seen.add(key)
            rows[len(values), : len(tokens)] = torch.tensor(tokens)
            values.append(value)
    return Split(rows, torch.tensor(values, dtype=torch.int64), rows == 0)


def _expression(draw: random.Random, depth: int, options: ListOpsOptions, tokens: list[int]) -> int | None:
    """Appends an expression and returns its value; None as soon as it is longer than allowed."""
    if depth >= options.depth or draw.random() > 0.25:
        value = draw.randrange(10)
        tokens.append(value + 1)
        return value if len(tokens) <= options.longest else None
    operator = draw.choice(OPERATORS)
    tokens.append(NUMBERS[operator])
    values = []
    for _ in range(draw.randint(2, options.arguments)):
        argument = _expression(draw, depth + 1, options, tokens)
        if argument is None:
            return None
        values.append(argument)
    tokens.append(END)
    return apply(operator, values) if len(tokens) <= options.longest else None


def apply(operator: str, values: list[int]) -> int:
    """The value of an operator on its arguments; the median of an even number is rounded down."""
    if operator == "[MIN":
        return min(values)
    if operator == "[MAX":
        return max(values)
    if operator == "[MED":
        return int(statistics.median(values))
    return sum(values) % 10


def evaluate(tokens: list[int]) -> int:
    """The value of an expression, by a stack: an independent reading, for tests."""
    stack: list[list[int] | str] = []
    values: list[int] = []
    for token in tokens:
        text = TOKENS[token]
        if text.startswith("["):
            stack += [values, text]
            values = []
        elif text == "]":
            operator, outer = stack.pop(), stack.pop()
            assert isinstance(operator, str)
            assert isinstance(outer, list)
            values = [*outer, apply(operator, values)]
        else:
            values.append(int(text))
    (value,) = values
    return value
