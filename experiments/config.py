"""Configurations: frozen dataclasses filled from TOML or JSON and command-line overrides, checked with clear errors."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what was given and what is allowed."""


def check(condition: bool, name: str, given: object, allowed: str) -> None:
    """Raises a :class:`ConfigError` naming the key, the given value and the allowed ones unless ``condition``."""
    if not condition:
        raise ConfigError(f"{name}: got {given!r}, allowed is {allowed}")


def read(path: str | Path) -> dict[str, Any]:
    """The mapping in a ``.toml`` or ``.json`` file.

    Raises:
        ConfigError: the file is missing, is neither, or cannot be parsed.
    """
    path = Path(path)
    check(path.suffix in (".toml", ".json"), "config", str(path), "a file ending in .toml or .json")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from error
    try:
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        raise ConfigError(f"config: {path} does not parse: {error}") from error
    check(isinstance(data, dict), "config", type(data).__name__, "a table of keys and values")
    return data


def override(data: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """``data`` with assignments such as ``model.dim=96``; values are JSON, or plain strings where they are not."""
    result: dict[str, Any] = json.loads(json.dumps(data))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        check(bool(key and equals), "override", assignment, "of the form key=value or table.key=value")
        *tables, last = key.split(".")
        target = result
        for table in tables:
            target = target.setdefault(table, {})
            check(isinstance(target, dict), "override", assignment, f"a key below a table ({table} is a value)")
        try:
            target[last] = json.loads(text)
        except ValueError:
            target[last] = text
    return result


def build(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """The dataclass ``cls`` from a mapping; nested dataclasses from nested mappings.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in data.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(f"{where}{key}: unknown key{hint}, allowed are " + ", ".join(fields))
        values[key] = _convert(hints[key], value, where + key)
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in values:
            raise ConfigError(f"{where}{name}: missing, it has no default")
    return cls(**values)


def _convert(hint: Any, value: Any, name: str) -> Any:
    """``value`` as the annotated type: int to float, list to tuple, mapping to dataclass; anything else must fit."""
    if hint is Any:
        return value
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        errors = []
        for option in options:
            if option is not type(None):
                try:
                    return _convert(option, value, name)
                except ConfigError as error:
                    errors.append(error)
        raise errors[0] if len(errors) == 1 else ConfigError(f"{name}: got {value!r}, allowed is {hint}")
    if dataclasses.is_dataclass(hint):
        check(isinstance(value, dict), name, value, "a table")
        return build(typing.cast("type", hint), value, name + ".")
    if origin is tuple:
        check(isinstance(value, (list, tuple)), name, value, "a list")
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, item, f"{name}[{i}]") for i, item in enumerate(value))
    if origin is dict or hint is dict:
        check(isinstance(value, dict), name, value, "a table")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    check(fits, name, value, f"of type {hint.__name__}")
    return value
