"""TOML configs with ``key=value`` overrides, read into frozen dataclasses; an unknown key is an error."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ironclip.errors import OptionError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

CONFIGS = Path(__file__).parent / "configs"
T = TypeVar("T")


def _convert(value: Any, kind: Any, where: str) -> Any:
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return from_mapping(kind, value, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return None if value is None else _convert(value, next(a for a in get_args(kind) if a is not type(None)), where)
    if origin is Literal:
        if value in get_args(kind):
            return value
        raise OptionError(f"{where}: expected {' or '.join(map(repr, get_args(kind)))}, got {value!r}")
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = get_args(kind)
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(value):
            raise OptionError(f"{where}: expected {len(kinds)} values, got {len(value)}")
        return tuple(_convert(item, of, where) for item, of in zip(value, kinds, strict=True))
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise OptionError(f"{where}: expected {kind}, got {value!r}")


def from_mapping(kind: type[T], values: Any, where: str = "") -> T:
    """Build the dataclass ``kind`` from a mapping of its fields, nested tables included.

    Raises:
        OptionError: a key that is no field (with the nearest that is), a missing field, or a value of a wrong type.
    """
    if not isinstance(values, Mapping):
        raise OptionError(f"{where or 'the config'}: expected a table, got {values!r}")
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(fields)}"
            raise OptionError(f"unknown key {prefix}{key}{hint}")
    for key, field in fields.items():
        if key not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise OptionError(f"missing key {prefix}{key}")
    return kind(**{key: _convert(value, hints[key], f"{prefix}{key}") for key, value in values.items()})


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise OptionError(f"an override looks like key=value, got {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise OptionError(f"override {override!r}: {parent} is no table")
    values[last] = value


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``key=value`` pairs as a (nested) mapping; a value is TOML where it parses as such, else a string."""
    values: dict[str, Any] = {}
    for override in overrides:
        _set(values, override)
    return values


def merge(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings into one; later values win."""
    result: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            old = result.get(key)
            result[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def read_config(name: str, kind: str) -> dict[str, Any]:
    """The content of a config by name (a file in ``training/configs/KIND``) or path (ending in .toml)."""
    folder = CONFIGS / kind
    path = folder / f"{name}.toml" if not name.endswith(".toml") else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in folder.glob("*.toml")))
        raise OptionError(f"no config {name!r}; known: {known}, or give the path of a .toml file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{path} is no TOML: {error}") from error


def load_config(kind: type[T], name: str, overrides: Sequence[str] = ()) -> T:
    """Read a pre-training config by name or path, then apply ``key=value`` overrides in order.

    A value is TOML where it parses as such, else a string; dots go into nested tables.
    """
    values = read_config(name, "pretrain")
    for override in overrides:
        _set(values, override)
    return from_mapping(kind, values)


def options_of(kind: Callable[..., T], options: Mapping[str, Any], where: str) -> T:
    """A dataclass from the options that a user gave; what it refuses itself is passed on."""
    return from_mapping(kind, options, where)  # type: ignore[arg-type]
