"""Configuration files: what all rows of a table share, and under ``[rows.NAME]`` what differs."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import config as configuration
from experiments.config import ConfigError, check
from experiments.models.blocks import ModelConfig


@dataclass(frozen=True)
class RunConfig:
    """One row of a table, but for the seed.

    Attributes:
        table: name of the table; a folder of results.
        row: name of the method in it.
        task, task_options: what is learned; see :data:`experiments.tasks.TASKS`.
        model: the body; the task adds embedding and head.
        steps, epochs: one of them.
        batch, eval_batch: examples at a time.
        eval_every: steps between evaluations; 0 for once an epoch, or at most 20 times in all.
        lr, lr_floor, warmup, weight_decay, beta1, beta2, clip, precision: as in
            :class:`experiments.train.TrainConfig`.
        checkpoint_every: seconds between checkpoints; 0 for none but where the run is stopped.
        graph: records the training step as a CUDA graph on a GPU (:mod:`experiments.step`).
        compile: compiles the model's blocks on a GPU.
    """

    table: str
    row: str
    task: str
    task_options: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    steps: int | None = None
    epochs: float | None = None
    batch: int = 64
    eval_batch: int = 256
    eval_every: int = 0
    lr: float = 1e-3
    lr_floor: float = 0.0
    warmup: float = 0.05
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    precision: str = "float32"
    checkpoint_every: float = 120.0
    graph: bool = True
    compile: bool = True

    def __post_init__(self) -> None:
        for name in ("table", "row"):
            value = getattr(self, name)
            fits = bool(value) and value not in (".", "..") and not set(value) & set("/\\\0")
            check(fits, name, value, "a name that a folder can have")
        one = (self.steps is None) != (self.epochs is None)
        check(one, "steps", self.steps, "given, or epochs, not both")
        check(self.steps is None or self.steps >= 1, "steps", self.steps, "1 or more")
        check(self.epochs is None or self.epochs > 0, "epochs", self.epochs, "above 0")
        for name in ("batch", "eval_batch"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        check(self.eval_every >= 0, "eval_every", self.eval_every, "0 or more")
        for name in ("lr", "clip"):
            check(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0")
        check(self.precision in ("float32", "bfloat16"), "precision", self.precision, "'float32' or 'bfloat16'")


def read_merged(path: str | Path) -> dict[str, Any]:
    """What a configuration file holds, over what the file holds that it names with ``like = "OTHER.toml"``, beside it.

    Raises:
        ConfigError: one of the two cannot be read, or the other one names a third.
    """
    own = configuration.read(path)
    other = own.pop("like", None)
    if other is None:
        return own
    check(isinstance(other, str), "like", other, "the name of a file beside this one")
    below = configuration.read(Path(path).parent / other)
    check("like" not in below, f"{path}: like", other, "a file that names none itself")
    return merge(below, own)


def read_rows(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, RunConfig]:
    """All rows of a configuration file, by name.

    Where the file or a row says ``search = { lr = [1e-3, 2e-3] }`` there is a row for each value, ``NAME@lr=0.001``:
    the same search for every method, whose outcome :mod:`experiments.tables` shows. A file may say what another one
    says but for some keys (:func:`read_merged`).

    Raises:
        ConfigError: naming the key and the row.
    """
    shared = read_merged(path)
    rows = shared.pop("rows", {})
    check(isinstance(rows, dict) and bool(rows), "rows", rows, "a table [rows.NAME] for each row")
    shared.setdefault("table", Path(path).stem)
    found = {}
    for name, own in rows.items():
        data = configuration.override(merge(merge(shared, {"row": name}), own), overrides)
        try:
            for values in _searched(data.pop("search", {})):
                settings = ",".join(f"{key}={value:g}" for key, value in values.items())
                row = f"{name}@{settings}" if settings else name
                found[row] = configuration.build(RunConfig, data | values | {"row": row})
        except ConfigError as error:
            raise ConfigError(f"{path}, row {name}: {error}") from error
    return found


def rows_named(rows: Mapping[str, RunConfig], name: str, key: str = "--row") -> list[str]:
    """The rows that a name stands for: itself, or without its ``@`` part a method's whole search.

    Raises:
        ConfigError: none, with the methods there are.
    """
    found = [row for row in rows if name in (row, row.partition("@")[0])]
    methods = list(dict.fromkeys(row.partition("@")[0] for row in rows))
    method, _, setting = name.partition("@")
    close = difflib.get_close_matches(method, methods, n=1)
    allowed = "one of " + ", ".join(methods) + (f" (did you mean {close[0]!r}?)" if close else "")
    if setting and method in methods:
        allowed = "one of " + ", ".join(rows_named(rows, method))
    check(bool(found), key, name, allowed)
    return found


def _searched(search: Mapping[str, Any]) -> list[dict[str, float]]:
    """Every combination of the values to search."""
    combinations: list[dict[str, float]] = [{}]
    for key, values in search.items():
        numbers = isinstance(values, list) and bool(values) and all(isinstance(v, (int, float)) for v in values)
        check(numbers, f"search.{key}", values, "a list of numbers")
        combinations = [before | {key: value} for before in combinations for value in values]
    return combinations


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``, table by table; mixer_options are replaced with their mixer."""
    result = dict(below)
    if "mixer" in above:
        result.pop("mixer_options", None)
    for key, value in above.items():
        inner = result.get(key)
        result[key] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


def different(before: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """What two settings differ in, as ``epochs: 3 there, 1 here``; a field that only one has is of another version."""
    found = []
    options = where.endswith("options.")
    for key in before | now if options else [key for key in before if key in now]:
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += different(one, other, f"{where}{key}.")
        elif one != other:
            found.append(f"{where}{key}: {one} there, {other} here")
    return found
