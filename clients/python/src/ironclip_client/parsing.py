"""From JSON to frozen dataclasses: what is known is taken, what is new is kept in `raw`, what is missing is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from ironclip_client.errors import UnexpectedAnswer

T = TypeVar("T")
EMPTY: Mapping[str, Any] = MappingProxyType({})
# Of this client, not of the answer; an answer that has such a field keeps it in `raw`.
_OWN = ("raw", "meta")


def raw_field() -> Any:
    """The field `raw` of a dataclass: the JSON it was made of, neither shown nor compared."""
    return dataclasses.field(default_factory=dict, repr=False, compare=False)


def pick(kind: type[T], data: object, /, *, own: Mapping[str, Any] = EMPTY, **readers: Callable[[Any], Any]) -> T:
    """Make a dataclass of JSON: the fields it has, each through its reader if there is one and it is not null.

    Raises:
        UnexpectedAnswer: not an object, or one that lacks a field without a default.
    """
    if not isinstance(data, Mapping):
        raise UnexpectedAnswer(f"The answer has no {kind.__name__} where one belongs; is this an Ironclip service?")
    given: dict[str, Any] = {}
    for one in dataclasses.fields(kind):  # type: ignore[arg-type]
        name = one.name
        if name in own:
            given[name] = own[name]
        elif name in _OWN:
            given |= {"raw": data} if name == "raw" else {}
        elif name in data:
            value = data[name]
            given[name] = readers[name](value) if name in readers and value is not None else value
        elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise UnexpectedAnswer(f"The answer's {kind.__name__} has no {name!r}; is this an Ironclip service?")
    return kind(**given)


def each(reader: Callable[[Any], T]) -> Callable[[Any], tuple[T, ...]]:
    """A reader of lists, from one of their items."""

    def read(values: Any) -> tuple[T, ...]:
        if not isinstance(values, list):
            raise UnexpectedAnswer("The answer has no list where one belongs; is this an Ironclip service?")
        return tuple(reader(value) for value in values)

    return read
